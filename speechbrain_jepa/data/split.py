"""Which files are held out for validation, and which crops of them are used."""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_jepa.data.crops import CropDataset
from speechbrain_jepa.data.listing import NUM_THREADS
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.features import HOP_LENGTH, N_FFT, SAMPLE_RATE
from speechbrain_jepa.files import write_text

logger = logging.getLogger(__name__)

CROP_FRAMES = 208  # of 10 ms, where none are named
MIN_CROPS = 16  # of the validation set; with fewer, rank and deviation say little
LARGEST_SHARE = 0.2  # of the files, held out to reach it


def split_held_out(
    manifest: Manifest,
    valid_share: float = 0.02,
    max_valid: int = 1024,
    min_valid: int = 1,
    data_folder: str | os.PathLike | None = None,
    crop_frames: int | None = None,
    min_crops: int = MIN_CROPS,
    seed: int = 0,
    n_fft: int = N_FFT,
    verdicts: str | os.PathLike | None = None,
    num_threads: int = NUM_THREADS,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Set some files aside for validation, by a hash of their path.

    All segments of a file are on one side, and it stays there when others come or go. Only a corpus
    so small that `valid_share` of it holds fewer than `min_crops` crops gives more files, until
    those have as many, but no more than a fifth of its files.

    Arguments
    ---------
    manifest : Manifest
    valid_share : float
        Of the files. Default 0.02.
    max_valid : int
        Validation segments at most; files beyond are trained on. Default 1024.
    min_valid : int
        Validation files at least, as far as one is left for training. Default 1.
    data_folder : str, path, or None
        If given, the crops that validation draws (`CropDataset` of `cut_segments` of what is held
        out, `random_crops=False`) are read, so that it never rests on broken files: those are left
        to training, which replaces and reports them.
    crop_frames : int or None
        Of 10 ms. None (default): crops are not counted.
    min_crops : int
        Crops that do not overlap (`cut_segments`), at least. Default 16.
    seed, n_fft : int
        Of the validation crops (`CropDataset`). Default 0 and 400.
    verdicts : str, path, or None
        A json file of what was found, by path, size, modification time and place: with it, what
        was read once is not read again. None (default): nothing is kept.
    num_threads : int
        That read crops. Default 16.
    progress : bool
        Show a bar. Default False.

    Returns
    -------
    train, valid : array, int64
        Segment numbers, ascending, for `Manifest.subset`.

    Raises
    ------
    ValueError
        If there is only one file, or a number is out of its range.

    Example
    -------
    >>> rows = [(f"{name}.wav", 0, 8_000, 8_000, 8_000, 1, 1) for name in "abcdef"]
    >>> train, valid = split_held_out(Manifest.from_rows(rows), min_valid=2)
    >>> len(train), len(valid)
    (4, 2)
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share={valid_share}: must lie between 0 and 1")
    for name, value in {"max_valid": max_valid, "min_valid": min_valid}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    hashes = np.array([_hash(path) for path in manifest.raw_paths()], np.uint64)
    files, first, owner, segments = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    if len(files) < 2:
        raise ValueError(
            "a single audio file cannot be split into training and validation: give more files, "
            "or cut it in two"
        )
    # as many whole files as fit; the first one in any case
    fit = np.searchsorted(np.cumsum(segments), max_valid, side="right")
    wanted = min(np.searchsorted(files, np.uint64(valid_share * 2**64)), fit)
    most, crops = wanted, None
    if crop_frames is not None:
        most = max(wanted, min(fit, int(LARGEST_SHARE * len(files))))
        crops = np.bincount(owner.ravel(), _crops_that_fit(manifest, crop_frames))
    kept = _Verdicts(manifest, data_folder, crop_frames, min_crops, seed, n_fft, verdicts)
    while True:
        held_out: list[np.uint64] = []
        num_crops = 0
        for number, (file, item) in enumerate(zip(files, first)):
            enough = number >= wanted and len(held_out) >= min_valid
            enough = enough and (number >= most or num_crops >= min_crops)
            if enough or len(held_out) == len(files) - 1:
                break
            if not kept.is_broken(item):
                held_out.append(file)
                num_crops += 0 if crops is None else crops[number]
        if not held_out:
            raise ValueError(f"none of the {len(files)} files below {data_folder} can be decoded")
        is_valid = np.isin(hashes, held_out)
        if not kept.read(np.flatnonzero(is_valid), num_threads, progress):
            kept.save()
            return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)


def _hash(path: bytes) -> int:
    """64 bits: two of two million files share one with a chance of 1e-7, and are then on the same
    side."""
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big")


