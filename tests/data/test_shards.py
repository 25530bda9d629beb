"""Tar shards read in place, against the same files in a folder and against webdataset."""

import csv
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from speechbrain_jepa.data import (
    CropDataset,
    CropSampler,
    crop_loader,
    decode_once,
    read_csv,
    scan_folder,
    split_held_out,
)
from speechbrain_jepa.data import scan as scan_module
from speechbrain_jepa.data.shards import ShardMember

KINDS = {  # name: Hz, channels
    "00.wav": (16_000, 1),
    "01.flac": (44_100, 2),
    "02.ogg": (22_050, 1),
    "03.mp3": (44_100, 2),
    "04.aiff": (48_000, 1),
    "05.flac": (16_000, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Audio of several kinds."""
    folder = tmp_path_factory.mktemp("shards") / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (rate, channels) in KINDS.items():
        soundfile.write(folder / name, rng.normal(0, 0.1, (3 * rate, channels)), rate)
    return folder


@pytest.fixture(scope="module")
def shards(folder):
    """The same files in two shards of the webdataset package, beside what else goes into them."""
    shards = folder.parent / "shards"
    shards.mkdir()
    for number, names in enumerate((sorted(KINDS)[:4], sorted(KINDS)[4:])):
        with webdataset.TarWriter(str(shards / f"{number:06}.tar")) as writer:
            for name in names:
                key, kind = name.split(".")
                data = (folder / name).read_bytes()
                writer.write({"__key__": key, kind: data, "json": {"label": key}, "txt": "text"})
    return shards


def scan(folder, cache, **options):
    return scan_folder(folder, cache, progress=False, **options)


def paths(manifest):
    return [manifest.path(item) for item in range(len(manifest))]


def lines(skipped):
    with open(skipped.path, newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def test_members_are_the_bytes_that_webdataset_reads(shards, tmp_path):
    manifest, skipped = scan(shards, tmp_path)
    assert len(skipped) == 0
    ours = {}
    for path in paths(manifest):
        with ShardMember(os.path.join(shards, path), path.offset, path.size).open() as file:
            ours[path.split("::")[1]] = file.read()
    theirs = {}
    urls = sorted(map(str, shards.glob("*.tar")))
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        (kind,) = {"wav", "flac", "ogg", "mp3", "aiff"} & set(sample)
        theirs[f"{sample['__key__']}.{kind}"] = sample[kind]
    assert set(ours) == set(KINDS)
    assert ours == theirs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_equal_those_of_the_same_files_in_a_folder(folder, shards, num_workers, tmp_path):
    batches = []
    for place in (folder, shards):
        manifest, _ = scan(place, tmp_path / place.name)
        assert [path.rpartition("::")[2] for path in paths(manifest)] == sorted(KINDS)
        sampler = CropSampler(len(manifest), batch_size=6, seed=1, passes=3)
        loader = crop_loader(CropDataset(manifest, place, 64, seed=1), sampler, num_workers)
        batches.append(list(loader))
    for plain, sharded in zip(*batches, strict=True):
        assert torch.equal(plain.item, sharded.item)
        assert torch.equal(plain.wav, sharded.wav)
        assert plain.failures == sharded.failures == []


def test_a_folder_may_hold_shards_and_files(folder, shards, tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "deep.tar").mkdir(parents=True)  # a folder of that name is a folder
    (mixed / "deep.tar" / "a.tar").symlink_to(shards / "000001.tar")
    (mixed / "z.wav").symlink_to(folder / "00.wav")
    manifest, skipped = scan(mixed, tmp_path / "cache")
    assert paths(manifest) == ["deep.tar/a.tar::04.aiff", "deep.tar/a.tar::05.flac", "z.wav"]
    assert manifest.seconds.tolist() == [3, 3, 3]
    assert len(skipped) == 0
    batch = CropDataset(manifest, mixed, 64).__getitems__([(0, item) for item in range(3)])
    assert batch.failures == []


def test_a_csv_row_may_name_a_whole_shard_but_no_part_of_one(folder, shards, tmp_path):
    rows = [
        "ID,duration,wav,start,stop",
        f"a,3.0,{folder / '00.wav'},8000,24000",
        "b,6.0,$data_root/000001.tar,,",
        "c,6.0,$data_root/000000.tar,8000,24000",
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    manifest, skipped = read_csv(tmp_path / "train.csv", tmp_path, shards, progress=False)
    names = [str(folder / "00.wav"), "000001.tar::04.aiff", "000001.tar::05.flac"]
    assert paths(manifest) == names
    assert lines(skipped)["000000.tar"].startswith("cannot be opened")
    batch = CropDataset(manifest, shards, 64).__getitems__([(0, item) for item in range(3)])
    assert batch.failures == []


def test_an_unchanged_shard_is_not_read_again(shards, tmp_path, monkeypatch):
    first, _ = scan(shards, tmp_path)
    monkeypatch.setattr(tarfile, "open", None)
    again, _ = scan(shards, tmp_path)
    assert paths(again) == paths(first)
    assert again.offset.tolist() == first.offset.tolist()
    assert (again.offset > 0).all()


def test_headers_are_read_of_new_shards_only(shards, tmp_path, monkeypatch):
    place = tmp_path / "audio"
    place.mkdir()
    (place / "0.tar").symlink_to(shards / "000000.tar")
    scan(place, tmp_path / "cache")
    (place / "1.tar").symlink_to(shards / "000001.tar")
    read, original = [], scan_module.read_headers
    monkeypatch.setattr(
        scan_module,
        "read_headers",
        lambda files, *rest: (read.extend(name for name, *_ in files), original(files, *rest))[1],
    )
    manifest, _ = scan(place, tmp_path / "cache")
    assert read == ["1.tar::04.aiff", "1.tar::05.flac"]
    assert len(manifest) == 6


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_bad_shards_and_members_are_listed_and_the_rest_is_used(folder, tmp_path):
    place = tmp_path / "audio"
    place.mkdir()
    audio = (folder / "05.flac").read_bytes()
    with tarfile.open(place / "good.tar", "w") as tar:
        add(tar, "deep/er/good.flac", audio)
        add(tar, "deep/._good.flac", b"a resource fork")
        add(tar, ".hidden/good.flac", audio)
        add(tar, "deep/../../climbs.flac", audio)
        add(tar, "deep/empty.flac", b"")
        add(tar, "text.wav", b"not audio at all")
        add(tar, "cut.wav", (folder / "00.wav").read_bytes()[:40_000])
        add(tar, "long" * 40 + "/ünï, 音.flac", audio)
        add(tar, "twice.flac", b"an older version")
        add(tar, "./twice.flac", audio)
    with tarfile.open(place / "cut.tar", "w") as tar:
        add(tar, "whole.flac", audio)
        add(tar, "half.flac", audio)
    whole = (place / "cut.tar").read_bytes()
    (place / "cut.tar").write_bytes(whole[: 512 + len(audio) * 3 // 2])
    with tarfile.open(place / "packed.tar", "w:gz") as tar:
        add(tar, "a.flac", audio)
    (place / "text.tar").write_text("not a tar")
    (place / "empty.tar").touch()
    with tarfile.open(place / "silent.tar", "w") as tar:
        add(tar, "a.json", b"{}")

    manifest, skipped = scan(place, tmp_path / "cache")
    assert sorted(paths(manifest)) == [
        "cut.tar::whole.flac",
        "good.tar::deep/er/good.flac",
        f"good.tar::{'long' * 40}/ünï, 音.flac",
        "good.tar::twice.flac",
    ]
    reasons = lines(skipped)
    expected = {
        "cut.tar": "truncated: ends inside half.flac",
        "packed.tar": "cannot be read as a tar",
        "text.tar": "cannot be read as a tar",
        "empty.tar": "cannot be read as a tar",
        "silent.tar": "holds no audio file",
        "good.tar::deep/empty.flac": "empty",
        "good.tar::text.wav": "cannot be opened",
        "good.tar::cut.wav": "truncated",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reasons[name].startswith(reason)
    batch = CropDataset(manifest, place, 64).__getitems__([(0, item) for item in range(4)])
    assert batch.failures == []


def test_only_bad_shards_are_an_error_that_names_the_list(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.tar").write_text("not a tar")
    with pytest.raises(ValueError, match=r"none of the 1 .*skipped\.csv"):
        scan(tmp_path / "audio", tmp_path / "cache")


def test_a_member_that_breaks_during_training_is_replaced(shards, tmp_path):
    place = tmp_path / "audio"
    place.mkdir()
    for shard in shards.glob("*.tar"):
        (place / shard.name).write_bytes(shard.read_bytes())
    manifest, _ = scan(place, tmp_path / "cache")
    broken = manifest.path(5)
    with open(place / "000001.tar", "r+b") as file:
        file.seek(broken.offset)
        file.write(bytes(broken.size))
    for num_workers in (0, 1):
        loader = crop_loader(CropDataset(manifest, place, 64), CropSampler(6, 6), num_workers)
        (batch,) = loader
        assert len(batch) == 6
        assert [path for path, _ in batch.failures] == ["000001.tar::05.flac"]


def test_members_are_decoded_once_like_files(folder, shards, tmp_path):
    decoded = []
    for place in (folder, shards):
        manifest, _ = scan(place, tmp_path / place.name)
        decoded.append(decode_once(manifest, place, tmp_path / place.name, progress=False))
    for plain, sharded in zip(paths(decoded[0]), paths(decoded[1]), strict=True):
        np.testing.assert_array_equal(soundfile.read(plain)[0], soundfile.read(sharded)[0])


def test_held_out_members_decode(shards, tmp_path):
    manifest, _ = scan(shards, tmp_path)
    train, valid = split_held_out(manifest, min_valid=2, data_folder=shards)
    assert len(valid) == 2
    assert sorted([*train, *valid]) == list(range(6))
    assert manifest.subset(valid).path(0).size == manifest.size[valid[0]]


def test_a_member_behaves_like_a_file_of_its_bytes(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.bytes(5000)
    (tmp_path / "a.tar").write_bytes(rng.bytes(700) + data + rng.bytes(700))
    member = ShardMember(f"{tmp_path}/a.tar::x", 700, 5000)
    member = pickle.loads(pickle.dumps(member))  # as it goes to loader processes
    with member.open() as ours, io.BytesIO(data) as plain:
        for _ in range(300):
            whence = int(rng.integers(3))
            low = {0: 0, 1: -plain.tell(), 2: -5000}[whence]
            place = int(rng.integers(low, low + 6000))
            assert ours.seek(place, whence) == plain.seek(place, whence)
            wanted = int(rng.integers(3000))
            assert ours.read(wanted) == plain.read(wanted)
            assert ours.tell() == plain.tell()


# Hostile tars


def header(name, size, kind=b"0"):
    """512 bytes as the format has them, whatever they say."""
    block = bytearray(512)
    block[: len(name)] = name
    number = b"%011o\0" % size if size >= 0 else (size % 2**96).to_bytes(12, "big")
    block[100:108], block[124:136], block[156:157] = b"0000644\0", number, kind
    if size < 0:
        block[124] = 0xFF  # base 256, negative
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(records):
    data = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    return header(b"pax", len(data), b"x") + padded(data)


HOSTILE = {
    "negative size": (header(b"b.wav", -512), "a member of -512 bytes"),
    "negative size of a name": (header(b"b.wav", -(2**40), b"L"), "a member of -"),
    "negative size in pax": (pax([b"size=-99"]) + header(b"b.wav", 9), "a member of -99 bytes"),
    "giant name": (header(b"././@LongLink", 2**32, b"L"), "a name or header of 4294967296 bytes"),
    "giant pax header": (header(b"pax", 2**32, b"x"), "a name or header of 4294967296 bytes"),
    "long name": (
        header(b"././@LongLink", 9000, b"L") + padded(b"c" * 9000) + header(b"c", 9),
        None,  # of no audio
    ),
    "long audio name": (
        header(b"././@LongLink", 9004, b"L") + padded(b"c" * 9000 + b".wav") + header(b"c", 9),
        "damaged: a name of 9004 characters",
    ),
    "sparse map": (pax([b"GNU.sparse.map=a,b,c"]) + header(b"b.wav", 9), "cannot be read as a tar"),
    "names without end": (
        (header(b"././@LongLink", 5, b"L") + padded(b"b.wav")) * 5000,
        "cannot be read as a tar",
    ),
    "bad checksum": (header(b"b.wav", 9)[:-1] + b"x", "damaged: no member begins at byte"),
    "noise": (b"\xff" * 512, "damaged: no member begins at byte"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tar_is_a_line_and_what_comes_before_is_used(kind, folder, tmp_path):
    bad, reason = HOSTILE[kind]
    place = tmp_path / "audio"
    place.mkdir()
    audio = (folder / "05.flac").read_bytes()
    good = header(b"a.flac", len(audio)) + padded(audio)
    (place / "0.tar").write_bytes(good + bad + padded(b"9 bytes..") + bytes(1024))
    manifest, skipped = scan(place, tmp_path / "cache")
    assert paths(manifest) == ["0.tar::a.flac"]
    assert CropDataset(manifest, place, 64)[0, 0].failures == []
    reasons = lines(skipped)
    if reason is None:
        assert reasons == {}
    else:
        assert reason in reasons["0.tar"]


def test_the_end_of_a_tar_may_lack_its_zeros(folder, tmp_path):
    place = tmp_path / "audio"
    place.mkdir()
    audio = (folder / "05.flac").read_bytes()
    (place / "0.tar").write_bytes(header(b"a.flac", len(audio)) + padded(audio))
    manifest, skipped = scan(place, tmp_path / "cache")
    assert len(manifest) == 1 and len(skipped) == 0


def test_shards_in_capitals_are_shards(folder, shards, tmp_path):
    place = tmp_path / "audio"
    place.mkdir()
    (place / "X.TAR").symlink_to(shards / "000001.tar")
    manifest, skipped = scan(place, tmp_path / "cache")
    assert paths(manifest) == ["X.TAR::04.aiff", "X.TAR::05.flac"] and len(skipped) == 0
    batch = CropDataset(manifest, place, 64).__getitems__([(0, 0), (0, 1)])
    assert batch.failures == []
    assert len(decode_once(manifest, place, tmp_path / "wav", progress=False)) == 2
