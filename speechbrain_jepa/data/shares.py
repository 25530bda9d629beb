"""A corpus divided between machines that know nothing of each other: by a hash of each path."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

COMPLETE = "complete.json"  # in the folder of a share: written last
_FOLDER = re.compile(r"share-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Share:
    """One of `number` parts of a corpus; every file is in exactly one of them.

    Arguments
    ---------
    index : int
        0 to number - 1.
    number : int

    Raises
    ------
    ValueError
        If the index is not one of them.

    Example
    -------
    >>> share = Share.parse("3/16")
    >>> str(share), share.folder
    ('3/16', 'share-00003-of-00016')
    >>> sum(Share(index, 4).has("a/b.wav") for index in range(4))
    1
    """

    index: int = 0
    number: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.number <= 99_999:
            raise ValueError(
                f"shard={self}: i/n is meant, with i from 0 to n - 1 and n at most 99 999"
            )

    @staticmethod
    def parse(text: str) -> "Share":
        """From "i/n".

        Raises
        ------
        ValueError
            If it is nothing of the kind.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match:
            raise ValueError(f"shard={text}: i/n is meant, as in 0/16 to 15/16")
        return Share(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.number}"

    @property
    def folder(self) -> str:
        """Name of the folder that the share is written to."""
        return f"share-{self.index:05d}-of-{self.number:05d}"

    def has(self, path: str) -> bool:
        """Whether the file with this path, relative to the corpus, is in this share."""
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.number == self.index


def share_folders(folder: str | os.PathLike) -> list[Share]:
    """The shares that have a folder in this one."""
    names = (_FOLDER.fullmatch(entry.name) for entry in Path(folder).iterdir() if entry.is_dir())
    return sorted(
        (Share(int(name[1]), int(name[2])) for name in names if name),
        key=lambda share: (share.number, share.index),
    )


def missing_shares(folder: str | os.PathLike) -> list[Share]:
    """Shares that a prepared folder lacks, or that are not complete; none of any other folder.

    Raises
    ------
    ValueError
        If there are shares of different numbers.
    """
    found = share_folders(folder)
    numbers = sorted({share.number for share in found})
    if len(numbers) > 1:
        raise ValueError(
            f"{folder} holds shares of {' and of '.join(map(str, numbers))}, which have the same "
            "files: remove those of one number"
        )
    wanted = [Share(index, numbers[0]) for index in range(numbers[0])] if numbers else []
    return [share for share in wanted if not (Path(folder) / share.folder / COMPLETE).exists()]
