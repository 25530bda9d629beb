"""AudioSet's balanced segments for training (20k) and its evaluation segments: 527 labels."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from os.path import join
from pathlib import Path

from speechbrain_jepa.data.listing import list_audio

from .common import Clip, Task, locate, read_table, write_manifest

TASK = Task(
    name="audioset20k",
    source="https://research.google.com/audioset/download.html (the csv files; the audio is that "
    "of YouTube videos, of which some are gone)",
    classes=527,
    counts={"train": 22_160, "test": 20_371},
    multilabel=True,
)
PARTS = {  # split: csv, folders that may hold its audio
    "train": ("balanced_train_segments.csv", ("balanced_train_segments", "balanced_train", "bal")),
    "test": ("eval_segments.csv", ("eval_segments", "eval")),
}
LABELS = "class_labels_indices.csv"


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With the three csv files and a folder of audio for each part: `balanced_train_segments` (or
        `balanced_train`, `bal`) and `eval_segments` (or `eval`). A file is named by the video, with
        or without Y before and the start behind, as the usual download scripts do: `<id>.flac`,
        `Y<id>.wav`, `<id>_30.wav`, `<id>_30.000.wav`, `<id>_30000.wav`, `<id>_30_40.wav`,
        `<id>_30000_40000.wav`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files, which everybody's AudioSet has. Default False.

    Returns
    -------
    Path
    """
    locate(TASK, data_folder, LABELS)
    names = {
        row["mid"]: row["display_name"].replace(";", ",")
        for row in read_table(join(data_folder, LABELS), ("mid", "display_name"))
    }
    clips = []
    for split, (table, folders) in PARTS.items():
        locate(TASK, data_folder, table)
        folder = next((name for name in folders if os.path.isdir(join(data_folder, name))), None)
        found = {} if folder is None else _by_stem(join(data_folder, folder))
        suffixes = Counter(Path(file).suffix for file in found.values()) or {".wav": 1}
        usual = max(suffixes, key=suffixes.__getitem__)  # what a missing file is called
        for video, start, stop, mids in _segments(join(data_folder, table)):
            unknown = [mid for mid in mids if mid not in names]
            if unknown:
                raise ValueError(f"{table}: {video} has {unknown[0]}, which {LABELS} does not list")
            file = next((found[stem] for stem in _stems(video, start, stop) if stem in found), None)
            wav = join(folder or folders[0], file or f"{video}{usual}")
            clips.append(Clip(wav, ";".join(names[mid] for mid in mids), split))
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)


def _segments(path: str) -> Iterator[tuple[str, float, float, list[str]]]:
    """Video, start and stop in seconds, and labels, of each line that is no comment."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = (line for line in file if not line.startswith("#"))
        for row in csv.reader(lines, skipinitialspace=True):
            if row:
                yield row[0], float(row[1]), float(row[2]), row[3].split(",")


def _by_stem(folder: str) -> dict[str, str]:
    return {Path(path).stem: path for path, *_ in list_audio(folder)[0]}


def _stems(video: str, start: float, stop: float) -> list[str]:
    """How download scripts name a segment."""
    suffixes = [
        "",
        f"_{start:g}",
        f"_{start:.3f}",
        f"_{start * 1000:.0f}",
        f"_{start:g}_{stop:g}",
        f"_{start:.3f}_{stop:.3f}",
        f"_{start * 1000:.0f}_{stop * 1000:.0f}",
    ]
    return [f"{prefix}{video}{suffix}" for suffix in suffixes for prefix in ("", "Y")]
