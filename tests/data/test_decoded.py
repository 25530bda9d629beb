import os
import threading

import numpy as np
import pytest
import soundfile

from speechbrain_jepa.data import SkippedFiles, decode_once, read_csv, scan_folder
from speechbrain_jepa.data.crops import read_crop

FRAMES = 64


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    audio = tmp_path / "audio"
    audio.mkdir()
    soundfile.write(audio / "stereo.flac", rng.normal(0, 0.1, (30_000, 2)), 16_000)
    soundfile.write(audio / "cd.wav", rng.normal(0, 0.1, 66_150), 44_100)
    (audio / "deep").mkdir()
    soundfile.write(audio / "deep" / "phone.ogg", rng.normal(0, 0.1, 12_000), 8_000)
    return audio


def decoded(folder, skipped=None):
    cache = folder.parent / "cache"
    manifest, _ = scan_folder(folder, cache, progress=False)
    return manifest, decode_once(manifest, folder, cache / "decoded", skipped, progress=False)


def crop(manifest, item, root=""):
    path = os.path.join(root, manifest.path(item))
    segment = (manifest.sample_rate[item], manifest.start[item], manifest.length[item])
    return read_crop(path, 10, FRAMES, *map(int, segment))


def test_a_crop_of_the_decoded_file_is_a_crop_of_the_file(folder):
    original, copies = decoded(folder)
    assert len(original) == len(copies) == 3
    for item in range(3):
        np.testing.assert_allclose(
            crop(copies, item), crop(original, item, folder), rtol=1e-5, atol=1e-6
        )


def test_what_is_decoded_is_kept_until_the_file_changes(folder):
    _, before = decoded(folder)
    stamps = [os.stat(before.path(item)).st_ino for item in range(3)]
    soundfile.write(folder / "cd.wav", np.zeros(44_100), 44_100)
    _, after = decoded(folder)
    assert sorted(after.length) != sorted(before.length)
    kept = {os.stat(after.path(item)).st_ino for item in range(3)} & set(stamps)
    assert len(kept) == 2


def test_what_cannot_be_decoded_is_left_out_and_told(folder):
    manifest, _ = scan_folder(folder, folder.parent / "cache", progress=False)
    content = (folder / "stereo.flac").read_bytes()
    (folder / "stereo.flac").write_bytes(content[:200] + bytes(len(content) - 200))
    skipped = SkippedFiles(folder.parent / "skipped.csv")
    copies = decode_once(manifest, folder, folder.parent / "wav", skipped, progress=False)
    assert len(copies) == 2
    assert "stereo.flac" in (folder.parent / "skipped.csv").read_text()


def test_two_segments_of_one_file_are_two_files(folder):
    table = folder.parent / "train.csv"
    table.write_text(
        "ID,duration,wav,start,stop\n"
        "a,1,cd.wav,0,44100\n"
        "b,0.5,cd.wav,0,22050\n"
        "c,0.5,cd.wav,22050,44100\n"
    )
    manifest, _ = read_csv(table, folder.parent / "csv_cache", data_folder=folder)
    copies = decode_once(manifest, folder, folder.parent / "wav", progress=False)
    assert list(copies.length) == [16_000, 8_000, 8_000]
    whole = soundfile.read(copies.path(0), dtype="float32")[0]
    inner = soundfile.read(copies.path(2), dtype="float32")[0]
    np.testing.assert_allclose(inner[100:-100], whole[8_100:-100], atol=2e-3)


def test_nothing_to_decode_is_an_error(folder):
    manifest, _ = scan_folder(folder, folder.parent / "cache", progress=False)
    for file in folder.rglob("*.*"):
        file.unlink()
    with pytest.raises(ValueError, match="none of the 3 files"):
        decode_once(manifest, folder, folder.parent / "wav", progress=False)


@pytest.mark.parametrize(
    "name",
    ["a" * 249 + ".wav", os.fsdecode(b"latin-\xe9 \r.wav"), "音" * 80 + ".wav", "-~ %'\".wav"],
)
def test_any_name_is_decoded_once(name, folder):
    os.rename(folder / "cd.wav", folder / name)
    original, copies = decoded(folder)
    assert len(original) == len(copies) == 3
    for item in range(3):
        np.testing.assert_allclose(
            crop(copies, item), crop(original, item, folder), rtol=1e-5, atol=1e-6
        )
        os.path.basename(copies.path(item)).encode("ascii")
    _, again = decoded(folder)
    assert [again.path(item) for item in range(3)] == [copies.path(item) for item in range(3)]


def test_files_of_the_same_name_are_told_apart(folder):
    soundfile.write(folder / "deep" / "cd.wav", np.zeros(16_000), 16_000)
    _, copies = decoded(folder)
    assert len({copies.path(item) for item in range(4)}) == 4


def test_what_a_killed_decoding_left_is_removed_and_decoded_again(folder):
    _, copies = decoded(folder)
    place = os.path.dirname(copies.path(0))
    with open(os.path.join(place, ".partial-0123456789ab.wav"), "wb") as file:
        file.write(b"half")
    for item, content in enumerate((b"", b"RIFF", None)):  # as after a power cut
        stamp = os.stat(copies.path(item))
        with open(copies.path(item), "r+b") as file:
            file.truncate(stamp.st_size // 2 if content is None else len(content))
        os.utime(copies.path(item), ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    original, again = decoded(folder)
    assert not [name for name in os.listdir(place) if name.startswith(".partial")]
    for item in range(3):
        np.testing.assert_allclose(
            crop(again, item), crop(original, item, folder), rtol=1e-5, atol=1e-6
        )


def test_two_starts_decode_into_one_folder(folder):
    manifest, _ = scan_folder(folder, folder.parent / "cache", progress=False)
    results = []

    def start():
        results.append(decode_once(manifest, folder, folder.parent / "wav", progress=False))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [list(result.length) for result in results] == [list(results[0].length)] * 3
    assert len([name for name in os.listdir(folder.parent / "wav") if name.endswith("wav")]) == 3


def test_a_full_disk_while_decoding_is_one_sentence(folder, small_disk):
    soundfile.write(folder / "long.flac", np.zeros(640_000), 16_000)
    manifest, _ = scan_folder(folder, folder.parent / "cache", progress=False)
    with pytest.raises(OSError, match=r"the disk of .*wav is full .*: free some space, or"):
        decode_once(manifest, folder, small_disk / "wav", progress=False)
    left = [name for name in os.listdir(small_disk / "wav") if name.startswith(".partial")]
    assert left == []
