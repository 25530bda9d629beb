"""Labelled clips of a task: its manifest, who trains and who tests, and clips of one length.

A manifest is a CSV with the columns ID, wav, duration, label, split, fold. `wav` is relative to the
data folder; several labels of one clip are joined by `;`. Either every row has a split (train,
valid or test) or every row has a fold.
"""

import csv
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_jepa.data.clips import BATCH_SECONDS, read_clips
from speechbrain_jepa.data.crops import UnreadableAudio
from speechbrain_jepa.features import SAMPLE_RATE

COLUMNS = ("ID", "wav", "duration", "label", "split", "fold")
SPLITS = ("train", "valid", "test")
VALID_SHARE = 0.1  # of the training clips, where the data set names no validation clips
CROP, DRAW = 0, 1  # what random numbers are for: independent streams of one seed


@dataclass(frozen=True)
class Rows:
    """One division of the clips. Arrays of row numbers, ascending.

    Arguments
    ---------
    train, valid, test : array [n], int64
    fold : int or None
        The fold that tests.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    fold: int | None = None


@dataclass(frozen=True)
class LabelledClips:
    """The rows of a manifest.

    Arguments
    ---------
    ids, files, labels, splits : list of str
        `files` with the data folder in front; `labels` as in the manifest; `splits` may be empty.
    folds : list of int or None
    multilabel : bool
        A clip may have any number of labels. Default False.
    longest : float or None
        Seconds of the longest clip, where that is known.
    """

    ids: list[str]
    files: list[str]
    labels: list[str]
    splits: list[str]
    folds: list[int | None]
    multilabel: bool = False
    longest: float | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def classes(self) -> list[str]:
        """The labels, sorted: by value where all are numbers."""
        names = {name for label in self.labels for name in self._names(label)}
        numeric = all(name.lstrip("-").isdigit() for name in names)
        return sorted(names, key=int if numeric else None)

    @cached_property
    def targets(self) -> Tensor:
        """Class numbers [n], int64, or [n, classes], float32, with `multilabel`."""
        number = {name: index for index, name in enumerate(self.classes)}
        if not self.multilabel:
            return torch.tensor([number[label] for label in self.labels])
        targets = torch.zeros(len(self), len(number))
        for row, label in enumerate(self.labels):
            targets[row, [number[name] for name in self._names(label)]] = 1
        return targets

    def _names(self, label: str) -> list[str]:
        return [name for name in label.split(";") if name] if self.multilabel else [label]

    @property
    def has_folds(self) -> bool:
        """Whether the task is a cross-validation."""
        return self.folds[0] is not None

    @cached_property
    def train_rows(self) -> np.ndarray:
        """Rows that the log-mel normalisation may be measured on.

        In a cross-validation every clip trains in all folds but one. One pair is measured on all
        of them, so that each clip is embedded once and not once a fold: two numbers, no labels.
        """
        return np.flatnonzero([self.has_folds or split == "train" for split in self.splits])

    def divide(self, seed: int, usable: np.ndarray | None = None) -> list[Rows]:
        """Divisions into training, validation and test clips: one, or one a fold.

        Where the data set names no validation clips, a random tenth of the training clips
        validates, another one for each seed and fold.

        Arguments
        ---------
        seed : int
        usable : array [n], bool
            Rows that have embeddings. None: all.

        Returns
        -------
        list of Rows

        Raises
        ------
        ValueError
            If a part is left without clips.
        """
        usable = np.ones(len(self), bool) if usable is None else usable
        if self.has_folds:
            folds = np.array(self.folds)
            parts = [
                (fold, np.flatnonzero(usable & (folds != fold)), None, folds == fold)
                for fold in sorted(set(self.folds))
            ]
        else:
            splits = np.array(self.splits)
            valid = np.flatnonzero(usable & (splits == "valid"))
            named = valid if (splits == "valid").any() else None
            parts = [(None, np.flatnonzero(usable & (splits == "train")), named, splits == "test")]
        divisions = []
        for fold, train, valid, test in parts:
            if valid is None:
                order = _random(seed, DRAW, fold or 0).permutation(len(train))
                count = max(round(VALID_SHARE * len(train)), 1)
                valid, train = np.sort(train[order[:count]]), np.sort(train[order[count:]])
            rows = Rows(train, valid, np.flatnonzero(usable & test), fold)
            for name in SPLITS:
                if not len(getattr(rows, name)):
                    where = "" if fold is None else f" of fold {fold}"
                    raise ValueError(
                        f"no {name} clip{where} could be used: skipped.csv beside the embeddings "
                        "says why"
                    )
            divisions.append(rows)
        return divisions


def read_manifest(path, data_folder, multilabel: bool = False) -> LabelledClips:
    """Read a task's manifest.

    Arguments
    ---------
    path : str or Path
        The CSV (see above).
    data_folder : str or Path
        What `wav` is relative to.
    multilabel : bool
        Split labels at `;`. Default False.

    Returns
    -------
    LabelledClips

    Raises
    ------
    ValueError
        If a column is missing, a split has another name, train or test has no rows, rows with and
        without folds are mixed, or an ID occurs twice.

    Example
    -------
    >>> path = getfixture("tmp_path") / "manifest.csv"
    >>> rows = "a,a.wav,1.0,dog,train,\\nb,b.wav,1.0,cat,train,\\nc,c.wav,1.0,dog,test,\\n"
    >>> _ = path.write_text("ID,wav,duration,label,split,fold\\n" + rows)
    >>> clips = read_manifest(path, "/data")
    >>> clips.classes, clips.targets.tolist(), clips.files[0]
    (['cat', 'dog'], [1, 0, 1], '/data/a.wav')
    """
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing or not rows:
        raise ValueError(
            f"{path} has {'no column ' + ', '.join(missing) if missing else 'no rows'}: a manifest "
            f"has the columns {', '.join(COLUMNS)} and a row for each clip"
        )
    clips = LabelledClips(
        ids=[row["ID"] for row in rows],
        files=[str(Path(data_folder) / row["wav"]) for row in rows],
        labels=[row["label"] for row in rows],
        splits=[row["split"] for row in rows],
        folds=[int(row["fold"]) if row["fold"] else None for row in rows],
        multilabel=multilabel,
        longest=max(float(row["duration"]) for row in rows),
    )
    _check(path, clips)
    return clips


def _check(path, clips: LabelledClips) -> None:
    if len(set(clips.ids)) < len(clips):
        seen = set()
        twice = next(name for name in clips.ids if name in seen or seen.add(name))
        raise ValueError(f"{path}: the ID {twice!r} occurs twice")
    with_fold = sum(fold is not None for fold in clips.folds)
    if with_fold:
        if with_fold < len(clips):
            raise ValueError(
                f"{path}: {with_fold} of {len(clips)} rows have a fold: give all of them one, or a "
                "split"
            )
        if len(set(clips.folds)) < 2:
            raise ValueError(f"{path}: all rows are of fold {clips.folds[0]}: two are needed")
        return
    unknown = set(clips.splits) - set(SPLITS)
    if unknown:
        raise ValueError(f"{path}: split {unknown.pop()!r} is none of {', '.join(SPLITS)}")
    for split in ("train", "test"):
        if split not in clips.splits:
            raise ValueError(f"{path}: no row of split {split}")


def _random(seed: int, stream: int, place: int) -> np.random.Generator:
    """Random numbers that belong to a place, without state or history."""
    return np.random.Generator(
        np.random.Philox(key=[seed % 2**64, stream], counter=[0, place, 0, 0])
    )


def fixed_length(wav: Tensor, samples: int, draw: float = 0.0) -> Tensor:
    """A clip of exactly `samples` samples.

    Arguments
    ---------
    wav : Tensor [any]
    samples : int
    draw : float
        From 0 to below 1: which part of a longer clip is taken. Default 0, the first. A shorter
        one is followed by zeros.

    Returns
    -------
    Tensor [samples]

    Example
    -------
    >>> fixed_length(torch.tensor([1.0, 2.0, 3.0]), 2, draw=0.99), fixed_length(torch.ones(1), 2)
    (tensor([2., 3.]), tensor([1., 0.]))
    """
    if len(wav) <= samples:
        return torch.nn.functional.pad(wav, (0, samples - len(wav)))
    start = int(draw * (len(wav) - samples + 1))
    return wav[start : start + samples]


def read_fixed(
    clips: LabelledClips,
    rows: Sequence[int],
    clip_seconds: float,
    crop_seed: int = 0,
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    on_failure: Callable[[int, UnreadableAudio], None] = lambda row, error: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read clips, all cut or padded to one length.

    Of a longer clip, training and validation take a crop that depends on the clip's ID and
    `crop_seed` only; test clips, and those of a cross-validation, their first part.

    Arguments
    ---------
    clips : LabelledClips
    rows : sequence of int
        Which to read, in this order.
    clip_seconds : float
    crop_seed : int
        Default 0.
    batch_seconds : float
        Of audio in a batch. Default 600.
    num_workers : int
        Decoding threads. Default 2.
    on_failure : callable
        Told of each row that cannot be used.

    Yields
    ------
    rows : list of int
    wav : Tensor [B, samples], float32
        16 kHz.
    """
    samples = round(clip_seconds * SAMPLE_RATE)
    same_file: dict[str, list[int]] = {}
    for row in rows:
        same_file.setdefault(clips.files[row], []).append(row)

    def skip(error):
        for row in same_file[error.path]:
            on_failure(row, error)

    def draw(row):
        if clips.splits[row] not in ("train", "valid"):
            return 0.0
        return _random(
            crop_seed, CROP, zlib.crc32(clips.ids[row].encode("utf-8", "surrogateescape"))
        ).random()

    for batch in read_clips(same_file, batch_seconds, num_workers, skip):
        lengths = (batch.wav_lens * batch.wav.shape[1]).round().long().tolist()
        found = [
            (row, fixed_length(wav[:length], samples, draw(row)))
            for file, wav, length in zip(batch.files, batch.wav, lengths)
            for row in same_file[file]
        ]
        yield [row for row, _ in found], torch.stack([wav for _, wav in found])
