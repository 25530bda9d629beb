"""Finding audio: headers are read once, and what they say is kept in a cache folder."""

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.audio import UnreadableAudio, read_header, read_samples
from speechbrain_jepa.data.listing import EXTENSIONS, NUM_THREADS, list_audio
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.segments_csv import read_rows
from speechbrain_jepa.data.shards import ShardMember
from speechbrain_jepa.data.shares import Share, missing_shares
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.files import folder_lock, partial_path, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
LONG_MP3 = 300.0  # seconds, from which on a crop costs more to find than to decode
CROP_SECONDS = 2.1
WAIT = 24 * 3600.0  # seconds, for another process that scans into the same cache folder


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = partial_path(folder / "write-test")
        probe.touch()
        probe.unlink(missing_ok=True)  # the holder of the folder may have removed it
    except OSError as error:
        raise PermissionError(
            f"cache_folder={folder} cannot be written to ({error.strerror}): "
            "name another with --cache_folder or --output_folder"
        ) from error


def _held(cache_folder: Path):
    """The cache folder for this process alone: another that scans into it is waited for, and leaves
    its result there."""
    _check_writable(cache_folder)
    return folder_lock(cache_folder, "name another --cache_folder", WAIT)


def scan_folder(
    data_folder: str | os.PathLike,
    cache_folder: str | os.PathLike,
    min_seconds: float = 0.2,
    num_threads: int = NUM_THREADS,
    progress: bool = True,
    share: Share | None = None,
) -> tuple[Manifest, SkippedFiles]:
    """Find the audio files below a folder, those inside tar shards too, and read their headers.

    The manifest is kept in `cache_folder`; the next scan reads only the headers of files that are
    new or changed (by size and modification time). Hidden files and folders are passed over, linked
    ones followed. Another process that scans into the same cache folder is waited for. In a
    distributed run, call it on the main process and `Manifest.load` on the
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
        That list folders, look at files and read headers. Default 16.
    progress : bool
        Show a bar. Default True.
    share : Share or None
        Look at the files of this share of the folder alone. None (default): at all.

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
    OSError
        If its disk is full.
    """
    data_folder, cache_folder = Path(data_folder), Path(cache_folder)
    if not data_folder.exists():
        raise FileNotFoundError(f"data_folder={data_folder} does not exist")
    if not data_folder.is_dir():
        raise NotADirectoryError(f"data_folder={data_folder} is not a folder")
    missing = missing_shares(data_folder)
    if missing:
        logger.warning(
            "data_folder=%s was prepared in %d shares, of which %d are missing or unfinished: %s%s",
            *(data_folder, missing[0].number, len(missing), ", ".join(map(str, missing[:20]))),
            ", ..." if len(missing) > 20 else "",
        )
    with _held(cache_folder):
        extensions = EXTENSIONS | {shards.EXTENSION}
        found, unreadable = list_audio(
            os.fspath(data_folder), extensions, num_threads, share.has if share else None
        )
        if not found:
            part = "" if share is None else f" is in share {share}"
            raise ValueError(
                f"no audio file below data_folder={data_folder}{part}: looked for names ending in "
                f"{' '.join(sorted(extensions))}"
            )
        entries = [(path, 0, None, size, mtime) for path, size, mtime in found]
        return _manifest_of(
            entries,
            data_folder,
            cache_folder,
            _source(data_folder.resolve(), share),
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
    num_threads: int = NUM_THREADS,
    progress: bool = True,
    share: Share | None = None,
) -> tuple[Manifest, SkippedFiles]:
    """Take the audio that a SpeechBrain csv lists, and read the files' headers.

    Arguments
    ---------
    train_csv : str or path
        With the columns ID, duration, wav, and optionally start and stop (in samples). `$data_root`
        and `{data_root}` in wav stand for `data_folder`. A tar shard in wav without start and stop
        stands for all audio inside.
    cache_folder, min_seconds, num_threads, progress, share
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
    OSError
        If its disk is full.
    """
    train_csv, cache_folder = Path(train_csv), Path(cache_folder)
    if not train_csv.is_file():
        raise FileNotFoundError(f"train_csv={train_csv} does not exist")
    root = "" if data_folder is None else os.path.abspath(data_folder)
    with _held(cache_folder):
        entries = read_rows(train_csv, root, num_threads, share.has if share else None)
        if not entries:
            part = "" if share is None else f" in share {share}"
            raise ValueError(f"train_csv={train_csv} has no rows{part}")
        source = _source(f"{train_csv.resolve()} {root}", share)
        return _manifest_of(
            entries, Path(root), cache_folder, source, min_seconds, num_threads, progress
        )


