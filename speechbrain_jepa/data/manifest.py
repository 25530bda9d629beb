"""Audio segments in arrays, which all processes map from the same files.

A Python list of two million paths costs every loader process its own copy, page by page, as its
reference counts are touched. Here paths are one block of bytes and everything else is an array;
both are memory-mapped, so all processes share them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_jepa.data.shards import ShardMember
from speechbrain_jepa.files import whole_file

ARRAYS = (
    *("path_bytes", "path_ends", "start", "length"),
    *("sample_rate", "total", "offset", "size", "mtime_ns"),
)
DTYPES = {"path_bytes": np.uint8, "sample_rate": np.int32}  # the others are int64
REMEDY = "start again, and the folder is scanned anew"


@dataclass(frozen=True)
class Manifest:
    """Audio segments, N of them, in arrays.

    Arguments
    ---------
    path_bytes : array [bytes], uint8
        All paths end to end, UTF-8.
    path_ends : array [N], int64
        Where each ends in `path_bytes`.
    start, length : array [N], int64
        The segment, in samples at the file's own rate.
    sample_rate : array [N], int32
        Hz.
    total : array [N], int64
        Samples of the file when it was scanned.
    offset : array [N], int64
        Where the bytes of a member of a tar shard begin; 0 for a file of its own.
    size, mtime_ns : array [N], int64
        Bytes, and modification time (a member's is its shard's).

    Example
    -------
    >>> manifest = Manifest.from_rows([("a.wav", 0, 8_000, 8_000, 8_000, 1, 1)])
    >>> len(manifest), manifest.path(0), manifest.seconds
    (1, 'a.wav', array([1.]))
    """

    path_bytes: np.ndarray
    path_ends: np.ndarray
    start: np.ndarray
    length: np.ndarray
    sample_rate: np.ndarray
    total: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    mtime_ns: np.ndarray

    @staticmethod
    def from_rows(rows) -> "Manifest":
        """From (path, start, length, sample_rate, total, size, mtime_ns) for each."""
        paths = [os.fsencode(row[0]) for row in rows]
        offsets = [row[0].offset if isinstance(row[0], ShardMember) else 0 for row in rows]
        columns = np.array([row[1:] for row in rows], np.int64).reshape(-1, 6).T
        return Manifest(
            np.frombuffer(b"".join(paths), np.uint8),
            np.cumsum([len(path) for path in paths], dtype=np.int64),
            columns[0].copy(),
            columns[1].copy(),
            columns[2].astype(np.int32),
            columns[3].copy(),
            np.array(offsets, np.int64),
            columns[4].copy(),
            columns[5].copy(),
        )

    def __len__(self) -> int:
        return len(self.length)

    def path(self, item: int) -> str:
        """The path of segment `item`, as it was found (a `ShardMember` inside a tar shard)."""
        begin = int(self.path_ends[item - 1]) if item else 0
        path = os.fsdecode(self.path_bytes[begin : self.path_ends[item]].tobytes())
        offset = int(self.offset[item])
        return ShardMember(path, offset, int(self.size[item])) if offset else path

    @property
    def seconds(self) -> np.ndarray:
        """Duration of each segment."""
        return self.length / self.sample_rate

    def raw_paths(self) -> list[bytes]:
        """All paths, undecoded: for work on the whole manifest, outside loader processes."""
        block, ends = self.path_bytes.tobytes(), self.path_ends.tolist()
        return [block[begin:end] for begin, end in zip([0, *ends], ends)]

    def headers(self) -> dict:
        """(samples, sample rate) by (path, size, mtime_ns)."""
        paths = map(os.fsdecode, self.raw_paths())
        files = zip(paths, self.size.tolist(), self.mtime_ns.tolist())
        return dict(zip(files, zip(self.total.tolist(), self.sample_rate.tolist())))

    def subset(self, items: np.ndarray) -> "Manifest":
        """The segments with these numbers, in this order."""
        items = np.asarray(items, np.int64)
        paths = self.raw_paths()
        paths = [paths[item] for item in items.tolist()]
        return Manifest(
            np.frombuffer(b"".join(paths), np.uint8),
            np.cumsum([len(path) for path in paths], dtype=np.int64),
            *(np.array(getattr(self, name)[items]) for name in ARRAYS[2:]),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write one .npy file per array into a folder; processes that map older ones keep them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            with whole_file(folder / f"{name}.npy") as partial:
                np.save(partial, getattr(self, name))

    @staticmethod
    def load(folder: str | os.PathLike) -> "Manifest":
        """Map the arrays of a folder that `save` wrote; nothing is copied into memory.

        Raises
        ------
        ValueError
            If an array is not there or not whole, or they do not fit together.
        """
        folder, arrays = Path(folder), []
        for name in ARRAYS:
            path = folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, EOFError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}): {REMEDY}") from error
            if array.ndim != 1 or array.dtype != DTYPES.get(name, np.int64):
                raise ValueError(f"{path} holds {array.dtype}{list(array.shape)}: {REMEDY}")
            arrays.append(array)
        path_bytes, path_ends, *columns = arrays
        rows, size = len(path_ends), path_ends[-1] if len(path_ends) else 0
        if size != len(path_bytes) or any(len(column) != rows for column in columns):
            raise ValueError(f"the arrays in {folder} are not of one manifest: {REMEDY}")
        return Manifest(*arrays)

    def __reduce__(self):
        # spawned loader processes would get copies: let them map the files again
        files = [getattr(getattr(self, name), "filename", None) for name in ARRAYS]
        if all(files):
            return Manifest.load, (Path(files[0]).parent,)
        return Manifest, tuple(getattr(self, name) for name in ARRAYS)
