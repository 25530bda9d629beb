"""Which files were not used, and why."""

import contextlib
import csv
import io
import logging
import os
from pathlib import Path

from speechbrain_jepa.files import full_disk_named, whole_file

logger = logging.getLogger(__name__)

COLUMNS = ("file", "reason")


class SkippedFiles:
    """The list of files that were not used, `skipped.csv`: file, reason. One line for each file.

    Lines are only ever appended, so a resumed run and the processes of a distributed one can go
    on writing to it.

    Arguments
    ---------
    path : str or path
        Lines already there are kept and not repeated.

    Example
    -------
    >>> skipped = SkippedFiles(getfixture("tmp_path") / "skipped.csv")
    >>> skipped.add("a.wav", "no samples"), skipped.add("a.wav", "no samples"), len(skipped)
    (True, False, 1)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._files: set[str] = set()
        self._bytes_read = -1
        self._catch_up()

    def __len__(self) -> int:
        self._catch_up()
        return len(self._files)

    def add(self, file: str, reason: str) -> bool:
        """Append a line, unless the file has one; tells whether it did."""
        self._catch_up()
        if file in self._files:
            return False
        with full_disk_named(self.path.parent), _open(self.path, "a") as out:
            header = csv_line(*COLUMNS) if out.tell() == 0 else ""
            out.write(header + csv_line(file, reason))
        return True

    def report(self, failures: list[tuple[str, str]]) -> None:
        """Log each (file, reason) of a batch, and add its line."""
        for file, reason in failures:
            logger.warning("Skipped %s: %s", file, reason)
            self.add(file, reason)

    def _catch_up(self) -> None:
        """Read what this or another process has written since."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._bytes_read:
            self._files = set()
            if size:
                # a line that is no csv, as a full disk leaves it, ends what is known
                with _open(self.path, "r") as file, contextlib.suppress(csv.Error):
                    rows = csv.reader(file)
                    next(rows, None)
                    self._files.update(row[0] for row in rows if row)
            self._bytes_read = size

    @staticmethod
    def write(path: str | os.PathLike, lines: list[tuple[str, str]]) -> "SkippedFiles":
        """A new list in place of the one that is there; of two lines on a file the first counts."""
        reasons: dict[str, str] = {}
        for file, reason in lines:
            reasons.setdefault(file, reason)
        with whole_file(path) as partial, _open(partial, "w") as out:
            out.write(csv_line(*COLUMNS))
            out.writelines(csv_line(file, reason) for file, reason in reasons.items())
        return SkippedFiles(path)


def _open(path: Path, mode: str):
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


def csv_line(*fields) -> str:
    """One csv line; a carriage return, which `csv` leaves bare, is quoted too."""
    bare = any("\r" in field for field in fields if isinstance(field, str))
    line = io.StringIO()
    writer = csv.writer(
        line, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
    )
    writer.writerow(fields)
    return line.getvalue()
