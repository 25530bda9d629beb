"""What audio there is: scans of folders and csv files, their cache, and the held-out split."""

import csv
import gc
import multiprocessing
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_jepa.data import (
    Manifest,
    SkippedFiles,
    read_csv,
    scan_folder,
    split_held_out,
)
from speechbrain_jepa.data import scan as scan_module
from speechbrain_jepa.data.listing import EXTENSIONS

RNG = np.random.default_rng(0)


def write(path, seconds=1.0, rate=16_000, channels=1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = round(seconds * rate)
    soundfile.write(path, 0.1 * RNG.standard_normal((samples, channels)), rate, **options)
    return path


def scan(folder, cache=None, **options):
    return scan_folder(folder, cache or folder.parent / "cache", progress=False, **options)


def paths(manifest):
    return [manifest.path(item) for item in range(len(manifest))]


def lines(skipped):
    with open(skipped.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [(row["file"], row["reason"]) for row in csv.DictReader(file)]


@pytest.fixture
def folder(tmp_path):
    """Five good files in a tree."""
    folder = tmp_path / "audio"
    for name in ("a.wav", "b.flac", "deep/down/c.ogg", "deep/d.aiff"):
        write(folder / name)
    write(folder / "deep/e.mp3", 2.0, 44_100, 2)
    return folder


@pytest.fixture
def headers_read(monkeypatch):
    """How often each file's header is read."""
    count = Counter()
    read_header = scan_module.read_header

    def counted(path):
        count[os.path.basename(path)] += 1
        return read_header(path)

    monkeypatch.setattr(scan_module, "read_header", counted)
    return count


def test_scan_finds_every_kind_of_file_in_a_tree(folder):
    manifest, skipped = scan(folder)
    assert paths(manifest) == ["a.wav", "b.flac", "deep/d.aiff", "deep/down/c.ogg", "deep/e.mp3"]
    assert manifest.seconds.tolist() == [1, 1, 1, 1, 2]
    assert manifest.sample_rate.tolist() == [16_000] * 4 + [44_100]
    assert manifest.start.tolist() == [0] * 5
    assert len(skipped) == 0


@pytest.mark.parametrize(
    "name", ["x.WAV", "x.Flac", "x.oga", "x.opus", "x.aif", "x.au", "x.caf", "x.w64", "x.rf64"]
)
def test_extensions_go_by_libsndfile_and_ignore_case(name, tmp_path):
    assert os.path.splitext(name)[1].lower() in EXTENSIONS
    formats = {".oga": "OGG", ".opus": "OGG", ".aif": "AIFF"}
    options = {"format": formats.get(os.path.splitext(name)[1])}
    if name.endswith("opus"):
        options["subtype"] = "OPUS"
    write(tmp_path / "audio" / name, rate=48_000, **options)
    manifest, _ = scan(tmp_path / "audio")
    assert paths(manifest) == [name]
    assert manifest.seconds[0] == 1


def test_links_are_followed_once_and_never_in_circles(folder):
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "also").symlink_to(folder / "deep" / "down")
    (folder / "self").symlink_to("self")
    (folder / "nowhere.wav").symlink_to("missing.wav")
    write(folder.parent / "elsewhere" / "f.wav")
    (folder / "other").symlink_to(folder.parent / "elsewhere")
    (folder / ".hidden").mkdir()
    write(folder / ".hidden" / "g.wav")
    manifest, skipped = scan(folder)
    found = ["a.wav", "b.flac", "deep/d.aiff", "deep/down/c.ogg", "deep/e.mp3", "other/f.wav"]
    assert paths(manifest) == found
    assert {file for file, _ in lines(skipped)} == {"self", "nowhere.wav"}


def test_names_with_spaces_accents_commas_and_foreign_bytes_survive(tmp_path):
    names = ["with space.wav", "ünïcode 音.wav", 'comma, "quote".wav', "new\nline.wav"]
    for name in names:
        write(tmp_path / "audio" / name)
    raw = os.path.join(os.fsencode(tmp_path), b"audio", b"latin-\xe9.wav")
    os.rename(tmp_path / "audio" / names[0], raw)
    (tmp_path / "audio" / "bad, ünï.wav").write_text("text")
    manifest, skipped = scan(tmp_path / "audio")
    assert set(paths(manifest)) == {*names[1:], os.fsdecode(b"latin-\xe9.wav")}
    assert [file for file, _ in lines(skipped)] == ["bad, ünï.wav"]
    assert paths(scan(tmp_path / "audio")[0]) == paths(manifest)


def test_an_unchanged_folder_is_not_read_again(folder, headers_read):
    (folder / "bad.wav").write_text("text")
    write(folder / "short.wav", 0.01)
    first, skipped = scan(folder)
    assert len(headers_read) == 7
    headers_read.clear()
    again, skipped_again = scan(folder)
    assert not headers_read
    assert paths(again) == paths(first)
    assert lines(skipped_again) == lines(skipped)


def test_only_new_and_changed_files_are_read_again(folder, headers_read):
    (folder / "bad.wav").write_text("text")
    write(folder / "short.wav", 0.01)
    scan(folder)
    headers_read.clear()
    write(folder / "a.wav", 3.0)
    write(folder / "new.wav")
    (folder / "b.flac").unlink()
    manifest, _ = scan(folder)
    assert set(headers_read) == {"a.wav", "new.wav"}
    assert "b.flac" not in paths(manifest)
    assert manifest.seconds[paths(manifest).index("a.wav")] == 3


def test_a_repaired_file_leaves_the_skipped_list(folder, headers_read):
    (folder / "bad.wav").write_text("text")
    _, skipped = scan(folder)
    assert [file for file, _ in lines(skipped)] == ["bad.wav"]
    write(folder / "bad.wav")
    manifest, skipped = scan(folder)
    assert headers_read["bad.wav"] == 2
    assert "bad.wav" in paths(manifest)
    assert lines(skipped) == []


def test_another_min_seconds_reads_no_header_again(folder, headers_read):
    scan(folder)
    headers_read.clear()
    manifest, skipped = scan(folder, min_seconds=1.5)
    assert not headers_read
    assert paths(manifest) == ["deep/e.mp3"]
    assert ("a.wav", "too short: 1.000 s, min_seconds=1.5") in lines(skipped)
    manifest, skipped = scan(folder)
    assert len(manifest) == 5 and not headers_read and len(skipped) == 0


def test_what_the_header_shows_is_skipped_with_its_reason(folder, caplog):
    (folder / "empty.wav").touch()
    (folder / "text.flac").write_text("not audio at all")
    write(folder / "ten_samples.wav", 10 / 16_000)
    write(folder / "slow.wav", 2, 500)
    for name in ("cut.wav", "cut.aiff", "cut.ogg"):
        path = write(folder / name, 5)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level("INFO"):
        manifest, skipped = scan(folder)
    assert len(manifest) == 5
    reasons = dict(lines(skipped))
    assert reasons["empty.wav"] == "empty"
    assert reasons["text.flac"].startswith("cannot be opened: ")
    assert reasons["ten_samples.wav"].startswith("too short: 0.001 s")
    assert reasons["slow.wav"].startswith("not audio: 500 Hz")
    assert reasons["cut.wav"] == "truncated: 79978 of 160000 bytes of samples"
    assert reasons["cut.aiff"].startswith("truncated: ")
    assert reasons["cut.ogg"] == "truncated: the Ogg stream ends inside a page"
    assert len(reasons) == 7
    assert "7 files skipped" in caplog.text


def test_a_wav_written_to_a_pipe_is_not_taken_for_truncated(folder):
    data = bytearray((folder / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # sizes unknown to a program writing to a pipe
    (folder / "piped.wav").write_bytes(data)
    manifest, _ = scan(folder)
    assert manifest.length[paths(manifest).index("piped.wav")] == 16_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_skipped(folder):
    (folder / "a.wav").chmod(0)
    (folder / "deep").chmod(0)
    try:
        manifest, skipped = scan(folder)
    finally:
        (folder / "deep").chmod(0o755)
    assert paths(manifest) == ["b.flac"]
    assert set(lines(skipped)) == {
        ("a.wav", "cannot be opened: Permission denied"),
        ("deep", "cannot be listed: Permission denied"),
    }


def test_what_cannot_be_scanned_is_said_at_once(tmp_path):
    (tmp_path / "file.wav").touch()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "read.me").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.wav").write_text("text")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"file\.wav is not a folder"):
        scan(tmp_path / "file.wav")
    with pytest.raises(ValueError, match=r"no audio file .*looked for .*\.flac .*\.mp3 .*\.wav"):
        scan(tmp_path / "documents")
    with pytest.raises(ValueError, match=r"none of the 1 audio files .*skipped\.csv"):
        scan(tmp_path / "bad")
    with pytest.raises(PermissionError, match=r"file\.wav/cache cannot be written to"):
        scan(tmp_path / "bad", tmp_path / "file.wav" / "cache")


# csv


def write_csv(path, header, *rows):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_csv_gives_segments_of_files(folder, tmp_path):
    table = write_csv(
        tmp_path / "train.csv",
        "ID, duration, wav, start, stop",
        "1, 1.0, $data_root/a.wav, ,",
        "2, 0.5, {data_root}/a.wav, 4000, 12000",
        f"3, 1.0, {folder}/b.flac, 8000, 8000",  # as in SpeechBrain: to the end
        "4, 1.0, deep/e.mp3, 44100, 999999",
        "5, 1.0, $data_root/missing.wav, ,",
        "6, 0.0, $data_root/a.wav, 100, 200",
    )
    manifest, skipped = read_csv(table, tmp_path / "cache", folder, progress=False)
    assert paths(manifest) == ["a.wav", "a.wav", "b.flac", "deep/e.mp3"]
    assert manifest.start.tolist() == [0, 4000, 8000, 44_100]
    assert manifest.length.tolist() == [16_000, 8000, 8000, 44_100]
    assert set(lines(skipped)) == {
        ("missing.wav", "cannot be opened: No such file or directory"),
        ("a.wav", "too short: 0.006 s, from sample 100 on, min_seconds=0.2"),
    }


def test_csv_works_with_a_relative_data_folder_and_reuses_headers(
    folder, tmp_path, monkeypatch, headers_read
):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "train.csv", "ID,duration,wav", "1,1,$data_root/a.wav")
    for _ in range(2):
        manifest, _ = read_csv(table, "cache", "audio", progress=False)
        assert paths(manifest) == ["a.wav"]
    write_csv(table, "ID,duration,wav", "1,1,$data_root/a.wav", "2,1,$data_root/b.flac")
    read_csv(table, "cache", "audio", progress=False)
    assert headers_read == {"a.wav": 1, "b.flac": 1}


def test_csv_without_data_folder_takes_paths_as_they_are(folder, tmp_path):
    table = write_csv(tmp_path / "train.csv", "ID,duration,wav", f"1,1,{folder}/a.wav")
    manifest, _ = read_csv(table, tmp_path / "cache", progress=False)
    assert paths(manifest) == [f"{folder}/a.wav"]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("ID,wav", "1,a.wav", r"train\.csv lacks the column duration"),
        ("ID,duration,wav,start", "1,1,a.wav,soon", r"train\.csv, line 2: start or stop: .*soon"),
        ("ID,duration,wav,start,stop", "1,1,a.wav,9,5", r"line 2: start=9, stop=5"),
        ("ID,duration,wav", "1,1,$data_root/a.wav", r"line 2: .* give --data_folder"),
        ("ID,duration,wav", "1,1,", r"line 2: the column wav is empty"),
        ("ID,duration,wav", "", r"train\.csv has no rows"),
    ],
)
def test_csv_errors_name_file_line_and_fix(header, row, message, tmp_path):
    table = write_csv(tmp_path / "train.csv", header, *([row] if row else []))
    with pytest.raises(ValueError, match=message):
        read_csv(table, tmp_path / "cache", progress=False)


