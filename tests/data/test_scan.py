"""What audio there is: scans of folders and the cache folder they are kept in."""

import contextlib
import json
import multiprocessing
import os
import re
import threading
import time

import numpy as np
import pytest
from scans import lines, paths, scan, write

from speechbrain_jepa import files
from speechbrain_jepa.data import listing
from speechbrain_jepa.data.listing import EXTENSIONS, list_audio


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


def test_of_two_links_to_one_folder_the_same_one_counts_every_time(folder):
    """The folders are listed in threads; a link deep in the tree is followed first."""
    write(folder.parent / "elsewhere" / "f.wav")
    for place in ("z", "deep/b", "deep/a", "deep/down/z"):
        (folder / place).symlink_to(folder.parent / "elsewhere")
    for _ in range(5):
        found, _ = list_audio(str(folder))
        assert [path for path, *_ in found][-1] == "deep/e.mp3"
        assert "deep/down/z/f.wav" in [path for path, *_ in found] and len(found) == 6


def test_files_are_looked_at_in_threads(tmp_path, monkeypatch):
    """As on a network share, where each look is a wait."""
    for number in range(1_024):
        (tmp_path / f"{number}.wav").touch()
    look, threads = os.stat, set()

    def slow(path, *args, **options):
        threads.add(threading.get_ident())
        time.sleep(1e-4)
        return look(path, *args, **options)

    monkeypatch.setattr(listing.os, "stat", slow)
    found, problems = list_audio(str(tmp_path), num_threads=4)
    assert len(found) == 1_024 and problems == [] and len(threads) == 4


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


# The cache folder: killed, damaged, shared


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_state(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


DAMAGES = {
    "half written": ("manifest.json", truncate),
    "empty": ("manifest.json", lambda path: path.write_text("")),
    "a list": ("manifest.json", lambda path: path.write_text("[1]")),
    "deep": ("manifest.json", lambda path: path.write_text("[" * 100_000)),
    "no text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\0")),
    "unused is no list": ("manifest.json", with_state(unused=7)),
    "unused is odd": ("manifest.json", with_state(unused=[["a", 1]])),
    "unused is null": ("manifest.json", with_state(unused=[[["a", None, 1], "bad"]])),
    "unused is infinite": ("manifest.json", with_state(unused=[[["a", 1, 1], [float("inf"), 1]]])),
    "no array": ("length.npy", lambda path: path.unlink()),
    "half an array": ("length.npy", truncate),
    "an empty array": ("length.npy", lambda path: path.write_bytes(b"")),
    "floats": ("length.npy", lambda path: np.save(path, np.load(path).astype(float))),
    "two dimensions": ("length.npy", lambda path: np.save(path, np.load(path)[None])),
    "too few rows": ("length.npy", lambda path: np.save(path, np.load(path)[1:])),
    "paths cut off": ("path_bytes.npy", lambda path: np.save(path, np.load(path)[3:])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_scan_is_made_anew(damage, folder):
    write(folder / "short.wav", 0.01)  # so that there is an unused header
    first, skipped = scan(folder)
    expected, reasons = paths(first), lines(skipped)
    name, break_it = DAMAGES[damage]
    break_it(folder.parent / "cache" / name)
    manifest, skipped = scan(folder)
    assert paths(manifest) == expected and lines(skipped) == reasons
    manifest, _ = scan(folder)
    assert paths(manifest) == expected


def test_a_scan_killed_while_it_saves_is_made_anew(folder, monkeypatch, headers_read):
    """At each of the files it writes."""
    expected = None
    for stop_at in range(1, 13):
        write(folder / "b.flac", 1 + stop_at / 10)  # the folder has changed: there is work
        count = 0

        def killed(path, sync=files.sync):
            nonlocal count
            count += 1
            if count == stop_at:  # noqa: B023
                raise KeyboardInterrupt
            sync(path)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(files, "sync", killed)
            scan(folder)
        manifest, _ = scan(folder)
        expected = expected or paths(manifest)
        assert paths(manifest) == expected
        item = expected.index("b.flac")
        assert manifest.seconds[item] == pytest.approx(1 + stop_at / 10)
    assert count == 12  # the holder of the lock, skipped.csv, nine arrays, manifest.json


def test_a_full_disk_while_scanning_is_one_sentence(folder, small_disk):
    (small_disk / "filler").write_bytes(bytes(2**20 - 3 * 2**12))
    with pytest.raises(OSError, match=r"the disk of .*cache is full .*: free some space, or"):
        scan(folder, small_disk / "cache")
    (small_disk / "filler").unlink()
    manifest, _ = scan(folder, small_disk / "cache")
    assert len(manifest) == 5
    assert not list((small_disk / "cache").glob(".partial-*"))


def _start(folder, cache):
    return paths(scan(folder, cache)[0])


def test_two_starts_on_one_cache_folder_give_one_result(folder):
    for number in range(200):
        os.link(folder / "a.wav", folder / f"{number}.wav")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        starts = [pool.apply_async(_start, (folder, folder.parent / "cache")) for _ in range(9)]
        results = [start.get(60) for start in starts]
    assert results == [paths(scan(folder)[0])] * 9


def test_a_scan_waits_for_another_and_finds_its_result(folder, headers_read):
    threads, results = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: results.append(scan(folder)[0])))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert [paths(manifest) for manifest in results] == [paths(results[0])] * 4
    assert set(headers_read.values()) == {1}


def test_long_mp3_files_are_said_to_cost_what_they_cost(folder, caplog):
    scan(folder)
    assert "mp3" not in caplog.text
    write(folder / "deep/speech.MP3", 400.0)
    write(folder / "long.flac", 400.0)
    with caplog.at_level("WARNING"):
        scan(folder)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "1 of 7 segments are mp3 of more than 5 minutes (0.1 of 0.2 hours): a crop in the middle "
        "of the longest, 7 minutes, takes "
    )
    far, near = re.search(
        r"takes (\d+) ms to read, at its beginning (\d+\.\d) ms", message
    ).groups()
    assert float(far) > float(near) > 0 and "speechbrain_jepa.prepare" in message
    caplog.clear()
    scan(folder)
    assert not caplog.records  # nothing has changed
