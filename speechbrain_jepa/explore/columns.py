"""What the points of a map are coloured by: folders, and the columns of csv files."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_jepa.pages import printable

FEW_VALUES = 12  # numbers of so many different values at most are names of classes


@dataclass
class Column:
    """One value a clip.

    Arguments
    ---------
    name : str
    categories : list of str or None
        The most frequent first. None: the values are numbers.
    values : array [n], float32
        Numbers of categories, or numbers; NaN where there is none.
    """

    name: str
    categories: list[str] | None
    values: np.ndarray

    @classmethod
    def of(cls, name: str, texts: Sequence[str | None]) -> "Column":
        """From text, empty or None where there is none.

        Example
        -------
        >>> column = Column.of("sound", ["cat", "dog", "dog", ""])
        >>> column.categories, column.values
        (['dog', 'cat'], array([ 1.,  0.,  0., nan], dtype=float32))
        """
        given = Counter(text for text in texts if text)
        numbers = _numbers(given)
        if numbers is not None and len(given) > FEW_VALUES:
            values = [numbers[text] if text else np.nan for text in texts]
            return cls(name, None, np.array(values, np.float32))
        place = {text: number for number, (text, _) in enumerate(given.most_common())}
        values = [place[text] if text else np.nan for text in texts]
        return cls(name, [printable(text) for text in place], np.array(values, np.float32))


def _numbers(texts) -> dict[str, float] | None:
    try:
        numbers = {text: float(text) for text in texts}
    except ValueError:
        return None
    return numbers if np.isfinite(list(numbers.values())).all() else None


def folder_columns(names: Sequence[str]) -> list[Column]:
    """The first folder of each relative name, and the whole of its folders where that is more.

    Example
    -------
    >>> [(c.name, c.categories) for c in folder_columns(["a/x/1.wav", "b/2.wav", "b/3.wav"])]
    [('folder', ['b', 'a']), ('subfolder', ['b', 'a/x'])]
    """
    parents = [os.path.dirname(name) for name in names]
    first = [parent.partition("/")[0] or "." for parent in parents]
    columns = [Column.of("folder", first)]
    if set(parents) != set(first) - {"."} | ({""} if "." in first else set()):
        columns.append(Column.of("subfolder", [parent or "." for parent in parents]))
    return columns


def csv_columns(table: str | os.PathLike, paths: Sequence[str]) -> list[Column]:
    """The columns of a csv, by its column `file`.

    Arguments
    ---------
    table : str or Path
        `file` is relative to the csv's folder, or absolute. Files that are no clips are left out.
    paths : sequence of str
        Absolute paths of the clips.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such csv, it has no column `file`, or names none of the clips.
    """
    table = Path(table)
    with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
        header = list(reader.fieldnames or ())
    if "file" not in header:
        raise ValueError(f"{table} has the columns {', '.join(header)}: one must be file")
    folder = os.path.abspath(table.parent)
    row_of = {os.path.normpath(os.path.join(folder, row["file"])): row for row in rows}
    found = [row_of.get(path) for path in paths]
    if not any(found):
        raise ValueError(
            f"{table} names none of the clips: its first file is "
            f"{next(iter(row_of), 'missing')}, that of the embeddings {paths[0]}"
        )
    return [
        Column.of(printable(name), [row[name] if row else None for row in found])
        for name in header
        if name and name != "file"
    ]
