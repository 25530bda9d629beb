"""skipped.csv: one row for each file, whoever writes and whatever it is called."""

import csv
import os

import pytest

from speechbrain_jepa.data import (
    SkippedFiles,
)


def lines(skipped):
    with open(skipped.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [(row["file"], row["reason"]) for row in csv.DictReader(file)]


def test_skipped_lists_each_file_once_whoever_writes(tmp_path):
    path = tmp_path / "skipped.csv"
    one, other = SkippedFiles(path), SkippedFiles(path)
    assert one.add("a, b.wav", "cut, off")
    assert not other.add("a, b.wav", "cut, off")  # as another process of the run
    assert other.add("c.wav", "NaN")
    assert not SkippedFiles(path).add("c.wav", "lost sync")  # as a resumed run
    assert lines(one) == [("a, b.wav", "cut, off"), ("c.wav", "NaN")]
    assert len(one) == len(other) == 2


NAMES = [
    "return\r.wav",
    "both\r\n.wav",
    "line\n.wav",
    'quote".wav',
    "comma, .wav",
    os.fsdecode(b"latin-\xe9\r.wav"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_row_whatever_is_in_it(name, tmp_path):
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    assert skipped.add(name, "bad") and not skipped.add(name, "bad")
    assert skipped.add("next.wav", "bad")
    assert lines(skipped) == [(name, "bad"), ("next.wav", "bad")]
    assert lines(SkippedFiles.write(tmp_path / "again.csv", lines(skipped))) == lines(skipped)
    assert len(SkippedFiles(skipped.path)) == 2


def test_a_damaged_list_is_gone_on_with(tmp_path):
    path = tmp_path / "skipped.csv"
    path.write_text('file,reason\na.wav,bad\n"' + "b" * 200_000 + "\n")  # csv's limit is 131 072
    skipped = SkippedFiles(path)
    assert len(skipped) == 1
    assert not skipped.add("a.wav", "bad") and skipped.add("c.wav", "bad")


def test_a_full_disk_is_one_sentence(small_disk):
    skipped = SkippedFiles(small_disk / "skipped.csv")
    with pytest.raises(OSError, match=r"the disk of .*disk is full .*: free some space"):
        skipped.add("a.wav", "bad" * 2**20)
