"""The demo corpus: labelled FLAC files made on the spot, for when there is no data folder."""

import csv
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_jepa.data.demo_sounds import PITCHED, SCENES, SOUNDS
from speechbrain_jepa.data.synthesis import Score, record
from speechbrain_jepa.data.workers import available_cpus
from speechbrain_jepa.features import SAMPLE_RATE

VERSION = 1  # of the recipe below: another number makes the corpus anew
STAMP = "demo.json"  # written last; says what the folder holds

CLIPS_PER_SOUND = 96
SPLITS = {"train": 0.58, "valid": 0.13, "test": 0.29}
INSTRUMENTS = {"train": 10, "valid": 3, "test": 6}  # per sound; no split shares one
SECONDS = (3.0, 4.6)

PITCHES = tuple(range(52, 72))  # MIDI notes E3 to B4: 165 to 494 Hz
LOWEST, HIGHEST = 50, 76  # of melodies, D3 to E5
MELODIES = ("rising", "falling", "wave", "trill", "leaps")
RHYTHMS = ("steady", "running", "roll", "gallop", "bursts")


@dataclass(frozen=True)
class Clip:
    """One row of meta.csv: a file, its split and its labels, empty where one does not apply."""

    file: str
    split: str
    sound: str
    pitch: str
    melody: str
    rhythm: str


def default_demo_folder() -> Path:
    """`speechbrain_jepa/demo-v1` in `$XDG_CACHE_HOME`, or in ~/.cache where that is not set.

    Example
    -------
    >>> default_demo_folder().parts[-2:]
    ('speechbrain_jepa', 'demo-v1')
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG specification: relative paths are to be ignored
        cache = Path.home() / ".cache"
    return cache / "speechbrain_jepa" / f"demo-v{VERSION}"


def make_demo_corpus(folder=None, clips_per_sound=CLIPS_PER_SOUND, seed=0, workers=None) -> Path:
    """Make the demo corpus, or find it made.

    Sixteen sound classes, from plucked strings to running water, in 16 kHz mono 16-bit FLAC files
    of 3 to 5 s, and `meta.csv` with the columns file, split and one per label set:

    - sound: which of the sixteen.
    - pitch: MIDI note of the clips that stay on one note.
    - melody: contour of the pitched clips that do not.
    - rhythm: pattern of the onsets, for every sound that has any.

    Valid and test clips are played on other instruments (timbre parameters) than train clips, and
    every clip has a room, a background noise and a level of its own. The same seed and size give
    the same corpus. The files are made in a temporary folder beside `folder`, which is renamed
    when it is complete, so an interrupted run leaves nothing that could be taken for a corpus.

    Arguments
    ---------
    folder : str or Path
        Where the corpus is or goes. Default: `default_demo_folder()`.
    clips_per_sound : int
        Default 96, which makes 1536 files, about 1.6 hours, 110 MB.
    seed : int
        Default 0.
    workers : int
        Threads. Default: the number of CPUs this process may use.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If `clips_per_sound` is too small to reach every split.
    FileExistsError
        If `folder` holds something that is not a demo corpus.

    Example
    -------
    >>> tmp = getfixture("tmp_path")
    >>> folder = make_demo_corpus(tmp / "demo", clips_per_sound=8)
    >>> (folder / "meta.csv").read_text().splitlines()[0]
    'file,split,sound,pitch,melody,rhythm'
    >>> len(list(folder.glob("*/*.flac")))
    128
    """
    folder = Path(folder or default_demo_folder()).expanduser().absolute()
    if clips_per_sound < 8:
        raise ValueError(f"clips_per_sound={clips_per_sound} leaves a split empty: use 8 or more")
    stamp = {"version": VERSION, "seed": seed, "clips_per_sound": clips_per_sound}
    if _is_complete(folder, stamp):
        return folder
    if folder.exists() and not (folder / STAMP).is_file() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and holds no {STAMP} of a demo corpus: "
            "name another folder, or remove it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial_folder = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}.partial")
    try:
        partial_folder.mkdir()
        _write_corpus(partial_folder, stamp, workers)
        _move_into_place(partial_folder, folder, stamp)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return folder


def _is_complete(folder: Path, stamp: dict) -> bool:
    """Whether the folder holds exactly this corpus, every file of it."""
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or {key: found.get(key) for key in stamp} != stamp:
        return False
    return found.get("files") == sum(1 for _ in folder.glob("*/*.flac"))


def _remove_leftovers(folder: Path, older_than: float = 3600.0) -> None:
    """Temporary folders of runs that were killed; a young one may be another process at work."""
    for leftover in folder.parent.glob(f".{folder.name}-{'[0-9a-f]' * 32}.partial"):
        with suppress(FileNotFoundError):  # that process may have finished meanwhile
            if time.time() - leftover.stat().st_mtime > older_than:
                shutil.rmtree(leftover, ignore_errors=True)


def _move_into_place(source: Path, folder: Path, stamp: dict) -> None:
    """Rename; what was there goes, unless another process has just finished the same corpus."""
    if (folder / STAMP).is_file() and not _is_complete(folder, stamp):
        replaced = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}.partial")
        folder.rename(replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    try:
        source.rename(folder)
    except OSError:
        if not _is_complete(folder, stamp):
            raise


def _write_corpus(folder: Path, stamp: dict, workers: int | None) -> None:
    plan = list(_plan(stamp["clips_per_sound"], np.random.default_rng(stamp["seed"])))
    for split in SPLITS:
        (folder / split).mkdir()
    write = partial(_write_clip, folder, stamp["seed"])
    with ThreadPoolExecutor(workers or available_cpus()) as pool:
        for _ in pool.map(write, range(len(plan)), plan):
            pass
    with open(folder / "meta.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(asdict(plan[0])), lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(clip) for clip in plan)
    (folder / STAMP).write_text(json.dumps({**stamp, "files": len(plan)}), encoding="utf-8")


def _deal(values, rng):
    """Endless values in random order, each as often as the others."""
    while True:
        yield from rng.permutation(values).tolist()


def _plan(clips_per_sound: int, rng) -> Iterator[Clip]:
    """The clips with their labels, balanced within every split."""
    ends = np.round(np.cumsum(list(SPLITS.values())) * clips_per_sound).astype(int)
    for split, count in zip(SPLITS, np.diff(ends, prepend=0)):
        pitches, melodies, rhythms = (_deal(x, rng) for x in (PITCHES, MELODIES, RHYTHMS))
        for sound in SOUNDS:
            for number in range(count):
                pitch = melody = rhythm = ""
                if sound in PITCHED and number % 2 == 0:
                    pitch = str(next(pitches))
                elif sound in PITCHED:
                    melody = next(melodies)
                if sound not in SCENES:
                    rhythm = next(rhythms)
                name = f"{split}/{sound}_{number:03d}.flac"
                yield Clip(name, split, sound, pitch, melody, rhythm)


def _write_clip(folder: Path, seed: int, number: int, clip: Clip) -> None:
    rng = np.random.default_rng([seed, number])
    sound = list(SOUNDS).index(clip.sound)
    split = list(SPLITS).index(clip.split)
    which = int(rng.integers(INSTRUMENTS[clip.split]))
    instrument = np.random.default_rng([seed, sound, split, which])
    score = _score(clip, rng)
    wav = record(SOUNDS[clip.sound](score, instrument, rng), rng)
    soundfile.write(folder / clip.file, wav, SAMPLE_RATE, "PCM_16")


def _score(clip: Clip, rng) -> Score:
    """Notes in the clip's rhythm and at its pitches."""
    seconds = rng.uniform(*SECONDS)
    gaps = _gaps(clip.rhythm or "steady", rng)
    starts = [rng.uniform(0.02, 0.4)]
    for gap in gaps:
        if starts[-1] + gap > seconds - 0.1:
            break
        starts.append(starts[-1] + gap)
    onsets = np.array(starts)
    room = np.diff(onsets, append=seconds)
    lengths = np.minimum(room * rng.uniform(0.5, 0.95), rng.uniform(0.1, 0.5))
    onsets[1:] += rng.normal(0, 0.008, len(onsets) - 1).clip(-0.015, 0.015)
    if clip.pitch:
        notes = np.full(len(onsets), float(clip.pitch))
    else:
        contour = _contour(clip.melody or "wave", len(onsets), rng)
        contour -= contour.min()
        notes = contour + rng.uniform(LOWEST, HIGHEST - contour.max())
    return Score(
        samples=int(seconds * SAMPLE_RATE),
        onsets=onsets,
        lengths=lengths,
        pitches=440.0 * 2 ** ((notes - 69) / 12),
        velocities=rng.uniform(0.55, 1.0, len(onsets)),
    )