def test_a_missing_csv_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist"):
        read_csv(tmp_path / "nowhere.csv", tmp_path / "cache")


# Manifest


def synthetic(rows, segments=1):
    names = [f"speaker-{row // 100:05d}/utterance-{row:07d}.flac" for row in range(rows)]
    return Manifest.from_rows(
        [
            (name, 8_000 * part, 8_000, 8_000, 8_000 * segments, 1, 1)
            for name in names
            for part in range(segments)
        ]
    )


def test_manifest_survives_disk_and_subsets(tmp_path):
    manifest = synthetic(50)
    manifest.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert paths(loaded) == paths(manifest)
    items = np.array([3, 49, 0, 3])
    subset = loaded.subset(items)
    assert paths(subset) == [manifest.path(item) for item in items]
    assert subset.seconds.tolist() == [1.0] * 4
    subset.save(tmp_path)  # over the files that `loaded` maps
    assert paths(loaded) == paths(manifest)
    assert paths(Manifest.load(tmp_path)) == paths(subset)


def _private_kib():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))


def _touch(manifest):
    gc.collect()  # marks every object, and so copies pages of the parent's heap
    before = _private_kib()
    total = sum(
        len(manifest.path(item)) + int(manifest.length[item]) for item in range(len(manifest))
    )
    return total, _private_kib() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_a_worker_shares_the_manifest_and_stays_flat(tmp_path):
    # 200 000 rows here; benchmarks/data.py measures two million
    rows = synthetic(2_000).subset(np.arange(200_000) % 2_000)
    rows.save(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert len(pickle.dumps(manifest)) < 500  # spawned workers get the folder, not the arrays
    expected = sum(len(manifest.path(item)) + 8_000 for item in range(len(manifest)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        total, private = pool.apply(_touch, (manifest,))
    assert total == expected
    assert private < 4096  # KiB; the paths alone as Python objects would be 20 MiB


# Split


def test_a_file_stays_on_its_side_when_others_come():
    few, many = synthetic(200), synthetic(1000)
    sides = []
    for manifest in (few, many):
        train, valid = split_held_out(manifest, valid_share=0.1)
        assert sorted([*train, *valid]) == list(range(len(manifest)))
        sides.append({manifest.path(item) for item in valid})
    assert 70 <= len(sides[1]) <= 130  # 0.1 of 1000, three deviations of a binomial
    assert sides[0] == sides[1] & set(paths(few))


def test_segments_of_a_file_are_never_divided():
    manifest = synthetic(100, segments=5)
    for max_valid in (1024, 12):
        train, valid = split_held_out(manifest, valid_share=0.2, max_valid=max_valid)
        assert not {manifest.path(i) for i in train} & {manifest.path(i) for i in valid}
        assert 0 < len(valid) <= max_valid


def test_both_sides_have_a_file_however_few_there_are():
    for rows in (2, 3, 5):
        for share in (0.001, 0.999):
            train, valid = split_held_out(synthetic(rows), valid_share=share)
            assert len(train) and len(valid)
    train, valid = split_held_out(synthetic(3), min_valid=10)
    assert (len(train), len(valid)) == (1, 2)
    with pytest.raises(ValueError, match="a single audio file cannot be split"):
        split_held_out(synthetic(1, segments=4))
    with pytest.raises(ValueError, match=r"valid_share=1\.5"):
        split_held_out(synthetic(3), valid_share=1.5)


def test_broken_files_are_not_held_out_when_they_can_be_looked_at(tmp_path):
    good = {"0.wav", "5.wav"}
    for number in range(8):
        path = write(tmp_path / "audio" / f"{number}.wav", subtype="FLOAT")
        if path.name not in good:
            soundfile.write(path, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    manifest, _ = scan(tmp_path / "audio")
    train, valid = split_held_out(manifest, 0.5, data_folder=tmp_path / "audio", min_valid=2)
    assert {manifest.path(item) for item in valid} <= good
    assert len(valid) and len(train) + len(valid) == 8


# skipped.csv


def test_skipped_lists_each_file_once_whoever_writes(tmp_path):
    path = tmp_path / "skipped.csv"
    one, other = SkippedFiles(path), SkippedFiles(path)
    assert one.add("a, b.wav", "cut, off")
    assert not other.add("a, b.wav", "cut, off")  # as another process of the run
    assert other.add("c.wav", "NaN")
    assert not SkippedFiles(path).add("c.wav", "lost sync")  # as a resumed run
    assert lines(one) == [("a, b.wav", "cut, off"), ("c.wav", "NaN")]
    assert len(one) == len(other) == 2
