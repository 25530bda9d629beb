"""Files to scan, and what a scan found."""

import csv

import numpy as np
import soundfile

from speechbrain_jepa.data import Manifest, scan_folder

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


def synthetic(rows, segments=1):
    names = [f"speaker-{row // 100:05d}/utterance-{row:07d}.flac" for row in range(rows)]
    return Manifest.from_rows(
        [
            (name, 8_000 * part, 8_000, 8_000, 8_000 * segments, 1, 1)
            for name in names
            for part in range(segments)
        ]
    )
