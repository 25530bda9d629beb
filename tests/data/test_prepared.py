"""A corpus decoded once into tar shards: by many machines, killed at any moment, read unscanned."""

import contextlib
import json
import os
import re
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from scans import paths, scan, write

from speechbrain_jepa import files
from speechbrain_jepa.data import CropDataset, decode_once, read_csv, shards
from speechbrain_jepa.data import decoded as decoded_module
from speechbrain_jepa.data import scan as scan_module
from speechbrain_jepa.data.crops import read_segment
from speechbrain_jepa.data.decoded import segment_blocks
from speechbrain_jepa.data.shares import Share, missing_shares
from speechbrain_jepa.prepare import main, prepare

STEP = 2**-15  # of 16 bits


@pytest.fixture
def corpus(tmp_path):
    """Eleven files in a tree, two of them in a tar, one of which cannot be decoded."""
    folder = tmp_path / "audio"
    for number in range(7):
        write(folder / f"{number % 3}" / f"{number}.flac", 1 + number / 10)
    write(folder / "cd.wav", 2.0, 44_100, 2)
    write(folder / "long.mp3", 3.0, 22_050)
    with tarfile.open(folder / "some.tar", "w") as tar:
        for name in ("a.flac", "deep/b.flac"):
            tar.add(write(tmp_path / name), name)
    soundfile.write(folder / "bad.wav", np.full(20_000, np.nan), 16_000, subtype="FLOAT")
    return folder


def prepared_in(out, corpus, **options):
    return prepare(out, corpus, progress=False, **{"num_threads": 2, "shard_bytes": 1, **options})


def whole(manifest, item, folder):
    place = (manifest.sample_rate[item], manifest.start[item], manifest.length[item])
    return read_segment(shards.join(folder, manifest.path(item)), *map(int, place))


def by_stem(manifest, folder):
    """Samples by the source's path without its ending."""
    names = (re.sub(r"^share-.*?::", "", path).replace("::", "/") for path in paths(manifest))
    stems = {os.path.splitext(name)[0]: item for item, name in enumerate(names)}
    return {stem: whole(manifest, item, folder) for stem, item in stems.items() if stem != "bad"}


@pytest.mark.parametrize(("kind", "tolerance"), [("flac", STEP), ("int16", STEP), ("float", 1e-6)])
def test_what_is_read_back_is_the_corpus_without_a_scan(
    kind, tolerance, corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    result = prepared_in(out, corpus, kind=kind, shard_bytes=60_000)
    assert (result.segments, result.skipped) == (11, 1)
    assert result.size == sum(file.stat().st_size for file in out.rglob("*.tar"))
    original = by_stem(scan(corpus)[0], corpus)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        patch.setattr(scan_module, "read_header", None)
        manifest, skipped = scan(out, tmp_path / "unscanned")
    assert set(manifest.sample_rate) == {16_000} and len(skipped) == 0
    found = by_stem(manifest, out)
    assert set(found) == set(original) and len(found) == 11
    for stem, wav in found.items():
        np.testing.assert_allclose(wav, original[stem], atol=tolerance)
    assert result.hours == pytest.approx(sum(map(len, found.values())) / 16_000 / 3600)
    # a scan of the tars themselves comes to the same
    for index in out.rglob("*.index.json"):
        index.unlink()
    scanned, _ = scan(out, tmp_path / "scanned")
    assert paths(scanned) == paths(manifest)
    for name in ("length", "sample_rate", "total", "offset", "size", "mtime_ns"):
        assert np.array_equal(getattr(scanned, name), getattr(manifest, name))


def test_shares_divide_the_corpus_and_are_checked(corpus, tmp_path, capsys, caplog, monkeypatch):
    out = tmp_path / "out"
    command = ["--data_folder", str(corpus), "--out", str(out), "--num_threads", "1"]
    with pytest.raises(SystemExit, match="holds no share of a prepared corpus"):
        main(["--out", str(out), "--check"])
    main([*command, "--shard", "0/3"])
    # under torchrun: a share for each process
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    main(command)
    with pytest.raises(SystemExit, match=r"of 3 shares 1 are missing or unfinished.* --shard 1/3$"):
        main(["--out", str(out), "--check"])
    scan(out, tmp_path / "partial")
    assert "prepared in 3 shares, of which 1 are missing or unfinished: 1/3" in caplog.text
    caplog.clear()
    main([*command, "--shard", "1/3"])
    main(["--out", str(out), "--check"])
    assert re.search(
        r"is complete: 11 segments, 0\.0 hours, .*; 1 files skipped", capsys.readouterr().out
    )
    manifest, _ = scan(out, tmp_path / "all")
    assert "missing" not in caplog.text
    stems = [re.sub(r".*::|\.\w+$", "", path) for path in paths(manifest)]
    assert len(stems) == len(set(stems)) == 11
    folders = {path.split("/")[0] for path in paths(manifest)}
    assert len(folders) == 3  # each has something
    (out / Share(0, 4).folder).mkdir()
    with pytest.raises(SystemExit, match="holds shares of 3 and of 4"):
        main(["--out", str(out), "--check"])


def contents(folder):
    """Bytes of every member of every tar."""
    found = {}
    for shard in folder.rglob("*.tar"):
        with tarfile.open(shard) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})
    return found


