"""Clips of one length: what a probe's encoder is given."""

import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from speechbrain_jepa.data.clips import BATCH_SECONDS, read_clips
from speechbrain_jepa.data.crops import UnreadableAudio, random_at
from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.features import SAMPLE_RATE

CROP = 0  # stream of random numbers: independent of labelled.DRAW's


def fixed_length(wav: Tensor, samples: int, draw: float = 0.0) -> Tensor:
    """A clip of exactly `samples` samples.

    Arguments
    ---------
    wav : Tensor [any]
    samples : int
    draw : float
        From 0 to below 1: which part of a longer clip is taken. Default 0, the first. A shorter
        one is followed by zeros.

    Returns
    -------
    Tensor [samples]

    Example
    -------
    >>> fixed_length(torch.tensor([1.0, 2.0, 3.0]), 2, draw=0.99), fixed_length(torch.ones(1), 2)
    (tensor([2., 3.]), tensor([1., 0.]))
    """
    if len(wav) <= samples:
        return torch.nn.functional.pad(wav, (0, samples - len(wav)))
    start = int(draw * (len(wav) - samples + 1))
    return wav[start : start + samples]


def read_fixed(
    clips: LabelledClips,
    rows: Iterable[int],
    clip_seconds: float,
    crop_seed: int = 0,
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    on_failure: Callable[[int, UnreadableAudio], None] = lambda row, error: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read clips, all cut or padded to one length.

    Of a longer clip, training and validation take a crop that depends on the clip's ID and
    `crop_seed` only; test clips, and those of a cross-validation, their first part.

    Arguments
    ---------
    clips : LabelledClips
    rows : iterable of int
        Which to read, in this order.
    clip_seconds : float
    crop_seed : int
        Default 0.
    batch_seconds : float
        Of audio in a batch. Default 600.
    num_workers : int
        Decoding threads. Default 2.
    on_failure : callable
        Told of each row that cannot be used.

    Yields
    ------
    rows : list of int
    wav : Tensor [B, samples], float32
        16 kHz.
    """
    samples = round(clip_seconds * SAMPLE_RATE)
    same_file: dict[str, list[int]] = {}
    for row in rows:
        same_file.setdefault(clips.files[row], []).append(row)

    def skip(error):
        for row in same_file[error.path]:
            on_failure(row, error)

    def draw(row):
        if clips.splits[row] not in ("train", "valid"):
            return 0.0
        return random_at(
            crop_seed, CROP, zlib.crc32(clips.ids[row].encode("utf-8", "surrogateescape"))
        ).random()

    for batch in read_clips(same_file, batch_seconds, num_workers, skip):
        lengths = (batch.wav_lens * batch.wav.shape[1]).round().long().tolist()
        found = [
            (row, fixed_length(wav[:length], samples, draw(row)))
            for file, wav, length in zip(batch.files, batch.wav, lengths)
            for row in same_file[file]
        ]
        yield [row for row, _ in found], torch.stack([wav for _, wav in found])
