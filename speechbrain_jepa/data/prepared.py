"""A corpus decoded once into tar shards, each with an index: written in shares, read unscanned.

```
out/share-00003-of-00016/000000.tar           audio files of 16 kHz mono, WebDataset's layout
                         000000.index.json    where each begins, and how long it is
                         000000.sources.json  what each was made of
                         complete.json        written last
                         scan/                the scan of the corpus' share, skipped.csv
```
"""

import io
import json
import logging
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.decoded import FORMATS, TooLoud, write_segment
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.resampling import resampled_length
from speechbrain_jepa.data.shares import COMPLETE, missing_shares, share_folders
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import full_disk_named, whole_file, write_text

logger = logging.getLogger(__name__)

SHARD_BYTES = 10**9
SOURCES = ".sources.json"
SHARDS = "[0-9]" * 6 + shards.EXTENSION
READ_AHEAD = 4  # segments decoded in advance, for each thread


@dataclass
class Prepared:
    """What a share holds.

    Arguments
    ---------
    segments : int
    hours : float
        Of audio.
    size : int
        Bytes of its shards.
    skipped : int
        Files that could not be used, listed in `scan/skipped.csv`.
    """

    segments: int
    hours: float
    size: int
    skipped: int


def write_share(
    manifest: Manifest,
    skipped: SkippedFiles,
    data_folder: str | os.PathLike,
    folder: str | os.PathLike,
    kind: str = "flac",
    shard_bytes: int = SHARD_BYTES,
    num_threads: int = 1,
    progress: bool = True,
) -> Prepared:
    """Write every segment of a manifest into tar shards, 16 kHz mono; what is there is kept.

    A shard appears when it is complete, and its index after it, so that a run that was killed goes
    on behind the last one. A shard with a source that has changed since, or is gone, is made anew.

    Arguments
    ---------
    manifest : Manifest
        Of the share.
    skipped : SkippedFiles
        Told of what cannot be decoded.
    data_folder : str or path
        What the manifest's paths are relative to.
    folder : str or path
        Of the share, for this process alone (`folder_lock`).
    kind : str
        "flac" (default), "int16" or "float", as in `write_segment`; a segment that is too loud for
        16 bits is "float" among the others.
    shard_bytes : int
        A shard ends when it has so many. Default 1e9.
    num_threads : int
        That decode. Default 1.
    progress : bool
        Show a bar. Default True.

    Returns
    -------
    Prepared

    Raises
    ------
    OSError
        If the disk is full.
    """
    folder = Path(folder)
    (folder / COMPLETE).unlink(missing_ok=True)
    segments = {_segment(manifest, item): item for item in range(len(manifest))}
    number, settings = 0, {"kind": kind}
    for shard in sorted(folder.glob(SHARDS)):
        number = max(number, int(shard.stem) + 1)
        made_of = _sources(shard, settings)
        if made_of is None or not segments.keys() >= set(made_of):
            for file in (shards.index_of(shard), _beside(shard, SOURCES), shard):
                Path(file).unlink(missing_ok=True)
            continue
        for segment in made_of:
            del segments[segment]
    left = list(segments.values())

    def encode(item: int) -> tuple[int, str, bytes] | UnreadableAudio:
        source = shards.join(data_folder, manifest.path(item))
        place = (manifest.sample_rate[item], manifest.start[item], manifest.length[item])
        for name in dict.fromkeys((kind, "float")):
            try:
                file = io.BytesIO()
                write_segment(file, name, source, *map(int, place))
                return item, FORMATS[name][0], file.getvalue()
            except UnreadableAudio as error:
                return UnreadableAudio(manifest.path(item), error.reason)
            except TooLoud:
                continue
        raise AssertionError("float is never too loud")

    with ThreadPoolExecutor(num_threads) as pool:
        ahead = _in_order(pool, encode, left, num_threads * READ_AHEAD)
        bar = tqdm(ahead, "Preparing", len(left), unit=" files", disable=not progress)
        encoded = _readable(bar, skipped)
        try:
            while first := next(encoded, None):
                shard = folder / f"{number:06d}{shards.EXTENSION}"
                _write_shard(shard, first, encoded, manifest, shard_bytes, settings)
                number += 1
        except BaseException:  # a full disk, or an interrupt: the others are not begun
            pool.shutdown(cancel_futures=True)
            raise
    return _complete(folder, len(skipped))