class _Verdicts:
    """Which files broke, and which validation crops could be read, when they were last looked at.

    A crop that broke speaks against its file, whatever crops are drawn of it later; one that could
    be read speaks for itself alone.
    """

    def __init__(self, manifest: Manifest, data_folder, crop_frames, min_crops, seed, n_fft, path):
        self.manifest = manifest
        self.data_folder = data_folder
        self.crop_frames = crop_frames
        self.min_crops = min_crops
        self.seed = seed
        self.n_fft = n_fft
        self.path = None if path is None else Path(path)
        self.good: set[tuple] = set()  # crops
        self.broken: dict[tuple, str] = {}  # files: reasons
        self.used: set[tuple] = set()
        if self.path is not None and self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                self.good = {tuple(crop) for crop in found["good"]}
                self.broken = {tuple(file): str(reason) for file, reason in found["broken"]}
            except (OSError, ValueError, LookupError, TypeError) as error:
                logger.warning("%s cannot be read (%s): held-out files are read anew", path, error)

    def is_broken(self, item: int) -> bool:
        return self.data_folder is not None and self._file(self.manifest, item) in self.broken

    def read(self, items: np.ndarray, num_threads: int, progress: bool) -> int:
        """Read the crops of these segments that were not read before; tells how many broke."""
        if self.data_folder is None:
            return 0
        pieces = self.manifest.subset(items)
        if self.crop_frames is not None:
            pieces = cut_segments(pieces, self.crop_frames, self.min_crops)
        frames = self.crop_frames or CROP_FRAMES
        drawn: dict = {"seed": self.seed, "n_fft": self.n_fft, "random_crops": False}
        dataset = CropDataset(pieces, self.data_folder, frames, **drawn)

        def crop(row: int) -> tuple:
            place = (int(pieces.start[row]), int(pieces.length[row]))
            return (*self._file(pieces, row), *place, frames, self.n_fft, self.seed, row)

        self.used = set(map(crop, range(len(pieces))))
        rows = [row for row in range(len(pieces)) if crop(row) not in self.good]
        broken = 0
        with ThreadPoolExecutor(num_threads) as pool:
            problems = pool.map(dataset.problem, rows)
            bar = tqdm(
                problems, "Held out", len(rows), unit=" crops", disable=not (rows and progress)
            )
            for row, problem in zip(rows, bar):
                if problem is None:
                    self.good.add(crop(row))
                else:
                    self.broken[self._file(pieces, row)] = problem
                    broken += 1
        return broken

    def save(self) -> None:
        """What is needed to find the same again."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {"good": sorted(self.used), "broken": sorted(self.broken.items())}
            write_text(self.path, json.dumps(found))

    @staticmethod
    def _file(manifest: Manifest, item: int) -> tuple:
        return manifest.path(item), int(manifest.size[item]), int(manifest.mtime_ns[item])


def cut_segments(manifest: Manifest, crop_frames: int, min_crops: int = MIN_CROPS) -> Manifest:
    """Cut the long segments of a small validation set into pieces, each of which gives a crop.

    Arguments
    ---------
    manifest : Manifest
    crop_frames : int
        Of 10 ms: the shortest piece.
    min_crops : int
        Pieces wanted. A segment is cut into as few equal ones as give so many in all, and no two
        crops overlap. Default 16.

    Returns
    -------
    Manifest
        With a row for each piece; the same one if it has `min_crops` rows.

    Example
    -------
    >>> rows = [("long.wav", 0, 60_000, 10_000, 60_000, 1, 1), ("b.wav", 0, 100, 10_000, 100, 1, 1)]
    >>> pieces = cut_segments(Manifest.from_rows(rows), crop_frames=150, min_crops=5)
    >>> pieces.start, pieces.length
    (array([    0, 15000, 30000, 45000,     0]), array([15000, 15000, 15000, 15000,   100]))
    """
    if len(manifest) >= min_crops:
        return manifest
    fit = _crops_that_fit(manifest, crop_frames)
    pieces = np.ones_like(fit)
    while pieces.sum() < min_crops and (pieces < fit).any():
        pieces = np.minimum(pieces + 1, fit)
    part = manifest.subset(np.repeat(np.arange(len(manifest)), pieces))
    number = np.concatenate([np.arange(count) for count in pieces])
    length = part.length // np.repeat(pieces, pieces)
    return replace(part, start=part.start + number * length, length=length)


def _crops_that_fit(manifest: Manifest, crop_frames: int) -> np.ndarray:
    """Into each segment without overlap, at least one."""
    frames = manifest.seconds * (SAMPLE_RATE / HOP_LENGTH)
    return np.maximum(frames // crop_frames, 1).astype(np.int64)