def _gaps(rhythm: str, rng):
    """Endless seconds from each onset to the next."""
    if rhythm == "steady":
        pattern = [rng.uniform(0.38, 0.7)]
    elif rhythm == "running":
        pattern = [rng.uniform(0.14, 0.22)]
    elif rhythm == "roll":
        pattern = [rng.uniform(0.06, 0.085)]
    elif rhythm == "gallop":  # long, short, short
        pattern = rng.uniform(0.45, 0.8) * np.array([0.5, 0.25, 0.25])
    else:  # bursts: a few quick ones, then a rest
        pattern = [rng.uniform(0.08, 0.13)] * rng.integers(2, 5) + [rng.uniform(0.5, 0.9)]
    while True:
        yield from pattern


def _contour(melody: str, notes: int, rng) -> np.ndarray:
    """Semitones of a run of notes."""
    step = np.arange(notes)
    if melody in ("rising", "falling"):
        scale = step % rng.integers(5, 9) * rng.choice([1.0, 2.0, 3.0])
        return scale if melody == "rising" else -scale
    if melody == "wave":
        width = rng.integers(3, 6)
        return np.abs((step + rng.integers(width)) % (2 * width) - width) * rng.choice([1.0, 2.0])
    if melody == "trill":
        return step % 2 * rng.choice([1.0, 2.0])
    return step % 2 * rng.choice([7.0, 9.0, 12.0])  # leaps
