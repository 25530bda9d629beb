"""What audio there is: found once, by reading headers only, and kept in arrays.

A Python list of two million paths costs every loader process its own copy, page by page, as its
reference counts are touched. Here paths are one block of bytes and everything else is an array;
both are memory-mapped, so all processes share them.
"""

import csv
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ARRAYS = (
    *("path_bytes", "path_ends", "start", "length"),
    *("sample_rate", "total", "size", "mtime_ns"),
)
# what libsndfile opens, and the other names under which such files go around
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *(name.lower() for name in soundfile.available_formats() if name != "RAW"),
        *("aif", "aifc", "opus", "oga", "mp2", "m1a", "snd", "wave", "sph", "nist"),
    )
)


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
    total, size, mtime_ns : array [N], int64
        Samples, bytes and modification time of the file when it was scanned.

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
    size: np.ndarray
    mtime_ns: np.ndarray

    @staticmethod
    def from_rows(rows) -> "Manifest":
        """From (path, start, length, sample_rate, total, size, mtime_ns) for each."""
        paths = [os.fsencode(row[0]) for row in rows]
        columns = np.array([row[1:] for row in rows], np.int64).reshape(-1, 6).T
        return Manifest(
            np.frombuffer(b"".join(paths), np.uint8),
            np.cumsum([len(path) for path in paths], dtype=np.int64),
            columns[0].copy(),
            columns[1].copy(),
            columns[2].astype(np.int32),
            columns[3].copy(),
            columns[4].copy(),
            columns[5].copy(),
        )

    def __len__(self) -> int:
        return len(self.length)

    def path(self, item: int) -> str:
        """The path of segment `item`, as it was found."""
        begin = int(self.path_ends[item - 1]) if item else 0
        return os.fsdecode(self.path_bytes[begin : self.path_ends[item]].tobytes())

    @property
    def seconds(self) -> np.ndarray:
        """Duration of each segment."""
        return self.length / self.sample_rate

    def headers(self) -> dict:
        """(samples, sample rate) by (path, size, mtime_ns)."""
        files = zip(map(self.path, range(len(self))), self.size.tolist(), self.mtime_ns.tolist())
        return dict(zip(files, zip(self.total.tolist(), self.sample_rate.tolist())))

    def subset(self, items: np.ndarray) -> "Manifest":
        """The segments with these numbers, in this order."""
        items = np.asarray(items, np.int64)
        begins = np.concatenate([[0], self.path_ends[:-1]]).astype(np.int64)
        lengths = (self.path_ends - begins)[items]
        ends = np.cumsum(lengths)
        # position of each byte: its place in the new block, moved to where its path begins now
        moves = np.repeat(begins[items] - (ends - lengths), lengths)
        path_bytes = self.path_bytes[np.arange(len(moves)) + moves]
        others = (getattr(self, name)[items] for name in ARRAYS[2:])
        return Manifest(path_bytes, ends, *others)

    def save(self, folder: str | os.PathLike) -> None:
        """Write one .npy file per array into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            # a file of its own, renamed: processes that map the old one keep it
            partial = folder / f"{name}.partial.npy"
            np.save(partial, getattr(self, name))
            partial.replace(folder / f"{name}.npy")

    @staticmethod
    def load(folder: str | os.PathLike) -> "Manifest":
        """Map the arrays of a folder that `save` wrote; nothing is copied into memory."""
        folder = Path(folder)
        return Manifest(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))

    def __reduce__(self):
        # spawned loader processes would get copies: let them map the files again
        files = [getattr(getattr(self, name), "filename", None) for name in ARRAYS]
        if all(files):
            return Manifest.load, (Path(files[0]).parent,)
        return Manifest, tuple(getattr(self, name) for name in ARRAYS)


class SkippedFiles:
    """The list of files that were not used, `skipped.csv`: file, reason. One line for each file.

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
        self._files = set()
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._files = {row["file"] for row in csv.DictReader(file)}

    def __len__(self) -> int:
        return len(self._files)

    def add(self, file: str, reason: str) -> bool:
        """Append a line, unless the file has one; tells whether it did."""
        if file in self._files:
            return False
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape") as out:
            writer = csv.writer(out, lineterminator="\n")
            if new:
                writer.writerow(["file", "reason"])
            writer.writerow([file, reason])
        self._files.add(file)
        return True


