"""Segments from SpeechBrain's csv files, and what is said of bad ones."""

import pytest
from scans import lines, paths

from speechbrain_jepa.data import (
    read_csv,
)


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


def test_a_csv_with_a_byte_order_mark_is_read(folder, tmp_path):
    table = tmp_path / "train.csv"
    table.write_bytes("\ufeffID,duration,wav\r\n1,1,$data_root/a.wav\r\n".encode())  # as Excel's
    manifest, _ = read_csv(table, tmp_path / "cache", folder, progress=False)
    assert paths(manifest) == ["a.wav"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"1,1,a.wav,0\n2,1,a.wav,inf", r"line 3: start or stop: .*infinity"),
        (b"1,1,a.wav,1e999", r"line 2: start or stop: "),
        (b"1,1,a.wav,nan", r"line 2: start or stop: .*NaN"),
        (b"1,1,a.wav,0\n2,1,a\0.wav,0", r"line 3: holds a NUL byte: save it as csv in UTF-8"),
        (b"1,1,a.wav,0\n2,1,caf\xe9.wav,0", r"line 3: byte 0xe9 is not UTF-8: save it as csv"),
        (b"1,1," + b"a" * 200_000 + b",0", r"line 2: field larger than field limit"),
    ],
)
def test_what_is_no_csv_is_an_error_with_the_line(rows, message, folder, tmp_path):
    table = tmp_path / "train.csv"
    table.write_bytes(b"ID,duration,wav,start\n" + rows + b"\n")
    with pytest.raises(ValueError, match=r"train\.csv, " + message):
        read_csv(table, tmp_path / "cache", folder, progress=False)


def test_utf_16_is_an_error_with_the_line(folder, tmp_path):
    table = tmp_path / "train.csv"
    table.write_text("ID,duration,wav\n1,1,a.wav\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"train\.csv, line 1: holds a NUL byte.* not UTF-16"):
        read_csv(table, tmp_path / "cache", folder, progress=False)
