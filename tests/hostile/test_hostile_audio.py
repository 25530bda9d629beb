"""Hundreds of damaged files of every kind, made here, through everything that reads audio."""

import csv
import os
import resource
import signal
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_jepa.data import (
    CropDataset,
    cut_segments,
    decode_once,
    scan_folder,
    split_held_out,
)
from speechbrain_jepa.data.clips import find_audio, read_clips
from speechbrain_jepa.features import LogMelSpectrogram

FRAMES = 32
KINDS = {  # name: Hz, format and subtype
    "pcm.wav": (16_000, "WAV", "PCM_16"),
    "float.wav": (16_000, "WAV", "FLOAT"),
    "double.wav": (44_100, "WAV", "DOUBLE"),
    "adpcm.wav": (16_000, "WAV", "MS_ADPCM"),
    "gsm.wav": (8_000, "WAV", "GSM610"),
    "nms.wav": (8_000, "WAV", "NMS_ADPCM_32"),
    "g721.au": (8_000, "AU", "G721_32"),
    "a.xi": (44_100, "XI", "DPCM_16"),
    "a.aiff": (22_050, "AIFF", "PCM_16"),
    "a.flac": (16_000, "FLAC", "PCM_16"),
    "a.ogg": (22_050, "OGG", "VORBIS"),
    "a.opus": (48_000, "OGG", "OPUS"),
    "a.mp3": (44_100, "MP3", "MPEG_LAYER_III"),
    "a.caf": (16_000, "CAF", "PCM_16"),
    "a.w64": (16_000, "W64", "PCM_16"),
}
COPIES = 20


@pytest.fixture
def bounded():
    """Neither hangs nor takes memory without bounds: 120 s, 2 GiB beyond what is there now."""

    def too_long(*_):
        raise TimeoutError("reading hostile files did not end in 120 s")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(data, random):
    """Cut off, bytes zeroed, doubled or set to extremes, bits flipped in the header or anywhere."""
    data, way = bytearray(data), random.integers(7)
    place = int(random.integers(len(data)))
    if way == 0:
        return bytes(data[:place])
    if way == 1:
        return bytes(data[:place] + data[place // 2 :])
    if way == 2:
        data[place : place + 400] = bytes(len(data[place : place + 400]))
    elif way == 3:
        place = int(random.integers(60))
        data[place : place + 4] = random.choice([b"\xff\xff\xff\x7f", b"\xff" * 4, bytes(4)])
    else:
        end = 100 if way < 6 else len(data)
        for place in random.integers(end, size=int(random.integers(1, 6))):
            data[place] ^= 1 << int(random.integers(8))
    return bytes(data)


def make(folder, copies):
    """Three good files and `copies` bad ones of each kind; returns how many files."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        soundfile.write(folder / f"good {number}.wav", random.normal(0, 0.1, 16_000), 16_000)
    for name, (rate, kind, subtype) in KINDS.items():
        path = folder / name
        wav = random.normal(0, 0.1, rate)
        soundfile.write(path, wav, rate, format=kind, subtype=subtype)
        data = path.read_bytes()
        path.unlink()
        for number in range(copies):
            (folder / f"bad {number} {name}").write_bytes(damaged(data, random))
    for number, value in enumerate((1e11, 1e19, 1e30, 3e38, np.inf, np.nan)):
        wav = random.normal(0, 0.1, 16_000)
        wav[::1000] = value
        soundfile.write(folder / f"bad sample {number}.wav", wav, 16_000, subtype="FLOAT")
    os.mkfifo(folder / "bad pipe.wav")
    os.mkfifo(folder / "bad pipe.tar")
    (folder / "bad link.wav").symlink_to("/dev/zero")
    (folder / "bad tar.TAR").write_bytes(random.bytes(5000))
    return len(os.listdir(folder))


def test_hostile_files_are_skipped_or_read_and_nothing_ends(tmp_path, bounded):
    folder, cache = tmp_path / "audio", tmp_path / "cache"
    total = make(folder, COPIES)
    manifest, skipped = scan_folder(folder, cache, progress=False)
    assert len(manifest) >= 9  # the good ones, and samples that only decoding shows
    assert len(manifest) + len(skipped) == total
    train, valid = split_held_out(
        manifest, min_valid=3, data_folder=folder, crop_frames=FRAMES, max_valid=16
    )
    pieces = cut_segments(manifest.subset(valid), FRAMES)
    held_out = CropDataset(pieces, folder, FRAMES, random_crops=False)
    batch = held_out.__getitems__([(0, item) for item in range(len(pieces))])
    assert batch.failures == []  # validation does not rest on bad files

    training = CropDataset(manifest.subset(train), folder, FRAMES)
    log_mel = LogMelSpectrogram()
    for epoch in range(2):
        batch = training.__getitems__([(epoch, item) for item in range(len(train))])
        for path, reason in batch.failures:
            assert reason and "\n" not in reason
            assert skipped.add(path, reason)
        assert log_mel(batch.wav, margins=True).isfinite().all()

    copies = decode_once(manifest, folder, tmp_path / "wav", skipped, progress=False)
    for item in range(len(copies)):
        wav, rate = soundfile.read(copies.path(item), dtype="float32")
        assert rate == 16_000 and np.abs(wav).max() <= 2e10  # the filter overshoots

    failures, done = [], []
    for clips in read_clips(find_audio(folder), on_failure=failures.append):
        assert clips.wav.isfinite().all()
        done += clips.files
    assert len(done) + len(failures) == total - 2  # all but the shards
    bad_samples = {os.path.basename(failure.path) for failure in failures}
    assert {f"bad sample {number}.wav" for number in range(6)} <= bad_samples

    with open(skipped.path, newline="", encoding="utf-8") as file:
        listed = Counter(row["file"] for row in csv.DictReader(file))
    assert max(listed.values()) == 1
    assert not any(name.startswith("good") for name in listed)
    assert {f"bad sample {number}.wav" for number in range(6)} <= set(listed)