def test_a_preparation_killed_at_any_moment_goes_on(corpus, tmp_path, monkeypatch):
    out, reference = tmp_path / "out", tmp_path / "reference"
    prepared_in(reference, corpus)
    finished, kills = set(), 0
    for stop_at in range(3, 60, 4):
        count = 0

        def killed(path, sync=files.sync):
            nonlocal count
            count += 1
            if count == stop_at:  # noqa: B023
                raise KeyboardInterrupt
            sync(path)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(files, "sync", killed)
            prepared_in(out, corpus)
            break
        kills += 1
        assert [str(share) for share in missing_shares(out)] == ["0/1"]
        indexed = {re.sub(r"\.index\.json$", "", str(file)) for file in out.rglob("*.index.json")}
        now = {(name, os.stat(f"{name}.tar").st_ino) for name in indexed}
        assert finished <= now  # what is whole is not made again
        finished = now
    assert kills > 3 and missing_shares(out) == []
    assert contents(out) == contents(reference) and len(contents(out)) == 11
    assert not list(out.rglob(".partial-*"))


def test_a_shard_is_made_anew_where_its_source_has_changed(corpus, tmp_path):
    out = tmp_path / "out"
    prepared_in(out, corpus)
    before = {file.name: file.stat().st_ino for file in out.rglob("*.tar")}
    write(corpus / "1" / "1.flac", 5.0)
    (corpus / "2" / "2.flac").unlink()
    assert prepared_in(out, corpus).segments == 10
    after = {file.name: file.stat().st_ino for file in out.rglob("*.tar")}
    assert len(before.items() & after.items()) == 9  # a member in each
    manifest, _ = scan(out, tmp_path / "again")
    found = by_stem(manifest, out)
    assert len(found["1/1"]) == 80_000 and "2/2" not in found
    # nothing has changed: nothing is written
    prepared_in(out, corpus)
    assert {file.name: file.stat().st_ino for file in out.rglob("*.tar")} == after
    # another format: everything is
    prepared_in(out, corpus, kind="int16")
    assert {os.path.splitext(name)[1] for name in contents(out)} == {".wav"}


def test_segments_and_names_of_any_kind(tmp_path):
    folder = tmp_path / "audio"
    for name in ("a.wav", "a.flac", ".hidden/x.wav", "音 ü'.wav", "loud.wav"):
        write(folder / name, 2.0, subtype="PCM_16" if name.endswith("flac") else "FLOAT")
    loud = 3.0 * soundfile.read(folder / "loud.wav")[0] / 0.1
    soundfile.write(folder / "loud.wav", loud, 16_000, subtype="FLOAT")
    table = folder / "train.csv"
    names = ("a.wav", "a.flac", ".hidden/x.wav", "../audio/loud.wav", f"{folder}/音 ü'.wav")
    rows = [f"{number},2,{name},0,0" for number, name in enumerate(names)]
    rows += ["c1,1,a.wav,0,16000", "c2,1,a.wav,16000,32000"]
    table.write_text("\n".join(["ID,duration,wav,start,stop", *rows]))
    result = prepare(tmp_path / "out", folder, table, progress=False, num_threads=1)
    assert result.segments == 7 and result.skipped == 0
    manifest, _ = scan(tmp_path / "out", tmp_path / "cache")
    original, _ = read_csv(table, tmp_path / "csv", data_folder=folder, progress=False)
    assert len(manifest) == 7
    ours = sorted(tuple(whole(manifest, item, tmp_path / "out")[:99]) for item in range(7))
    theirs = sorted(tuple(whole(original, item, folder)[:99]) for item in range(7))
    np.testing.assert_allclose(ours, theirs, atol=STEP)
    kinds = {path for path in paths(manifest) if path.endswith(".wav")}
    assert len(kinds) == 1 and "loud" in kinds.pop()  # too loud for 16 bits
    assert {"a@0+16000.flac", "a@16000+16000.flac"} <= {
        path.split("::")[1] for path in paths(manifest)
    }


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.001, 0.9, 1.0, 2.0, 2.00005, 3.3])
def test_blocks_of_a_segment_are_the_segment(rate, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_module, "BLOCK_SECONDS", 0.5)
    path = write(tmp_path / "a.wav", 4.0, rate, 2, subtype="FLOAT")
    segment = (rate, 77, max(round(seconds * rate), 1))
    blocks = list(segment_blocks(path, *segment))
    np.testing.assert_allclose(np.concatenate(blocks), read_segment(path, *segment), atol=1e-6)
    assert max(map(len, blocks)) <= 0.5 * 16_000 + 640 and len(blocks) >= seconds / 0.55


