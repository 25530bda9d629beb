"""Embeddings of a data set on the disk, computed once, never those of another encoder.

One process embeds into a folder; another that wants the same embeddings waits and finds them.

<folder>/<encoder>-<key>/
  key.json            encoder, settings, data: what the key is the hash of
  normalization.json  mean and deviation of the data set's log-mel, if they were measured
  features.npy        [L, n, C], float16 or float32, memory-mapped
  rows.npy            [n], uint8: 0 to do, 1 embedded, 2 skipped
  skipped.csv         file and reason of those
"""

import hashlib
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from speechbrain_jepa.data.clips import BATCH_SECONDS
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.evaluation.fixed_clips import read_fixed
from speechbrain_jepa.evaluation.labelled import Features, LabelledClips
from speechbrain_jepa.evaluation.sources import Source
from speechbrain_jepa.files import folder_lock, new_array, whole_file, write_text

FORMAT_VERSION = 1
MAX_NORMALIZATION_CLIPS = 5000
FLUSH_SECONDS = 30.0  # a power failure loses no more than this, a kill one batch
TO_DO, EMBEDDED, SKIPPED = 0, 1, 2
DTYPES = ("float16", "float32")


def embed_once(
    source: Source,
    clips: LabelledClips,
    clip_seconds: float,
    folder,
    layer: str | int = "last",
    dtype: str = "float16",
    crop_seed: int = 0,
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    progress: bool = True,
) -> Features:
    """Embed every clip of a manifest, or find that it has been done; what was interrupted goes on.

    Arguments
    ---------
    source : Source
        With `normalization="dataset"` it is fitted on at most 5000 training clips, as they are
        given to the encoder, padding included.
    clips : LabelledClips
    clip_seconds : float
        Length that clips are cut or zero-padded to.
    folder : str or Path
        Where the embeddings of all encoders are kept.
    layer : str or int
        "last" (default), "all", or a number from 0, what enters the first layer.
    dtype : str
        "float16" (default) or "float32".
    crop_seed, batch_seconds, num_workers
        See `read_fixed`.
    progress : bool
        Show a progress bar. Default True.

    Returns
    -------
    Features

    Raises
    ------
    ValueError
        If an option does not fit, no clip can be embedded, an embedding is not finite, or too
        large for float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"feature_dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    key = {
        "format_version": FORMAT_VERSION,
        "encoder": source.fingerprint(),
        "layer": str(layer),
        "clip_seconds": clip_seconds,
        "crop_seed": crop_seed,
        "dtype": dtype,
        "data": _fingerprint(clips),
    }
    reading = {"crop_seed": crop_seed, "batch_seconds": batch_seconds, "num_workers": num_workers}
    place = _place(folder, source.name, key)
    with folder_lock(place, fix="end it, or name another --features_folder", wait=math.inf):
        write_text(place / "key.json", json.dumps(key, indent=2, sort_keys=True))
        _fit(source, clips, clip_seconds, place, reading)
        _embed(source, clips, clip_seconds, place, layer, dtype, reading, progress)
    array, states = _open(place, mode="r")
    layers = list(range(len(array))) if layer == "all" else [-1 if layer == "last" else int(layer)]
    return Features(array, np.asarray(states) == EMBEDDED, layers, place)


def _embed(
    source: Source, clips: LabelledClips, clip_seconds, place: Path, layer, dtype, reading, progress
) -> None:
    """Embed what is left to do."""
    array, states = _open(place)
    left = np.flatnonzero(states == TO_DO) if states is not None else np.arange(len(clips))
    if not len(left):
        return
    skipped = SkippedFiles(place / "skipped.csv")
    failed = []

    def skip(row, error):
        skipped.add(error.path, error.reason)
        failed.append(row)
        bar.update()

    with tqdm(
        total=len(clips),
        initial=len(clips) - len(left),
        disable=not progress,
        desc=f"Embedding with {source.name}",
        unit=" clips",
    ) as bar:
        flushed = time.monotonic()
        batches = read_fixed(clips, left, clip_seconds, on_failure=skip, **reading)
        for rows, wav in batches:
            embedded = _checked(_pick(source.embed(wav).numpy(), layer), rows, clips, dtype)
            if array is None:
                array, states = _create(place, embedded, len(clips), dtype)
            array[:, rows] = embedded
            states[rows] = EMBEDDED
            bar.update(len(rows))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                array.flush()
                states.flush()
                flushed = time.monotonic()
    if array is None:
        raise ValueError(
            f"none of {len(clips)} clips could be read, the first is {clips.files[0]}: see "
            f"{place / 'skipped.csv'}"
        )
    states[failed] = SKIPPED
    array.flush()
    states.flush()


def _fingerprint(clips: LabelledClips) -> str:
    """Of the audio: names, sizes and times of change, and how each clip is cropped. Not labels."""
    digest = hashlib.sha256()
    for name, file, split in zip(clips.ids, clips.files, clips.splits):
        try:
            stat = os.stat(file)
            state = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            state = None
        digest.update(repr((name, file, split in ("train", "valid"), state)).encode())
    return digest.hexdigest()[:16]


def _place(folder, name: str, key: dict) -> Path:
    """The folder that belongs to a key."""
    text = json.dumps(key, indent=2, sort_keys=True)
    readable = re.sub(r"[^\w.-]+", "_", name).strip("_")
    return Path(folder) / f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _fit(source: Source, clips: LabelledClips, clip_seconds: float, place: Path, reading) -> None:
    """Measure the normalisation of the data set, or take what was measured before."""
    if not source.fits_data:
        return
    path = place / "normalization.json"
    if path.exists():
        source.set_normalization(**json.loads(path.read_text()))
        return
    rows = clips.train_rows
    rows = rows[:: -(-len(rows) // MAX_NORMALIZATION_CLIPS)]
    pair = source.fit(wav for _, wav in read_fixed(clips, rows, clip_seconds, **reading))
    write_text(path, json.dumps(pair))


def _open(place: Path, mode: Literal["r", "r+"] = "r+"):
    """Features and states of the rows; None before the first is there."""
    if not (place / "rows.npy").exists():
        return None, None
    return tuple(np.load(place / f"{name}.npy", mmap_mode=mode) for name in ("features", "rows"))


def _create(place: Path, embedded: np.ndarray, count: int, dtype: str):
    layers, _, dims = embedded.shape
    array = new_array(place / "features.npy", dtype, (layers, count, dims))
    with whole_file(place / "rows.npy") as partial:  # written after the features: no row is done
        np.save(partial, np.zeros(count, np.uint8))
    return array, np.load(place / "rows.npy", mmap_mode="r+")


def _pick(embedded: np.ndarray, layer: str | int) -> np.ndarray:
    """The layers that are asked for, of [L, B, C]."""
    if layer == "all":
        return embedded
    if layer == "last":
        return embedded[-1:]
    if not 0 <= int(layer) < len(embedded):
        raise ValueError(f"layer={layer}: this encoder has layers 0 to {len(embedded) - 1}")
    return embedded[int(layer)][None]


def _checked(embedded: np.ndarray, rows, clips: LabelledClips, dtype: str) -> np.ndarray:
    bad = ~np.isfinite(embedded).all((0, 2))
    if bad.any():
        raise ValueError(
            f"the embedding of {clips.files[rows[bad.argmax()]]} is not finite: the encoder's "
            "weights are damaged, or precision is too low: use precision fp32"
        )
    largest = np.abs(embedded).max()
    if largest > np.finfo(dtype).max:
        raise ValueError(f"embeddings up to {largest:.3g} do not fit {dtype}: use float32")
    return embedded