def _in_order(pool, function, items: list, ahead: int) -> Iterator:
    """Results in the order of the items, so many of which are worked on at once."""
    rest = iter(items)
    pending = deque(pool.submit(function, item) for item in islice(rest, ahead))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in islice(rest, 1))


def _readable(encoded, skipped: SkippedFiles) -> Iterator[tuple[int, str, bytes]]:
    for result in encoded:
        if isinstance(result, UnreadableAudio):
            skipped.report([(result.path, result.reason)])
        else:
            yield result


def _write_shard(shard: Path, first, encoded, manifest, shard_bytes: int, settings: dict) -> None:
    """One tar, what its members were made of, and its index."""
    members: dict[str, tuple[int, int, int]] = {}
    made_of = []
    with whole_file(shard) as partial, tarfile.open(partial, "w") as tar:
        result = first
        while result is not None:
            item, suffix, content = result
            member = tarfile.TarInfo(_member_name(manifest, item, suffix, members))
            member.size = len(content)
            with full_disk_named(shard.parent):
                tar.addfile(member, io.BytesIO(content))
            padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            length, rate = int(manifest.length[item]), int(manifest.sample_rate[item])
            place = (tar.offset - padded, len(content), resampled_length(length, rate))
            members[member.name] = place
            made_of.append(_segment(manifest, item))
            result = next(encoded, None) if tar.offset < shard_bytes else None
    write_text(_beside(shard, SOURCES), json.dumps({**settings, "sources": made_of}))
    shards.write_index(shard, members, SAMPLE_RATE)


def _segment(manifest: Manifest, item: int) -> tuple:
    """What a member is made of."""
    place = (manifest.start, manifest.length, manifest.sample_rate, manifest.offset)
    state = (manifest.size, manifest.mtime_ns)
    return (str(manifest.path(item)), *(int(array[item]) for array in (*place, *state)))


def _member_name(manifest: Manifest, item: int, suffix: str, taken) -> str:
    """The source's path with another ending: nothing hidden in it, nothing that climbs."""
    path = os.path.splitext(str(manifest.path(item)).replace(shards.SEPARATOR, "/"))[0]
    parts = (re.sub(r"^\.", "_", part) for part in path.replace("\0", "_").split("/") if part)
    stem = "/".join(parts) or "_"
    start, length = int(manifest.start[item]), int(manifest.length[item])
    if (start, length) != (0, int(manifest.total[item])):
        stem += f"@{start}+{length}"
    stem = stem[: shards.LONGEST_NAME - 32]
    number, name = 1, stem + suffix
    while name in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    return name


def _beside(shard: Path, ending: str) -> Path:
    return shard.with_name(shard.stem + ending)


def _sources(shard: Path, settings: dict) -> list[tuple] | None:
    """What the members of a whole shard, made with these settings, were made of."""
    try:
        found = json.loads(_beside(shard, SOURCES).read_text(encoding="utf-8"))
        made_of = [tuple(segment) for segment in found.pop("sources")]
        index = shards.read_index(os.fspath(shard))
        return made_of if index and found == settings and len(index) == len(made_of) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _complete(folder: Path, skipped: int) -> Prepared:
    """Count what a share holds, and say that it is all there."""
    size = segments = samples = 0
    for shard in folder.glob(SHARDS):
        index = shards.read_index(os.fspath(shard)) or {}
        size += shard.stat().st_size
        segments += len(index)
        samples += sum(length for _, _, length, _ in index.values())
    prepared = Prepared(segments, samples / SAMPLE_RATE / 3600, size, skipped)
    write_text(folder / COMPLETE, json.dumps(vars(prepared)))
    return prepared


def check_shares(folder: str | os.PathLike) -> Prepared:
    """What all shares of a prepared folder hold together.

    Raises
    ------
    ValueError
        If the folder holds no share, shares of different numbers, or not all that there must be:
        the message names those that are missing or unfinished.
    """
    folder = Path(folder)
    if not folder.is_dir() or not share_folders(folder):
        raise ValueError(f"{folder} holds no share of a prepared corpus")
    missing = missing_shares(folder)
    if missing:
        named = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise ValueError(
            f"{folder} is not complete: of {missing[0].number} shares {len(missing)} are missing "
            f"or unfinished: run the command again with --shard {named}"
        )
    files = [folder / share.folder / COMPLETE for share in share_folders(folder)]
    parts = [Prepared(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    names = ("segments", "hours", "size", "skipped")
    return Prepared(*(sum(getattr(part, name) for part in parts) for name in names))