def _find_audio(folder: Path):
    """Relative path, size and modification time of every audio file below a folder, sorted."""
    found = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        pending.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    stat = entry.stat()
                    path = os.path.relpath(entry.path, folder)
                    found.append((path, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"cache_folder={folder} cannot be written to ({error.strerror}): "
            "name another with --cache_folder or --output_folder"
        ) from error


def scan_folder(
    data_folder: str | os.PathLike,
    cache_folder: str | os.PathLike,
    min_seconds: float = 0.2,
    num_threads: int = 16,
    progress: bool = True,
) -> tuple[Manifest, SkippedFiles]:
    """Find the audio files below a folder and read their headers.

    The manifest is kept in `cache_folder`; the next scan reads only the headers of files that are
    new or changed (by size and modification time). Hidden folders are passed over.

    Arguments
    ---------
    data_folder : str or path
        Wav, flac, ogg, opus, mp3, aiff and whatever else libsndfile reads, at any sample rate and
        any number of channels, in any tree of folders.
    cache_folder : str or path
    min_seconds : float
        Shorter files are skipped. Default 0.2.
    num_threads : int
        That read headers. Default 16.
    progress : bool
        Show a bar. Default True.

    Returns
    -------
    manifest : Manifest
        Memory-mapped; paths are relative to `data_folder`.
    skipped : SkippedFiles
        `skipped.csv` in the cache folder.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If the folder is not there.
    ValueError
        If no file in it is audio, or none can be used.
    PermissionError
        If the cache folder cannot be written to.
    """
    data_folder, cache_folder = Path(data_folder), Path(cache_folder)
    if not data_folder.exists():
        raise FileNotFoundError(f"data_folder={data_folder} does not exist")
    if not data_folder.is_dir():
        raise NotADirectoryError(f"data_folder={data_folder} is not a folder")
    _check_writable(cache_folder)
    found = _find_audio(data_folder)
    if not found:
        raise ValueError(
            f"no audio file below data_folder={data_folder}: looked for names ending in "
            f"{' '.join(sorted(EXTENSIONS))}"
        )
    entries = [(path, 0, None, size, mtime) for path, size, mtime in found]
    return _manifest_of(
        entries,
        data_folder,
        cache_folder,
        str(data_folder.resolve()),
        min_seconds,
        num_threads,
        progress,
    )


def read_csv(
    train_csv: str | os.PathLike,
    cache_folder: str | os.PathLike,
    data_folder: str | os.PathLike | None = None,
    min_seconds: float = 0.2,
    num_threads: int = 16,
    progress: bool = True,
) -> tuple[Manifest, SkippedFiles]:
    """Take the audio that a SpeechBrain csv lists, and read the files' headers.

    Arguments
    ---------
    train_csv : str or path
        With the columns ID, duration, wav, and optionally start and stop (in samples). `$data_root`
        and `{data_root}` in wav stand for `data_folder`.
    cache_folder, min_seconds, num_threads, progress
        As in `scan_folder`.
    data_folder : str, path, or None
        What `$data_root` means, and where relative paths start.

    Returns
    -------
    manifest : Manifest
    skipped : SkippedFiles

    Raises
    ------
    FileNotFoundError
        If the csv is not there.
    ValueError
        If a column is missing, or no file can be used.
    PermissionError
        If the cache folder cannot be written to.
    """
    train_csv, cache_folder = Path(train_csv), Path(cache_folder)
    if not train_csv.is_file():
        raise FileNotFoundError(f"train_csv={train_csv} does not exist")
    _check_writable(cache_folder)
    root = str(data_folder or "")
    entries = []
    with open(train_csv, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = {"ID", "duration", "wav"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"train_csv={train_csv} lacks the column {', '.join(sorted(missing))}: SpeechBrain's "
                "columns are ID, duration, wav and optionally start, stop"
            )
        for line, row in enumerate(reader, start=2):
            path = row["wav"].replace("$data_root", root).replace("{data_root}", root)
            try:
                start = int(float(row.get("start") or 0))
                stop = int(float(row["stop"])) if row.get("stop") else None
            except ValueError as error:
                raise ValueError(f"{train_csv}, line {line}: start or stop: {error}") from error
            try:
                stat = os.stat(os.path.join(root, path))
                entries.append((path, start, stop, stat.st_size, stat.st_mtime_ns))
            except OSError:
                entries.append((path, start, stop, -1, -1))  # the header read says what is wrong
    if not entries:
        raise ValueError(f"train_csv={train_csv} has no rows")
    source = f"{train_csv.resolve()} {root}"
    return _manifest_of(
        entries, Path(root), cache_folder, source, min_seconds, num_threads, progress
    )


def _manifest_of(entries, root, cache_folder, source, min_seconds, num_threads, progress):
    """Manifest of (path, start, stop, size, mtime_ns) entries; stop None is the file's end."""
    state = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "min_seconds": min_seconds,
        "entries": hashlib.sha256(repr(entries).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    state_file = cache_folder / "manifest.json"
    skipped = SkippedFiles(cache_folder / "skipped.csv")
    before = json.loads(state_file.read_text()) if state_file.exists() else {}
    if before == state:
        manifest = Manifest.load(cache_folder)
        logger.info("%d audio segments, unchanged since the last scan", len(manifest))
        return manifest, skipped

    headers = {}
    if before.get("source") == source and before.get("format_version") == FORMAT_VERSION:
        headers = Manifest.load(cache_folder).headers()
    files = {(path, size, mtime) for path, _, _, size, mtime in entries}
    headers.update(_read_headers(sorted(files - headers.keys()), root, num_threads, progress))

    rows = []
    for path, start, stop, size, mtime in entries:
        header = headers[path, size, mtime]
        reason = header if isinstance(header, str) else None
        if reason is None:
            total, rate = header
            length = (total if stop is None else min(stop, total)) - start
            if length < max(min_seconds * rate, 1):
                reason = f"too short: {max(length, 0) / rate:.3f} s, min_seconds={min_seconds}"
        if reason is None:
            rows.append((path, start, length, rate, total, size, mtime))
        elif skipped.add(path, reason):
            logger.warning("Skipped %s: %s", path, reason)
    if not rows:
        raise ValueError(
            f"none of the {len(files)} audio files of {source} can be used: the reasons are in "
            f"{skipped.path}"
        )
    state_file.unlink(missing_ok=True)  # a scan killed while it saves is done again
    Manifest.from_rows(rows).save(cache_folder)
    state_file.write_text(json.dumps(state))
    manifest = Manifest.load(cache_folder)
    logger.info(
        "%d audio segments, %.1f hours; %d files skipped (%s)",
        len(manifest),
        manifest.seconds.sum() / 3600,
        len(skipped),
        skipped.path,
    )
    return manifest, skipped


def _read_headers(files, root: Path, num_threads: int, progress: bool) -> dict:
    """(samples, sample rate), or the reason why not, for each (path, size, mtime_ns)."""

    def read(file):
        path, size, _ = file
        if size == 0:
            return "empty"
        try:
            info = soundfile.info(os.path.join(root, path))
            return info.frames, info.samplerate
        except Exception as error:  # one bad file never stops a scan of two million
            return "cannot be opened: " + str(error).replace("\n", " ")

    with ThreadPoolExecutor(num_threads) as pool:
        # in chunks: a pool given two million tasks at once holds as many futures
        chunks = (files[i : i + 4096] for i in range(0, len(files), 4096))
        with tqdm(total=len(files), desc="Headers", unit=" files", disable=not progress) as bar:
            headers = {}
            for chunk in chunks:
                for file, header in zip(chunk, pool.map(read, chunk), strict=True):
                    headers[file] = header
                    bar.update()
    return headers


def split_held_out(
    manifest: Manifest, valid_share: float = 0.02, max_valid: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Set some files aside for validation, by a hash of their path.

    A file stays on its side when others come or go, and all segments of a file are on one side.

    Arguments
    ---------
    manifest : Manifest
    valid_share : float
        Of the files. Default 0.02; at least one file, at least one left for training.
    max_valid : int
        Validation segments at most; what is beyond is trained on. Default 1024.

    Returns
    -------
    train, valid : array, int64
        Segment numbers, for `Manifest.subset`.

    Raises
    ------
    ValueError
        If there is only one file, or the share is not between 0 and 1.
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share={valid_share}: must lie between 0 and 1")
    points = np.empty(len(manifest), np.float64)
    for item in range(len(manifest)):
        digest = hashlib.blake2b(os.fsencode(manifest.path(item)), digest_size=8).digest()
        points[item] = int.from_bytes(digest, "big") / 2**64
    files = np.unique(points)
    if len(files) < 2:
        raise ValueError(
            "a single audio file cannot be split into training and validation: give more files, "
            "or cut it up with a csv of start and stop in two files"
        )
    held_out = np.clip(np.searchsorted(files, valid_share), 1, len(files) - 1)
    by_point = np.argsort(points, kind="stable")
    valid = by_point[: np.searchsorted(points[by_point], files[held_out - 1], side="right")]
    if len(valid) > max_valid:
        # drop whole files from the end: those whose last segment is beyond the limit
        limit = max(points[valid[max_valid]], files[1])
        valid = valid[points[valid] < limit]
    train = np.setdiff1d(np.arange(len(manifest)), valid)
    return train, np.sort(valid)
