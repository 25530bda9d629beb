"""SpeechBrain's csv files: which segments of which files."""

import csv
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speechbrain_jepa.data.listing import NUM_THREADS, stat_files

COLUMNS = ("ID", "duration", "wav")


def read_rows(
    train_csv: Path,
    root: str,
    num_threads: int = NUM_THREADS,
    keep: Callable[[str], bool] | None = None,
) -> list[tuple]:
    """(path, start, stop, size, mtime_ns) of each row; stop None is the file's end.

    Arguments
    ---------
    train_csv : Path
        UTF-8, with or without a byte order mark.
    root : str
        What `$data_root` stands for and where relative paths start, or "".
    num_threads : int
        That look at the files. Default 16.
    keep : callable or None
        Rows whose path it says no to are left out. None (default): none.

    Raises
    ------
    ValueError
        If a column is missing or a row makes no sense: the message names the line.
    """
    segments = []
    with open(train_csv, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(_checked(file, train_csv), skipinitialspace=True)
        try:
            missing = set(COLUMNS) - set(reader.fieldnames or [])
            if missing:
                raise ValueError(
                    f"train_csv={train_csv} lacks the column {', '.join(sorted(missing))}: "
                    "SpeechBrain's columns are ID, duration, wav and optionally start, stop"
                )
            for row in reader:
                place = f"{train_csv}, line {reader.line_num}"
                path = _path(row["wav"], root, place)
                start, stop = _segment(row.get("start"), row.get("stop"), place)
                if keep is None or keep(path):
                    segments.append((path, start, stop))
        except csv.Error as error:
            line = reader.reader.line_num  # of the csv reader inside: the last whole line
            raise ValueError(f"{train_csv}, line {line}: {error}") from error
    paths = list(dict.fromkeys(path for path, *_ in segments))
    with ThreadPoolExecutor(num_threads) as pool:
        looks = zip(paths, stat_files(root, paths, pool))
        # of a file that cannot be looked at, reading the header will say what is wrong
        stats = {path: (-1, -1) if isinstance(look, str) else look for path, look in looks}
    return [(*segment, *stats[segment[0]]) for segment in segments]


def _checked(lines: Iterator[str], train_csv: Path) -> Iterator[str]:
    """Lines that are UTF-8 text."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(
                f"{train_csv}, line {number}: holds a NUL byte: save it as csv in UTF-8, not UTF-16"
            )
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00  # surrogateescape adds 0xDC00 to it
                raise ValueError(
                    f"{train_csv}, line {number}: byte 0x{byte:02x} is not UTF-8: save it as csv "
                    "in UTF-8"
                ) from error
        yield line


def _segment(start: str | None, stop: str | None, place: str) -> tuple[int, int | None]:
    """In samples. As in SpeechBrain, a stop equal to start, or none, is the end of the file."""
    try:
        begin = int(float(start or 0))
        end = int(float(stop or begin))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{place}: start or stop: {error}") from error
    if not 0 <= begin <= end:
        raise ValueError(f"{place}: start={begin}, stop={end}: 0 <= start <= stop is meant")
    return begin, end if end > begin else None


def _path(wav: str | None, root: str, place: str) -> str:
    """The wav column with `$data_root` filled in, relative to `root` where it lies below it."""
    if not wav:
        raise ValueError(f"{place}: the column wav is empty")
    if "$data_root" in wav or "{data_root}" in wav:
        if not root:
            raise ValueError(f"{place}: {wav} needs a data_folder: give --data_folder")
        wav = wav.replace("$data_root", root).replace("{data_root}", root)
    prefix = os.path.join(root, "")
    return wav[len(prefix) :] if root and wav.startswith(prefix) else wav
