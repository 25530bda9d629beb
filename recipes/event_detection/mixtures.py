"""Mixtures of short sounds with known onsets: a small data set for event detection.

    python mixtures.py out_folder --events percussion_folder --background effects_folder

The sounds of `percussion_folder/meta.csv` (file, label, split) are put at random places on top of
crops of the background clips. Sounds of a split are heard in that split's mixtures alone; so are
background clips, divided by their names. Written are `audio/*.flac`, 16 kHz, and `events.csv`
(file, onset, offset, label, split). The same seed gives the same files.

An event lasts from the first to the last moment at which its sound's envelope (10 ms RMS) is within
30 dB of its peak. Two events of one label do not overlap.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_jepa.data.clips import find_audio, read_audio
from speechbrain_jepa.data.crops import random_at
from speechbrain_jepa.data.skipped import csv_line
from speechbrain_jepa.evaluation.labelled import SPLITS, read_labelled
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import whole_file

FRAME = SAMPLE_RATE // 100
FLOOR = 10 ** (-30 / 20)  # of the envelope's peak: an event's edges
SHORTEST = 0.05  # seconds of an event
COUNTS = {"train": 300, "valid": 60, "test": 120}
BACKGROUND_SHARES = {"train": 0.6, "valid": 0.15, "test": 0.25}


def audible(wav: np.ndarray) -> tuple[int, int]:
    """First and last sample of a sound that are not much quieter than its loudest moment."""
    frames = wav[: len(wav) // FRAME * FRAME].reshape(-1, FRAME)
    envelope = np.sqrt((frames**2).mean(1))
    loud = np.flatnonzero(envelope > FLOOR * envelope.max())
    return loud[0] * FRAME, (loud[-1] + 1) * FRAME


def read_sounds(folder: Path) -> dict[str, list[tuple[np.ndarray, str]]]:
    """The labelled sounds of each split, cut to what is audible, their peak at 1."""
    clips = read_labelled(folder / "meta.csv")["label"]
    sounds: dict[str, list[tuple[np.ndarray, str]]] = {split: [] for split in SPLITS}
    for file, label, split in zip(clips.files, clips.labels, clips.splits):
        wav = read_audio(file).numpy()
        first, last = audible(wav)
        wav = wav[first:last]
        if len(wav) >= SHORTEST * SAMPLE_RATE:
            sounds[split].append((wav / np.abs(wav).max(), label))
    return sounds


def divide_background(folder: Path) -> dict[str, list[str]]:
    """Background files of each split, by a number that follows from their names."""
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    edges = np.cumsum(list(BACKGROUND_SHARES.values()))
    for file in find_audio(folder):
        place = zlib.crc32(Path(file).name.encode()) / 2**32
        files[SPLITS[int(np.searchsorted(edges[:-1], place, side="right"))]].append(file)
    return files


def mix(random: np.random.Generator, sounds, background: np.ndarray, seconds: float, most: int):
    """A mixture [samples] and its events: lists of (onset, offset, label) in samples."""
    samples = round(seconds * SAMPLE_RATE)
    start = int(random.integers(max(len(background) - samples, 0) + 1))
    wav = np.zeros(samples, np.float32)
    part = background[start : start + samples]
    wav[: len(part)] = part
    loudness = max(float(np.sqrt((wav**2).mean())), 1e-4)
    events: list[tuple[int, int, str]] = []
    for _ in range(int(random.integers(1, most + 1))):
        sound, label = sounds[random.integers(len(sounds))]
        sound = sound[: samples // 2]
        onset = int(random.integers(samples - len(sound) + 1))
        offset = onset + len(sound)
        if any(known == label and onset < end and begin < offset for begin, end, known in events):
            continue
        decibels = random.uniform(6, 20)  # its RMS over that of the background
        scale = loudness * 10 ** (decibels / 20) / np.sqrt((sound**2).mean())
        wav[onset:offset] += scale * sound
        events.append((onset, offset, label))
    return 0.9 * wav / max(np.abs(wav).max(), 1.0), sorted(events)


def make_mixtures(
    out: Path, events: Path, background: Path, seconds: float, most: int, seed: int
) -> Path:
    """Write all mixtures and their csv."""
    sounds, files = read_sounds(events), divide_background(background)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    lines = [csv_line("file", "onset", "offset", "label", "split")]
    for stream, (split, count) in enumerate(COUNTS.items()):
        for number in range(count):
            random = random_at(seed, stream, number)
            name = files[split][random.integers(len(files[split]))]
            wav, found = mix(random, sounds[split], read_audio(name).numpy(), seconds, most)
            file = f"audio/{split}_{number:04d}.flac"
            soundfile.write(out / file, wav, SAMPLE_RATE)
            lines += [
                csv_line(
                    file, *(f"{time / SAMPLE_RATE:.3f}" for time in event[:2]), event[2], split
                )
                for event in found
            ]
    with whole_file(out / "events.csv") as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return out / "events.csv"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mixtures of short sounds with known onsets.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--events", type=Path, required=True, help="folder with meta.csv")
    parser.add_argument("--background", type=Path, required=True, help="folder of audio")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a mixture")
    parser.add_argument("--most", type=int, default=6, help="events of a mixture")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make_mixtures(**vars(given)))
