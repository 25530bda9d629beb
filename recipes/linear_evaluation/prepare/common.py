"""What all data sets have in common: the description, the checks, the manifest."""

import csv
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from speechbrain_jepa.data.scan import read_headers
from speechbrain_jepa.data.skipped import csv_line
from speechbrain_jepa.evaluation.labelled import COLUMNS
from speechbrain_jepa.files import folder_lock, whole_file, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
NUM_THREADS = 16  # that ask for sizes and read headers: on a network drive they mostly wait
SHOWN = 5  # folders and files in a message
FIX = "end it, or name another --output_folder"
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Task:
    """A data set and what is known of it.

    Arguments
    ---------
    name : str
    source : str
        Where to download it.
    classes : int or None
    counts : dict of int
        Published number of clips in each split; under "" where there are folds only.
    folds : int or None
        Of the cross-validation. None: the data set has splits.
    multilabel : bool
        Default False.
    split_option : str or None
        The option of `prepare` that names the published split, where the data set comes without it.
        Where it is not given, the split is one of ours, and scores are not comparable.
    """

    name: str
    source: str
    classes: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    folds: int | None = None
    multilabel: bool = False
    split_option: str | None = None

    def has_own_split(self, options: dict) -> bool:
        """Whether `prepare` with these options divides the clips in a way of its own."""
        return self.split_option is not None and not options.get(self.split_option)


class Clip(NamedTuple):
    """A labelled file; `wav` is relative to the data folder. It has a split or a fold."""

    wav: str
    label: str
    split: str = ""
    fold: str = ""


def locate(
    task: Task, data_folder: str | os.PathLike, landmark: str, subfolders: Sequence[str] = ("",)
) -> str:
    """Find out how the data set was unpacked.

    Arguments
    ---------
    task : Task
    data_folder : str or path
    landmark : str
        A file or folder that the data set has.
    subfolders : sequence of str
        Where it may lie in `data_folder`, most usual first.

    Returns
    -------
    str
        The subfolder that has the landmark.

    Raises
    ------
    FileNotFoundError
        If none has.
    """
    for subfolder in subfolders:
        if os.path.exists(os.path.join(data_folder, subfolder, landmark)):
            return subfolder
    what = "has no" if os.path.isdir(data_folder) else "is not a folder that holds"
    places = ", ".join(f"{subfolder}/{landmark}" for subfolder in subfolders if subfolder)
    raise FileNotFoundError(
        f"{task.name}: data_folder={data_folder} {what} {landmark}"
        f"{f' (nor {places})' if places else ''}. Download: {task.source}"
    )


def read_table(path: str | os.PathLike, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that needs certain columns."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True, restval="")
        rows, found = list(reader), reader.fieldnames or []
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: its columns are {', '.join(found)}"
        )
    return rows


