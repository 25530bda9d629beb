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
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.shards import ShardMember, audio_source

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
LOWEST_RATE = 1_000  # Hz; a slower signal is no audio
ARRAYS = (
    *("path_bytes", "path_ends", "start", "length"),
    *("sample_rate", "total", "offset", "size", "mtime_ns"),
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
        with self._open("a") as out:
            writer = csv.writer(out, lineterminator="\n")
            if out.tell() == 0:
                writer.writerow(["file", "reason"])
            writer.writerow([file, reason])
        return True

    def _open(self, mode: str):
        return open(self.path, mode, newline="", encoding="utf-8", errors="surrogateescape")

    def _catch_up(self) -> None:
        """Read what this or another process has written since."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._bytes_read:
            self._files = set()
            if size:
                with self._open("r") as file:
                    self._files = {row["file"] for row in csv.DictReader(file)}
            self._bytes_read = size


def list_audio(
    folder: str, extensions: frozenset[str] = EXTENSIONS
) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """Every audio file below a folder (relative path, size, modification time), sorted; and what
    could not be looked at (relative path, reason). What is hidden is passed over."""
    found, unreadable = [], []
    folder = os.path.join(folder, "")
    pending, links, visited = [folder], [], set()
    while pending or links:
        # linked folders last: what is also there under its real name is found under that name,
        # once, and a link to a folder above ends here
        current = pending.pop() if pending else links.pop()
        try:
            stat = os.stat(current)
            if (stat.st_dev, stat.st_ino) in visited:
                continue
            visited.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append((current[len(folder) :], f"cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = entry.path[len(folder) :]
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else pending).append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in extensions:
                    stat = entry.stat()
                    found.append((path, stat.st_size, stat.st_mtime_ns))
            except OSError as error:  # a link to nowhere, or to itself
                unreadable.append((path, f"cannot be opened: {error.strerror}"))
    return sorted(found), unreadable


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
    """Find the audio files below a folder, those inside tar shards too, and read their headers.

    The manifest is kept in `cache_folder`; the next scan reads only the headers of files that are
    new or changed (by size and modification time). Hidden files and folders are passed over, linked
    ones followed. In a distributed run, call it on the main process and `Manifest.load` on the
    others.

    Arguments
    ---------
    data_folder : str or path
        Wav, flac, ogg, opus, mp3, aiff and whatever else libsndfile reads, at any sample rate and
        any number of channels, in any tree of folders and uncompressed tars.
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
    extensions = EXTENSIONS | {shards.EXTENSION}
    found, unreadable = list_audio(os.fspath(data_folder), extensions)
    if not found:
        raise ValueError(
            f"no audio file below data_folder={data_folder}: looked for names ending in "
            f"{' '.join(sorted(extensions))}"
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
        unreadable,
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
        and `{data_root}` in wav stand for `data_folder`. A tar shard in wav without start and stop
        stands for all audio inside.
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
    root = "" if data_folder is None else os.path.abspath(data_folder)
    entries, stats = [], {}
    with open(train_csv, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = {"ID", "duration", "wav"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(
                f"train_csv={train_csv} lacks the column {', '.join(sorted(missing))}: "
                "SpeechBrain's columns are ID, duration, wav and optionally start, stop"
            )
        for row in reader:
            place = f"{train_csv}, line {reader.line_num}"
            path = _csv_path(row["wav"], root, place)
            try:
                start = int(float(row.get("start") or 0))
                stop = int(float(row.get("stop") or start))
            except ValueError as error:
                raise ValueError(f"{place}: start or stop: {error}") from error
            if not 0 <= start <= stop:
                raise ValueError(
                    f"{place}: start={start}, stop={stop}: 0 <= start <= stop is meant"
                )
            if path not in stats:
                try:
                    stat = os.stat(os.path.join(root, path))
                    stats[path] = stat.st_size, stat.st_mtime_ns
                except OSError:
                    stats[path] = -1, -1  # reading the header will say what is wrong
            # as in SpeechBrain, a stop equal to start, or none, is the end of the file
            entries.append((path, start, stop if stop > start else None, *stats[path]))
    if not entries:
        raise ValueError(f"train_csv={train_csv} has no rows")
    source = f"{train_csv.resolve()} {root}"
    return _manifest_of(
        entries, Path(root), cache_folder, source, min_seconds, num_threads, progress
    )


def _csv_path(wav: str | None, root: str, place: str) -> str:
    """The wav column with `$data_root` filled in, relative to `root` where it lies below it."""
    if not wav:
        raise ValueError(f"{place}: the column wav is empty")
    if "$data_root" in wav or "{data_root}" in wav:
        if not root:
            raise ValueError(f"{place}: {wav} needs a data_folder: give --data_folder")
        wav = wav.replace("$data_root", root).replace("{data_root}", root)
    prefix = os.path.join(root, "")
    return wav[len(prefix) :] if root and wav.startswith(prefix) else wav


def _manifest_of(
    entries, root, cache_folder, source, min_seconds, num_threads, progress, unreadable=()
):
    """Manifest of (path, start, stop, size, mtime_ns) entries; stop None is the file's end."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    state = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "min_seconds": min_seconds,
        "entries": digest.hexdigest(),
    }
    state_file = cache_folder / "manifest.json"
    skipped = SkippedFiles(cache_folder / "skipped.csv")
    before = json.loads(state_file.read_text()) if state_file.exists() else {}
    unused = before.pop("unused", [])  # headers that are in no row of the manifest
    if before == state:
        manifest = Manifest.load(cache_folder)
        logger.info(
            "%d audio segments, unchanged since the last scan; %d files skipped (%s)",
            len(manifest),
            len(skipped),
            skipped.path,
        )
        return manifest, skipped

    entries, broken_shards = _open_shards(entries, root)
    headers = {}
    if before.get("source") == source and before.get("format_version") == FORMAT_VERSION:
        headers = Manifest.load(cache_folder).headers()
        headers.update((tuple(file), header) for file, header in unused)
    files = {(path, size, mtime) for path, _, _, size, mtime in entries}
    headers.update(read_headers(sorted(files - headers.keys()), root, num_threads, progress))

    rows, reasons = [], [*unreadable, *broken_shards]
    for path, start, stop, size, mtime in entries:
        header = headers[path, size, mtime]
        if isinstance(header, str):
            reasons.append((path, header))
            continue
        total, rate = header
        length = (total if stop is None else min(stop, total)) - start
        if length < max(min_seconds * rate, 1):
            segment = "" if (start, stop) == (0, None) else f", from sample {start} on"
            duration = f"{max(length, 0) / rate:.3f} s"
            reasons.append((path, f"too short: {duration}{segment}, min_seconds={min_seconds}"))
        else:
            rows.append((path, start, length, rate, total, size, mtime))
    _write_skipped(skipped.path, reasons)
    if not rows:
        raise ValueError(
            f"none of the {len(files) + len(broken_shards)} audio files of {source} can be used: "
            f"the reasons are in {skipped.path}"
        )
    state_file.unlink(missing_ok=True)  # a scan killed while it saves is done again
    Manifest.from_rows(rows).save(cache_folder)
    used = {(row[0], *row[5:]) for row in rows}
    state["unused"] = [(file, headers[file]) for file in sorted(files - used)]
    state_file.write_text(json.dumps(state))
    manifest, skipped = Manifest.load(cache_folder), SkippedFiles(skipped.path)
    logger.info(
        "%d audio segments, %.1f hours; %d files skipped (%s)",
        len(manifest),
        manifest.seconds.sum() / 3600,
        len(skipped),
        skipped.path,
    )
    return manifest, skipped


def _open_shards(entries, root: Path):
    """The entries with the audio in each tar shard in its place; and what is wrong with shards."""
    opened, problems, num_shards, num_members = [], [], 0, 0
    for entry in entries:
        path, start, stop, _, mtime = entry
        is_shard = os.path.splitext(path)[1].lower() == shards.EXTENSION
        if not is_shard or (start, stop) != (0, None):
            opened.append(entry)
            continue
        members, problem = shards.list_members(os.path.join(root, path), EXTENSIONS)
        num_shards, num_members = num_shards + 1, num_members + len(members)
        if problem or not members:
            problems.append((path, problem or "holds no audio file"))
        for name, (offset, size) in members.items():
            member = ShardMember(f"{path}{shards.SEPARATOR}{name}", offset, size)
            opened.append((member, 0, None, size, mtime))
    if num_shards:
        logger.info("%d audio files in %d tar shards, read in place", num_members, num_shards)
    return opened, problems


def _write_skipped(path: Path, lines: list[tuple[str, str]]) -> None:
    """A new list: what the last scan said of files that have changed since no longer holds."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "reason"))
        first_reasons = dict(reversed(lines))
        writer.writerows(
            (path, first_reasons.pop(path)) for path, _ in lines if path in first_reasons
        )


# libsndfile quietly shortens a file that was cut off to what is there, and notes it in its log
_SIZE_NOTE = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
# sizes that programs writing to a pipe put in place of the one they do not know yet
_UNKNOWN_SIZE = 2**31 - 2**16


def _truncation(log: str) -> str | None:
    """What libsndfile's log says of an end that is missing: more than 1 % of the samples (headers
    off by a few bytes are common, and harmless), or an Ogg stream that ends inside a page."""
    note = _SIZE_NOTE.search(log)
    if note:
        promised, found = map(int, note.groups())
        if found < 0.99 * promised and promised < _UNKNOWN_SIZE:
            return f"truncated: {found} of {promised} bytes of samples"
    if "lacks an end-of-stream bit" in log and "Junk after the last page" in log:
        return "truncated: the Ogg stream ends inside a page"
    return None


def _read_header(path: str, size: int) -> tuple[int, int] | str:
    """(samples, sample rate), or the reason why the file cannot be used."""
    if size == 0:
        return "empty"
    try:
        with audio_source(path) as source:
            info = soundfile.info(source)
        if info.samplerate < LOWEST_RATE:
            return f"not audio: {info.samplerate} Hz, below {LOWEST_RATE} Hz"
        return _truncation(info.extra_info) or (info.frames, info.samplerate)
    except Exception as error:  # one bad file never stops a scan of two million
        try:
            with path.open() if isinstance(path, ShardMember) else open(path, "rb"):
                reason = getattr(error, "error_string", str(error))
        except OSError as system_error:  # libsndfile says "System error" only
            reason = system_error.strerror
        return "cannot be opened: " + " ".join(reason.split())


def read_headers(files, root: Path, num_threads: int, progress: bool) -> dict:
    """Samples and sample rate, or what is wrong, by (path below `root`, size, mtime_ns)."""

    def read(file):
        return _read_header(shards.join(root, file[0]), file[1])

    with ThreadPoolExecutor(num_threads) as pool:
        # in chunks: a pool given two million tasks at once holds as many futures
        chunks = (files[i : i + 4096] for i in range(0, len(files), 4096))
        with tqdm(total=len(files), desc="Headers", unit=" files", disable=not progress) as bar:
            headers = {}
            for chunk in chunks:
                for file, header in zip(chunk, pool.map(read, chunk)):
                    headers[file] = header
                    bar.update()
    return headers


def split_held_out(
    manifest: Manifest,
    valid_share: float = 0.02,
    max_valid: int = 1024,
    min_valid: int = 1,
    data_folder: str | os.PathLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Set some files aside for validation, by a hash of their path.

    A file stays on its side when others come or go, and all segments of a file are on one side.

    Arguments
    ---------
    manifest : Manifest
    valid_share : float
        Of the files. Default 0.02.
    max_valid : int
        Validation segments at most; files beyond are trained on. Default 1024.
    min_valid : int
        Validation files at least, as far as one is left for training. Default 1.
    data_folder : str, path, or None
        If given, files are decoded to the end before they are set aside, so that validation
        never rests on broken ones: those are left to training, which replaces and reports them.

    Returns
    -------
    train, valid : array, int64
        Segment numbers, ascending, for `Manifest.subset`.

    Raises
    ------
    ValueError
        If there is only one file, or a number is out of its range.

    Example
    -------
    >>> rows = [(f"{name}.wav", 0, 8_000, 8_000, 8_000, 1, 1) for name in "abcdef"]
    >>> train, valid = split_held_out(Manifest.from_rows(rows), min_valid=2)
    >>> len(train), len(valid)
    (4, 2)
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share={valid_share}: must lie between 0 and 1")
    for name, value in {"max_valid": max_valid, "min_valid": min_valid}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    # 64-bit hashes: two of two million files share one with a chance of 1e-7, and then a side
    hashes = [
        int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big")
        for path in manifest.raw_paths()
    ]
    hashes = np.array(hashes, np.uint64)
    files, first, segments = np.unique(hashes, return_index=True, return_counts=True)
    if len(files) < 2:
        raise ValueError(
            "a single audio file cannot be split into training and validation: give more files, "
            "or cut it in two"
        )
    wanted = np.searchsorted(files, np.uint64(valid_share * 2**64))
    # as many whole files as fit; the first one in any case
    wanted = min(wanted, np.searchsorted(np.cumsum(segments), max_valid, side="right"))
    held_out = []
    for number, (file, item) in enumerate(zip(files, first)):
        enough = number >= wanted and len(held_out) >= min_valid
        if enough or len(held_out) == len(files) - 1:
            break
        if data_folder is None or _decodes(shards.join(data_folder, manifest.path(item))):
            held_out.append(file)
    if not held_out:
        raise ValueError(f"none of the {len(files)} files below {data_folder} can be decoded")
    is_valid = np.isin(hashes, held_out)
    return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)


def _decodes(path: str) -> bool:
    try:
        with audio_source(path) as source, soundfile.SoundFile(source) as file:
            frames = 0
            for block in file.blocks(blocksize=2**16, dtype="float32"):
                frames += len(block)
                if not np.isfinite(block).all():
                    return False
            return frames == file.frames
    except (OSError, RuntimeError):  # soundfile's errors are RuntimeErrors
        return False
