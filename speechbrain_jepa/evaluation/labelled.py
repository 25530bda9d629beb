"""Labelled clips of a task: the csv that lists them, who trains and who tests.

| column | |
| --- | --- |
| file, or wav | relative to the folder of the csv, or to a data folder |
| split | train, valid or test |
| fold | a number, in place of split: a cross-validation |
| ID | default: the file |
| duration | seconds; may be missing |
| any other | a set of labels; several labels of one clip are joined by `;` |
"""

import csv
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_jepa.data.crops import random_at

COLUMNS = ("ID", "wav", "duration", "label", "split", "fold")  # that the recipes' manifests have
NO_LABELS = ("ID", "file", "wav", "duration", "split", "fold")
SPLITS = ("train", "valid", "test")
VALID_SHARE = 0.1  # of the training clips, where the data set names no validation clips
DRAW = 1  # stream of random numbers: independent of fixed_clips.CROP's


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
        parts: list[tuple[int | None, np.ndarray, np.ndarray | None, np.ndarray]]
        if self.has_folds:
            folds = np.array(self.folds)
            parts = [
                (fold, np.flatnonzero(usable & (folds != fold)), None, folds == fold)
                for fold in np.unique(folds).tolist()
            ]
        else:
            splits = np.array(self.splits)
            is_valid = splits == "valid"
            named = np.flatnonzero(usable & is_valid) if is_valid.any() else None
            parts = [(None, np.flatnonzero(usable & (splits == "train")), named, splits == "test")]
        divisions = []
        for fold, train, valid, test in parts:
            if valid is None:
                order = random_at(seed, DRAW, fold or 0).permutation(len(train))
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


@dataclass(frozen=True)
class Features:
    """Embeddings of labelled clips.

    Arguments
    ---------
    array : array [L, n, C], float16 or float32
        Memory-mapped. Rows that are not usable are zeros.
    usable : array [n], bool
    layers : list of int
        The number of each of the L layers; -1 is the last.
    folder : Path
    """

    array: np.ndarray
    usable: np.ndarray
    layers: list[int]
    folder: Path


def read_labelled(path, data_folder=None, multilabel: bool = False) -> dict[str, LabelledClips]:
    """The sets of labels of a csv (see above), each with the rows that have a label in it.

    Arguments
    ---------
    path : str or Path
    data_folder : str, Path or None
        What files are relative to. None: the folder of the csv.
    multilabel : bool
        Split labels at `;`, and keep rows without one. Default False.

    Returns
    -------
    dict of LabelledClips
        By column.

    Raises
    ------
    ValueError
        If a column is missing, a split, fold or duration cannot be meant so, train or test has no
        rows, rows with and without folds are mixed, or an ID occurs twice.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.csv"
    >>> rows = "a.wav,train,dog,low\\nb.wav,train,cat,\\nc.wav,test,dog,low\\n"
    >>> _ = path.write_text("file,split,animal,pitch\\n" + rows)
    >>> sets = read_labelled(path, "/data")
    >>> sets["animal"].classes, sets["animal"].targets.tolist(), sets["pitch"].files
    (['cat', 'dog'], [1, 0, 1], ['/data/a.wav', '/data/c.wav'])
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, restval="")
        rows, columns = list(reader), reader.fieldnames or []
    names = [column for column in columns if column not in NO_LABELS]
    fits = {"file", "wav"} & set(columns) and {"split", "fold"} & set(columns) and names
    if not (fits and rows):
        has = "no rows" if fits else f"the columns {', '.join(columns)}"
        raise ValueError(
            f"{path} has {has}: it needs file, split or fold, at least one column of labels, and a "
            "row for each clip"
        )
    root = Path(path).parent if data_folder is None else Path(data_folder)
    sets = {}
    for name in names:
        labelled = [(line, row) for line, row in enumerate(rows, 2) if multilabel or row[name]]
        sets[name] = _clips(path, root, name, labelled, multilabel)
    return sets


def _clips(path, root: Path, name: str, labelled: list[tuple[int, dict]], multilabel: bool):
    def number(line: int, row: dict, column: str, kind: type):
        try:
            return kind(row[column]) if row.get(column) else None
        except ValueError as error:
            raise ValueError(
                f"{path}, line {line}: {column} {row[column]!r} is no number"
            ) from error

    files = [row.get("file") or row.get("wav", "") for _, row in labelled]
    durations = [number(*pair, "duration", float) for pair in labelled]
    clips = LabelledClips(
        ids=[row.get("ID") or file for (_, row), file in zip(labelled, files)],
        files=[str(root / file) for file in files],
        labels=[row[name] for _, row in labelled],
        splits=[row.get("split", "") for _, row in labelled],
        folds=[number(*pair, "fold", int) for pair in labelled],
        multilabel=multilabel,
        longest=max(durations, default=None) if None not in durations else None,
    )
    _check(path, name, clips)
    return clips


def _check(path, name: str, clips: LabelledClips) -> None:
    if len(set(clips.ids)) < len(clips):
        twice = Counter(clips.ids).most_common(1)[0][0]
        raise ValueError(f"{path}: {twice!r} occurs twice: a clip has one row")
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
            raise ValueError(f"{path}: no row of split {split} has a label in {name}")