def _source(place, share: Share | None) -> str:
    return f"{place}" if share is None else f"{place}, share {share}"


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
    state_file, skipped_file = cache_folder / "manifest.json", cache_folder / "skipped.csv"
    before, unused, manifest = _last_scan(state_file)
    if manifest is not None and before == state:
        skipped = SkippedFiles(skipped_file)
        logger.info(
            "%d audio segments, unchanged since the last scan; %d files skipped (%s)",
            len(manifest),
            len(skipped),
            skipped.path,
        )
        return manifest, skipped

    entries, broken_shards, indexed = _open_shards(entries, root, num_threads)
    headers = {}
    is_same = before.get("source") == source and before.get("format_version") == FORMAT_VERSION
    if manifest is not None and is_same:
        headers = {**manifest.headers(), **unused}
    headers.update(indexed)
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
    # what the last scan said of files that have changed since no longer holds
    skipped = SkippedFiles.write(skipped_file, reasons)
    if not rows:
        raise ValueError(
            f"none of the {len(files) + len(broken_shards)} audio files of {source} can be used: "
            f"the reasons are in {skipped_file}"
        )
    state_file.unlink(missing_ok=True)  # a scan killed while it saves is done again
    Manifest.from_rows(rows).save(cache_folder)
    used = {(row[0], *row[5:]) for row in rows}
    state["unused"] = [(file, headers[file]) for file in sorted(files - used)]
    write_text(state_file, json.dumps(state))
    manifest = Manifest.load(cache_folder)
    logger.info(
        "%d audio segments, %.1f hours; %d files skipped (%s)",
        len(manifest),
        manifest.seconds.sum() / 3600,
        len(skipped),
        skipped.path,
    )
    told = long_mp3(manifest, root)
    if told:
        logger.warning(told)
    return manifest, skipped


def long_mp3(manifest: Manifest, root: str | os.PathLike) -> str | None:
    """What the long mp3 files of a corpus cost, and what would help; None where there is none.

    An mp3 has no table of where its frames are: to find a crop, the decoder reads all that comes
    before. The cost is measured here, in the middle of the longest one.
    """
    seconds = manifest.seconds
    candidates = np.flatnonzero(seconds > LONG_MP3).tolist()
    items = [item for item in candidates if manifest.path(item).lower().endswith((".mp3", ".mp2"))]
    if not items:
        return None
    longest = max(items, key=seconds.__getitem__)
    path, rate = shards.join(root, manifest.path(longest)), int(manifest.sample_rate[longest])
    begin, samples = int(manifest.start[longest]), round(CROP_SECONDS * rate)
    costs = []
    try:
        for start in (begin, begin + int(manifest.length[longest]) // 2):
            began = time.perf_counter()
            read_samples(path, start, start + samples, rate)
            costs.append(1000 * (time.perf_counter() - began))
    except UnreadableAudio:  # training will say so
        return None
    near, far = costs
    hours, all_hours = seconds[items].sum() / 3600, seconds.sum() / 3600
    return (
        f"{len(items)} of {len(manifest)} segments are mp3 of more than {LONG_MP3 / 60:.0f} "
        f"minutes ({hours:.1f} of {all_hours:.1f} hours): a crop in the middle of the longest, "
        f"{seconds[longest] / 60:.0f} minutes, takes {far:.0f} ms to read, at its beginning "
        f"{near:.1f} ms. `python -m speechbrain_jepa.prepare` writes the corpus "
        f"once as FLAC, where every crop costs what the first one does"
        + (f": {far / near:.0f} times less here" if far > 2 * near else "")
    )


def _last_scan(state_file: Path) -> tuple[dict, dict, Manifest | None]:
    """What the last scan left: its state, the headers that are in no row of its manifest, and the
    manifest. One that was killed, or whose files are damaged, left nothing."""
    if not state_file.exists():
        return {}, {}, None
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        unused = {
            (str(path), int(size), int(mtime)): _header(header)
            for (path, size, mtime), header in state.pop("unused")
        }
        return state, unused, Manifest.load(state_file.parent)
    except Exception as error:  # json of any shape
        logger.warning("%s cannot be read (%s): the scan is made anew", state_file, error)
        return {}, {}, None


def _header(header: str | list[int]) -> str | tuple[int, int]:
    """As it was before it went through json."""
    if isinstance(header, str):
        return header
    samples, sample_rate = header
    return int(samples), int(sample_rate)


def _open_shards(entries, root: Path, num_threads: int):
    """The entries with the audio in each tar shard in its place; what is wrong with shards; and the
    headers that the index of a shard knows."""

    def look(path: str):
        index = shards.read_index(path)
        return (index, None) if index else shards.list_members(path, EXTENSIONS)

    opened, problems, headers = [], [], {}
    num_shards = num_members = 0
    are_shards = [
        os.path.splitext(path)[1].lower() == shards.EXTENSION and (start, stop) == (0, None)
        for path, start, stop, *_ in entries
    ]
    paths = [os.path.join(root, entry[0]) for entry, found in zip(entries, are_shards) if found]
    with ThreadPoolExecutor(num_threads) as pool:
        listed = list(pool.map(look, paths))
    for entry, is_shard in zip(entries, are_shards):
        path, _, _, _, mtime = entry
        if not is_shard:
            opened.append(entry)
            continue
        members, problem = listed[num_shards]
        num_shards, num_members = num_shards + 1, num_members + len(members)
        if problem or not members:
            problems.append((path, problem or "holds no audio file"))
        for name, (offset, size, *header) in members.items():
            member = ShardMember(f"{path}{shards.SEPARATOR}{name}", offset, size)
            opened.append((member, 0, None, size, mtime))
            if header:
                headers[member, size, mtime] = tuple(header)
    if num_shards:
        logger.info("%d audio files in %d tar shards, read in place", num_members, num_shards)
    return opened, problems, headers


def read_headers(files, root: Path, num_threads: int, progress: bool) -> dict:
    """Samples and sample rate, or what is wrong, by (path below `root`, size, mtime_ns)."""

    def read(file):
        try:
            return read_header(shards.join(root, file[0]))
        except UnreadableAudio as error:  # one bad file never stops a scan of two million
            return error.reason

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