@pytest.mark.parametrize("kind", ["int16", "flac"])
def test_a_small_corpus_is_decoded_once_in_16_bits(kind, corpus, tmp_path):
    (corpus / "bad.wav").unlink()
    tone = np.sin(np.arange(16_000) / 9)
    soundfile.write(corpus / "over.wav", 1.3 * tone, 16_000, subtype="FLOAT")
    soundfile.write(corpus / "loud.wav", 30_000 * tone, 16_000, subtype="FLOAT")
    manifest, _ = scan(corpus)
    copies = decode_once(manifest, corpus, tmp_path / "copies", progress=False, kind=kind)
    for item in range(len(manifest)):
        wav, name = whole(copies, item, ""), manifest.path(item)
        expected = whole(manifest, item, corpus)
        if name == "over.wav":  # what a decoder overshoots by is clipped, never turned round
            expected = expected.clip(-1, 1)
        np.testing.assert_allclose(wav, expected, atol=STEP)
        subtype = soundfile.info(copies.path(item)).subtype
        assert subtype == ("FLOAT" if name == "loud.wav" else "PCM_16")
    stamps = {copies.path(item): os.stat(copies.path(item)).st_ino for item in range(len(copies))}
    again = decode_once(manifest, corpus, tmp_path / "copies", progress=False, kind=kind)
    assert {again.path(item): os.stat(again.path(item)).st_ino for item in range(13)} == stamps
    with pytest.raises(ValueError, match="decode_once=mp3: give one of float, int16, flac"):
        decode_once(manifest, corpus, tmp_path / "copies", progress=False, kind="mp3")


def change(**changes):
    return lambda content: {**content, **changes}


DAMAGES = {
    "no json": lambda content: "{",
    "a list": lambda content: [1],
    "another version": change(format_version=99),
    "another tar": change(size=7),
    "no members": lambda content: {k: v for k, v in content.items() if k != "members"},
    "beyond the end": change(members=[["a.flac", 512, 10**9, 16_000]]),
    "negative": change(members=[["a.flac", -512, 100, 16_000]]),
    "fractions": change(members=[["a.flac", 512.5, 100, 16_000]]),
    "climbs": change(members=[["../a.flac", 512, 100, 16_000]]),
    "a long name": change(members=[["a" * 9_999, 512, 100, 16_000]]),
    "no name": change(members=[[7, 512, 100, 16_000]]),
    "no rate": change(sample_rate=None),
    "deep": lambda content: "[" * 100_000,
}


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    write(folder / "audio" / "a.wav", 2.0)
    prepare(folder / "out", folder / "audio", progress=False, num_threads=1)
    return folder / "out"


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_cannot_be_is_passed_over(damage, one_shard, tmp_path, caplog):
    (index,) = one_shard.rglob("*.index.json")
    text = index.read_text()
    try:
        content = DAMAGES[damage](json.loads(text))
        index.write_text(content if isinstance(content, str) else json.dumps(content))
        manifest, _ = scan(one_shard, tmp_path)
    finally:
        index.write_text(text)
    assert "index.json is passed over" in caplog.text
    assert paths(manifest) == ["share-00000-of-00001/000000.tar::a.flac"]
    assert manifest.length.tolist() == [32_000]


def test_an_index_that_lies_gives_a_bad_file_and_no_more(one_shard, tmp_path):
    (index,) = one_shard.rglob("*.index.json")
    text = index.read_text()
    content = json.loads(text)
    try:
        good, *_ = content["members"]
        content["members"] = [good, ["b.flac", 0, 400, 16_000], ["c.flac", *good[1:3], 10**12]]
        index.write_text(json.dumps(content))
        manifest, _ = scan(one_shard, tmp_path)
    finally:
        index.write_text(text)
    batch = CropDataset(manifest, one_shard, 64).__getitems__([(0, 0), (0, 1), (0, 2)])
    assert batch.item.tolist() == [0, 0, 0] and len(batch.failures) == 2
    assert torch.isfinite(batch.wav).all()


def test_what_makes_no_sense_is_one_sentence(corpus, tmp_path, small_disk):
    for shard in ("3", "3/3", "-1/3", "a/b", "1/0"):
        with pytest.raises(SystemExit, match=rf"prepare: shard={shard}: i/n is meant"):
            main(["--data_folder", str(corpus), "--out", str(tmp_path / "out"), f"--shard={shard}"])
    with pytest.raises(SystemExit, match="nothing to prepare: give --data_folder or --train_csv"):
        main(["--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="lies in --data_folder"):
        main(["--data_folder", str(corpus), "--out", str(corpus / "out")])
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["--data_folder", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    write(corpus / "long.flac", 60.0)
    with pytest.raises(SystemExit, match=r"prepare: .*the disk of .* is full"):
        main(["--data_folder", str(corpus), "--out", str(small_disk), "--num_threads", "1"])
