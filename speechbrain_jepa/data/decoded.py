"""Decoding a small corpus once, when training goes through it many times."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
from tqdm import tqdm

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.audio import UnreadableAudio, read_header
from speechbrain_jepa.data.crops import read_segment
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.resampling import resampled_length
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import folder_lock, whole_file

WAIT = 24 * 3600.0  # seconds, for another process that decodes into the same folder


def decode_once(
    manifest: Manifest,
    data_folder: str | os.PathLike | None,
    folder: str | os.PathLike,
    skipped: SkippedFiles | None = None,
    num_threads: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Write every segment as 16 kHz mono float wav, which crops are read from fastest.

    Takes 0.23 GB an hour of audio. Files that are there from before are kept unless the original
    has changed; what a killed process left unfinished is removed, and another that decodes into the
    same folder is waited for. Segments that cannot be decoded are left out.

    Arguments
    ---------
    manifest : Manifest
    data_folder : str, path or None
        What its relative paths are relative to.
    folder : str or path
        Where the wav files go.
    skipped : SkippedFiles or None
        Told of files that cannot be decoded.
    num_threads : int or None
        Default: one for each CPU.
    progress : bool
        Show a bar. Default True.

    Returns
    -------
    Manifest
        Of the wav files, with absolute paths.

    Raises
    ------
    ValueError
        If nothing can be decoded.
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
    folder = Path(folder).absolute()

    def decode(item: int):
        path = manifest.path(item)
        source = shards.join(data_folder or "", path)
        rate, start = int(manifest.sample_rate[item]), int(manifest.start[item])
        length, changed = int(manifest.length[item]), int(manifest.mtime_ns[item])
        samples = resampled_length(length, rate)
        out = folder / _name(source, start, length)
        if not _is_decoded(out, samples, changed):
            try:
                wav = read_segment(source, rate, start, length)
            except UnreadableAudio as error:
                return path, error.reason
            with whole_file(out) as partial:
                soundfile.write(partial, wav, SAMPLE_RATE, format="WAV", subtype="FLOAT")
                os.utime(partial, ns=(changed, changed))
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


def _name(source: str, start: int, length: int) -> str:
    """Of a segment's wav: short and ASCII whatever the source is called."""
    segment = os.fsencode(f"{os.path.abspath(source)}@{start}+{length}")
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem)[:48]
    return f"{readable}-{hashlib.blake2b(segment, digest_size=16).hexdigest()}.wav"


def _is_decoded(out: Path, samples: int, changed: int) -> bool:
    """Whether a whole copy of this version of the file is there."""
    try:
        if out.stat().st_mtime_ns != changed:
            return False
        return read_header(out) == (samples, SAMPLE_RATE)
    except (OSError, UnreadableAudio):
        return False
