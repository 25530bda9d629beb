"""A folder of audio, and a count of the headers that a scan reads."""

import os
from collections import Counter

import pytest
from scans import write

from speechbrain_jepa.data import scan as scan_module


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
