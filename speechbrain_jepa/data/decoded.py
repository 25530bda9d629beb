"""Decoding a small corpus once, when training goes through it many times."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.audio import UnreadableAudio, read_blocks, read_header
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.resampling import (
    resample,
    resampled_length,
    resampling_ratio,
    spare_blocks,
)
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import folder_lock, whole_file

WAIT = 24 * 3600.0  # seconds, for another process that decodes into the same folder
BLOCK_SECONDS = 30.0  # of a segment that are in memory at once
FORMATS = {  # name: suffix, format and subtype of soundfile
    "float": (".wav", "WAV", "FLOAT"),
    "int16": (".wav", "WAV", "PCM_16"),
    "flac": (".flac", "FLAC", "PCM_16"),
}
# of full scale: what a decoder overshoots by is clipped, as everywhere; more is another scale
LOUDEST_INT16 = 2.0


def segment_blocks(
    path: str | os.PathLike, sample_rate: int, start: int, length: int
) -> Iterator[np.ndarray]:
    """A segment of a file, mono, at 16 kHz, in blocks of half a minute or so.

    Arguments
    ---------
    path : str or path
    sample_rate : int
        Of the file, in Hz.
    start, length : int
        The segment, in samples at the file's rate.

    Yields
    ------
    array [samples], float32
        End to end they are `read_segment`'s, to the rounding of float32.

    Raises
    ------
    UnreadableAudio
        As `read_crop`.
    """
    old, new = resampling_ratio(sample_rate)
    left = resampled_length(length, sample_rate)
    blocks = round(BLOCK_SECONDS * SAMPLE_RATE / new)  # of `old` samples
    stream = read_blocks(path, start, start + length, sample_rate, blocks * old)
    if old == new:
        yield from stream
        return
    spare = spare_blocks(sample_rate)
    silence = np.zeros(spare * old, np.float32)  # before and after the segment
    held, samples = silence, blocks * new
    for wav in stream:
        held = np.concatenate([held, wav])
        if len(held) == (blocks + 2 * spare) * old:
            out = resample(held, sample_rate, blocks + 2 * spare)
            yield out[spare * new : spare * new + samples]
            held, left = held[blocks * old :], left - samples
        elif len(wav) == blocks * old:  # the first: what comes after is not known yet
            out = resample(held, sample_rate, blocks + spare)
            yield out[spare * new : samples]
            held, left = held[(blocks - spare) * old :], left - (samples - spare * new)
    if left:
        out = resample(held, sample_rate, spare + -(-left // new))
        yield out[spare * new : spare * new + left]


class TooLoud(Exception):
    """A segment whose full scale is not 1: 16 bits would cut it off."""


def write_segment(
    file: str | os.PathLike | BinaryIO,
    kind: str,
    path: str | os.PathLike,
    sample_rate: int,
    start: int,
    length: int,
) -> None:
    """Write a segment of a file as 16 kHz mono audio.

    Arguments
    ---------
    file : path or seekable binary file
        What is written to.
    kind : str
        "float", 32-bit wav; "int16", 16-bit wav; or "flac", of 16 bits. In 16 bits, what exceeds
        full scale is clipped.
    path, sample_rate, start, length
        As in `segment_blocks`.

    Raises
    ------
    UnreadableAudio
        As `read_crop`.
    TooLoud
        If it exceeds twice full scale, and `kind` is of 16 bits.
    """
    _, container, subtype = FORMATS[kind]
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, subtype, format=container) as out:
        for wav in segment_blocks(path, sample_rate, start, length):
            if kind != "float" and np.abs(wav).max(initial=0) > LOUDEST_INT16:
                raise TooLoud
            out.write(wav)


def decode_once(
    manifest: Manifest,
    data_folder: str | os.PathLike | None,
    folder: str | os.PathLike,
    skipped: SkippedFiles | None = None,
    num_threads: int | None = None,
    progress: bool = True,
    kind: str = "float",
) -> Manifest:
    """Write every segment as a 16 kHz mono file, which crops are read from fastest.

    An hour of audio takes 0.23 GB as "float", half as much as "int16", less as "flac". Files that
    are there from before are kept unless the original has changed; what a killed process left
    unfinished is removed, and another that decodes into the same folder is waited for. Segments
    that cannot be decoded are left out.

    Arguments
    ---------
    manifest : Manifest
    data_folder : str, path or None
        What its relative paths are relative to.
    folder : str or path
        Where the files go.
    skipped : SkippedFiles or None
        Told of files that cannot be decoded.
    num_threads : int or None
        Default: one for each CPU.
    progress : bool
        Show a bar. Default True.
    kind : str
        "float" (default), "int16" or "flac", as in `write_segment`.

    Returns
    -------
    Manifest
        Of the new files, with absolute paths.

    Raises
    ------
    ValueError
        If nothing can be decoded, or `kind` is none of the three.
    OSError
        If the disk is full.

    Example
    -------
    >>> import numpy as np
    >>> from speechbrain_jepa.data.scan import scan_folder
    >>> folder = getfixture("tmp_path")
    >>> noise = np.random.default_rng(0).normal(0, 0.1, 22_050)
    >>> soundfile.write(folder / "noise.flac", noise, 22_050)
    >>> manifest, skipped = scan_folder(folder, folder / "cache", progress=False)
    >>> decoded = decode_once(manifest, folder, folder / "cache" / "decoded", progress=False)
    >>> decoded.length, decoded.sample_rate
    (array([16000]), array([16000], dtype=int32))
    """
    if kind not in FORMATS:
        raise ValueError(f"decode_once={kind}: give one of {', '.join(FORMATS)}, or False")
    folder = Path(folder).absolute()

    def decode(item: int):
        path = manifest.path(item)
        source = shards.join(data_folder or "", path)
        rate, start = int(manifest.sample_rate[item]), int(manifest.start[item])
        length, changed = int(manifest.length[item]), int(manifest.mtime_ns[item])
        samples = resampled_length(length, rate)
        # one that is too loud for 16 bits is there as "float"
        places = {name: folder / _name(source, start, length, name) for name in (kind, "float")}
        there = [out for out in places.values() if _is_decoded(out, samples, changed)]
        for name in () if there else places:
            try:
                with whole_file(places[name]) as partial:
                    write_segment(partial, name, source, rate, start, length)
                    os.utime(partial, ns=(changed, changed))
                there.append(places[name])
                break
            except UnreadableAudio as error:
                return path, error.reason
            except TooLoud:
                continue
        out = there[0]
        return str(out), 0, samples, SAMPLE_RATE, samples, out.stat().st_size, changed

    rows = []
    with (
        folder_lock(folder, "name another --cache_folder", WAIT),
        ThreadPoolExecutor(num_threads or os.cpu_count()) as pool,
    ):
        done = pool.map(decode, range(len(manifest)))
        try:
            for row in tqdm(done, "Decoding", len(manifest), unit=" files", disable=not progress):
                if len(row) > 2:
                    rows.append(row)
                elif skipped is not None:
                    skipped.add(*row)
        except BaseException:  # a full disk, or an interrupt: the others are not begun
            pool.shutdown(cancel_futures=True)
            raise
    if not rows:
        raise ValueError(f"none of the {len(manifest)} files below {data_folder} can be decoded")
    return Manifest.from_rows(rows)


def _name(source: str, start: int, length: int, kind: str) -> str:
    """Of a segment's file: short and ASCII whatever the source is called."""
    segment = os.fsencode(f"{os.path.abspath(source)}@{start}+{length}")
    ending = ("-16" if kind == "int16" else "") + FORMATS[kind][0]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem)[:48]
    return f"{readable}-{hashlib.blake2b(segment, digest_size=16).hexdigest()}{ending}"


def _is_decoded(out: Path, samples: int, changed: int) -> bool:
    """Whether a whole copy of this version of the file is there."""
    try:
        if out.stat().st_mtime_ns != changed:
            return False
        return read_header(out) == (samples, SAMPLE_RATE)
    except (OSError, UnreadableAudio):
        return False
