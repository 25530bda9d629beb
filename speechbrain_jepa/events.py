"""Sound events: their csv, the targets of time steps, and events again from steps' scores.

Shapes: T time steps, K labels.

| column | |
| --- | --- |
| file | relative to the folder of the csv, or to a data folder |
| onset, offset | seconds; both and the label are empty in the one row of a file without events |
| label | |
| split | train, valid or test, the same in all rows of a file |
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechbrain_jepa.classifier import Decoding
from speechbrain_jepa.features import SAMPLE_RATE

COLUMNS = ("file", "onset", "offset", "label", "split")
SPLITS = ("train", "valid", "test")


class Event(NamedTuple):
    """A sound, from `onset` to `offset` in seconds."""

    onset: float
    offset: float
    label: str


@dataclass(frozen=True)
class EventTable:
    """The files of a csv of events.

    Arguments
    ---------
    names : list of str
        As the csv has them.
    files : list of str
        With the data folder in front.
    splits : list of str
    events : list of list of Event
        Of each file, by onset.
    """

    names: list[str]
    files: list[str]
    splits: list[str]
    events: list[list[Event]]

    @property
    def labels(self) -> list[str]:
        """All labels, sorted."""
        return sorted({event.label for events in self.events for event in events})

    def rows(self, split: str) -> list[int]:
        """Which files are of a split."""
        return [row for row, name in enumerate(self.splits) if name == split]


def read_events(path, data_folder=None) -> EventTable:
    """Read a csv of events (see above).

    Arguments
    ---------
    path : str or Path
    data_folder : str, Path or None
        What files are relative to. None: the folder of the csv.

    Returns
    -------
    EventTable

    Raises
    ------
    ValueError
        If a column is missing, a value cannot be meant so, or a split has no file: the message
        names the line.

    Example
    -------
    >>> path = getfixture("tmp_path") / "events.csv"
    >>> rows = ["a.wav,0.5,1.25,dog,train", "b.wav,,,,valid", "c.wav,0,0.1,cat,test"]
    >>> _ = path.write_text("\\n".join(["file,onset,offset,label,split", *rows]))
    >>> table = read_events(path)
    >>> table.names, table.labels, table.events[0]
    (['a.wav', 'b.wav', 'c.wav'], ['cat', 'dog'], [Event(onset=0.5, offset=1.25, label='dog')])
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, restval="", skipinitialspace=True)
        rows, columns = list(reader), reader.fieldnames or []
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: it needs {', '.join(COLUMNS)}, and has "
            f"{', '.join(columns)}"
        )
    split_of: dict[str, str] = {}
    events: dict[str, list[Event]] = {}
    for line, row in enumerate(rows, 2):
        place = f"{path}, line {line} ({row['file']})"
        name, split = row["file"], row["split"]
        if split not in SPLITS:
            raise ValueError(f"{place}: split {split!r} is none of {', '.join(SPLITS)}")
        if split_of.setdefault(name, split) != split:
            raise ValueError(f"{place}: split {split!r}, but {split_of[name]!r} further up")
        found = events.setdefault(name, [])
        given = [bool(row[column].strip()) for column in ("onset", "offset", "label")]
        if all(given):
            found.append(_event(row, place))
        elif any(given):
            raise ValueError(
                f"{place}: onset, offset and label are either all there, or all empty for a file "
                "without events"
            )
    for split in SPLITS:
        if split not in split_of.values():
            raise ValueError(f"{path}: no file of split {split}")
    if not any(events.values()):
        raise ValueError(f"{path}: no event in any file")
    root = Path(path).parent if data_folder is None else Path(data_folder)
    return EventTable(
        names=list(events),
        files=[str(root / name) for name in events],
        splits=[split_of[name] for name in events],
        events=[sorted(found) for found in events.values()],
    )


def _event(row: dict, place: str) -> Event:
    try:
        onset, offset = float(row["onset"]), float(row["offset"])
    except ValueError:
        onset = offset = math.nan
    if not 0 <= onset < offset < math.inf:
        raise ValueError(
            f"{place}: onset {row['onset']!r} and offset {row['offset']!r}: expected seconds, the "
            "onset before the offset"
        )
    return Event(onset, offset, row["label"].strip())


class EventTargets:
    """Targets of the time steps of a crop: which labels sound in each.

    An event's onset and offset are rounded to the nearest step; it has at least one.

    Arguments
    ---------
    events : list of list of Event
        Of each clip.
    labels : list of str
    downsample_rate : int
        Samples of a time step (`AudioJEPA.downsample_rate`).

    Example
    -------
    >>> targets = EventTargets([[Event(0.5, 1.0, "dog")]], ["cat", "dog"], downsample_rate=4_000)
    >>> targets(0, start=0.25, stop=1.5)[:, 1]  # steps of 0.25 s
    tensor([0., 1., 1., 0., 0.])
    """

    def __init__(self, events: list[list[Event]], labels: list[str], downsample_rate: int):
        self.events = events
        self.number = {label: index for index, label in enumerate(labels)}
        self.downsample_rate = downsample_rate

    def __call__(self, row: int, start: float, stop: float) -> Tensor:
        """[T, K], float32, for the part of the clip from `start` to `stop` seconds."""
        steps = -(-round((stop - start) * SAMPLE_RATE) // self.downsample_rate)
        step = self.downsample_rate / SAMPLE_RATE
        targets = torch.zeros(steps, len(self.number))
        for onset, offset, label in self.events[row]:
            if onset < stop and offset > start:
                first = max(round((onset - start) / step), 0)
                last = max(round((offset - start) / step), first + 1)
                targets[min(first, steps - 1) : last, self.number[label]] = 1
        return targets


def median_filter(scores: np.ndarray, seconds: float, step_seconds: float) -> np.ndarray:
    """Medians over a window of about `seconds`, an odd number of steps [T, K].

    At the two ends the first and last score go on.

    Example
    -------
    >>> median_filter(np.array([[0.0], [1.0], [0.0], [1.0], [1.0]]), 0.3, step_seconds=0.1)[:, 0]
    array([0., 0., 1., 1., 1.])
    """
    half = round(seconds / step_seconds) // 2
    if not half:
        return scores
    padded = np.pad(scores, ((half, half), (0, 0)), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, 0), -1)


def decode(
    scores: np.ndarray, labels: list[str], step_seconds: float, decoding: Decoding, seconds: float
) -> list[Event]:
    """Events of a clip: runs of steps whose filtered score is above the label's threshold.

    Arguments
    ---------
    scores : array [T, K]
        From 0 to 1.
    labels : list of str
    step_seconds : float
    decoding : Decoding
    seconds : float
        Duration of the clip, at which its last event ends.

    Returns
    -------
    list of Event
        By onset.

    Example
    -------
    >>> scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.2, 0.9], [0.1, 0.9]])
    >>> decode(scores, ["cat", "dog"], 0.5, Decoding(), seconds=1.9)
    [Event(onset=0.0, offset=1.0, label='cat'), Event(onset=0.5, offset=1.9, label='dog')]
    """
    thresholds = np.array(decoding.thresholds or [0.5] * len(labels))
    active = median_filter(scores, decoding.median_seconds, step_seconds) > thresholds
    edges = np.diff(np.pad(active.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    events = []
    for number, label in enumerate(labels):
        first = np.flatnonzero(edges[:, number] == 1) * step_seconds
        last = np.flatnonzero(edges[:, number] == -1) * step_seconds
        events += [
            Event(float(onset), float(min(offset, seconds)), label)
            for onset, offset in zip(first, last)
            if onset < seconds
        ]
    return sorted(events)