def write_manifest(
    task: Task,
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    clips: Sequence[Clip],
    excluded: Sequence[tuple[str, str]] = (),
    listed: bool = True,
    allow_missing: bool = False,
) -> Path:
    """Check that the clips are there, read their headers and write the manifest.

    Nothing is read or written when a manifest of the same clips, with files of the same sizes and
    modification times, is in `save_folder`. Files that cannot be used, and `excluded`, are listed
    in `skipped.csv` beside it.

    Arguments
    ---------
    task : Task
    data_folder, save_folder : str or path
    clips : sequence of Clip
    excluded : sequence of (str, str)
        Files left out on purpose, and why.
    listed : bool
        The data set's own metadata names all clips. If not, clips were found by looking, and fewer
        than published are missing ones. Default True.
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
        `manifest.csv` in `save_folder`.

    Raises
    ------
    FileNotFoundError
        If files are missing and `allow_missing` is not given, or all are.
    ValueError
        If a file is listed twice, or none can be used.
    """
    twice = [wav for wav, count in Counter(clip.wav for clip in clips).items() if count > 1]
    if twice:
        raise ValueError(f"{task.name}: {twice[0]} is listed twice ({len(twice)} files are)")
    found = _sizes_and_times([clip.wav for clip in clips], data_folder)
    missing = [clip.wav for clip in clips if clip.wav not in found]
    _check_complete(task, data_folder, clips, missing, listed, allow_missing)

    save_folder = Path(save_folder)
    save_folder.mkdir(parents=True, exist_ok=True)
    manifest, skipped_csv = save_folder / "manifest.csv", save_folder / "skipped.csv"
    stamp_file = save_folder / "manifest.json"
    contents = (os.path.abspath(data_folder), clips, excluded, sorted(found.items()))
    stamp = {
        "format_version": FORMAT_VERSION,
        "contents": hashlib.sha256(repr(contents).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    with folder_lock(save_folder, FIX, wait=math.inf):
        before = _read_stamp(stamp_file)
        report = before.pop("report", None)
        if before != stamp or not (manifest.exists() and skipped_csv.exists()):
            stamp_file.unlink(missing_ok=True)  # a run killed while it writes is done again
            rows, unusable = _with_durations(clips, found, data_folder)
            skipped = [*((wav, "missing") for wav in missing), *unusable, *excluded]
            _write_csv(skipped_csv, ("file", "reason"), skipped)
            if not rows:
                raise ValueError(
                    f"{task.name}: none of the {len(clips)} files can be used, the first since: "
                    f"{unusable[0][1]}; all reasons are in {skipped_csv}"
                )
            _write_csv(manifest, COLUMNS, rows)
            report = _report(task, rows, skipped)
            write_text(stamp_file, json.dumps({**stamp, "report": report}))
    logger.info("%s: %s (%s, %s)", task.name, report["summary"], manifest, skipped_csv)
    for line in report["differences"]:
        logger.warning("%s: %s", task.name, line)
    return manifest


def _read_stamp(path: Path) -> dict:
    """What the last run left; nothing, if it cannot be read: the manifest is then made anew."""
    with suppress(OSError, ValueError):
        stamp = json.loads(path.read_text(encoding="utf-8"))
        return stamp if isinstance(stamp, dict) else {}
    return {}


def _sizes_and_times(wavs: list[str], data_folder) -> dict[str, tuple[int, int]]:
    """Bytes and modification time of the files that are there."""

    def look(chunk):
        found = {}
        for wav in chunk:
            with suppress(OSError):
                stat = os.stat(os.path.join(data_folder, wav))
                found[wav] = stat.st_size, stat.st_mtime_ns
        return found

    chunks = [wavs[start : start + 1024] for start in range(0, len(wavs), 1024)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return {wav: stat for found in pool.map(look, chunks) for wav, stat in found.items()}


def _check_complete(task, data_folder, clips, missing, listed, allow_missing) -> None:
    """Say what is missing: an error, or a warning if that is allowed."""
    absent = Counter(map(_two_levels, missing))
    expected = Counter(_two_levels(clip.wav) for clip in clips)
    lines = [
        f"{folder}: {expected[folder]} files expected, {expected[folder] - count} found"
        for folder, count in absent.most_common(SHOWN)
    ]
    if len(absent) > SHOWN:
        lines.append(f"... and {len(absent) - SHOWN} more folders")
    if missing:
        names = ", ".join(missing[:SHOWN])
        lines.append(f"{len(missing)} of {len(clips)} files are missing, the first: {names}")
    if not listed:
        gone = set(missing)
        splits = Counter(clip.split for clip in clips if clip.wav not in gone)
        lines += [
            f"{split} split: {count} files expected, {splits[split]} found"
            for split, count in task.counts.items()
            if splits[split] < count
        ]
    if not lines:
        return
    message = "\n  ".join([f"{task.name}: data_folder={data_folder} is not complete", *lines])
    if len(missing) == len(clips):
        raise FileNotFoundError(f"{message}\nDownload: {task.source}")
    if not allow_missing:
        raise FileNotFoundError(
            f"{message}\nDownload: {task.source}\nTo go on without them: --allow_missing True"
        )
    logger.warning(message)


def _two_levels(wav: str) -> str:
    """The folder of a file, two levels deep at most: enough to see which part is missing."""
    return "/".join(wav.split("/")[:-1][:2]) or "."


def _with_durations(clips, found, data_folder) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Manifest rows of the clips that can be used; and the others with the reason."""
    root = Path(data_folder)
    files = [(wav, *stat) for wav, stat in found.items()]
    headers = {
        file[0]: header
        for file, header in read_headers(files, root, NUM_THREADS, progress=True).items()
    }
    rows, unusable = [], []
    for wav, label, split, fold in clips:
        if wav not in headers:
            continue
        header = headers[wav]
        if isinstance(header, str):
            unusable.append((wav, _explain(header, root / wav)))
        elif header[0] == 0:
            unusable.append((wav, "holds no samples"))
        else:
            samples, rate = header
            # the path as ID: file names recur in other folders, and with other extensions
            rows.append((wav, wav, f"{samples / rate:.6f}", label, split, fold))
    return rows, unusable


def _explain(reason: str, path: Path) -> str:
    """A clone without Git LFS has small text files in place of audio."""
    if not path.is_file():  # opening a named pipe would wait forever
        return reason
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return reason
    return "a Git LFS pointer, not audio: `git lfs pull` fetches it" if pointer else reason


def _report(task: Task, rows: list[tuple], skipped: list[tuple[str, str]]) -> dict:
    """A summary, and where the clips are not those of the published data set."""
    splits = Counter(split for *_, split, _ in rows)
    folds = {fold for *_, fold in rows if fold}
    joined = [label for *_, label, _, _ in rows]
    labels = set(";".join(joined).split(";") if task.multilabel else joined) - {""}
    parts = ", ".join(f"{split} {count}" for split, count in splits.items() if split)
    parts = parts or f"{len(folds)} folds"
    differences = [
        f"{split or 'all folds'}: {count} clips expected, {splits[split]} can be used"
        for split, count in task.counts.items()
        if splits[split] != count
    ]
    for name, expected, values in (("classes", task.classes, labels), ("folds", task.folds, folds)):
        if expected is not None and len(values) != expected:
            differences.append(f"{expected} {name} expected, {len(values)} found")
    summary = f"{len(rows)} clips ({parts}), {len(skipped)} files skipped"
    return {"summary": summary, "differences": differences}


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with (
        whole_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.writelines(csv_line(*row) for row in (header, *rows))
