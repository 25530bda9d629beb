"""Any sample rate to 16 kHz."""

import math
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np
import torch
import torchaudio

from speechbrain_jepa.features import SAMPLE_RATE

LARGEST_TERM = 640  # of a ratio in lowest terms: a filter has at most 640 x 652 taps, 1.7 MB
FILTERS_KEPT = 16  # 27 MB at most


@cache
def resampling_ratio(sample_rate: int) -> tuple[int, int]:
    """`sample_rate` to 16 kHz as a ratio of two integers up to 640, in lowest terms.

    torchaudio's filter has old x new taps for the ratio old / new: 11 127 Hz would take 0.7 GB. The
    nearest ratio of small integers is used instead. It is exact for every usual rate (11 025 Hz is
    441 / 640) and off by less than 0.1 % for the odd ones up to 1 MHz.

    Example
    -------
    >>> [resampling_ratio(rate) for rate in (44_100, 48_000, 11_127)]
    [(441, 160), (3, 1), (427, 614)]
    """
    ratio = Fraction(sample_rate, SAMPLE_RATE)
    if ratio > 1:  # the larger of the two is what is bounded
        old = 1 / (1 / ratio).limit_denominator(LARGEST_TERM)
        return old.numerator, old.denominator
    ratio = ratio.limit_denominator(LARGEST_TERM)
    return ratio.numerator, ratio.denominator


@lru_cache(FILTERS_KEPT)
def _filter(old: int, new: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(old, new)


def resampler(sample_rate: int) -> torchaudio.transforms.Resample:
    """Resampling to 16 kHz by `resampling_ratio`; the last 16 filters are kept."""
    return _filter(*resampling_ratio(sample_rate))


def resampled_length(length: int, sample_rate: int) -> int:
    """Samples at 16 kHz of `length` samples at `sample_rate`.

    Example
    -------
    >>> resampled_length(44_100, 44_100), resampled_length(7, 8_000)
    (16000, 14)
    """
    old, new = resampling_ratio(sample_rate)
    return -(-length * new // old)


def spare_blocks(sample_rate: int) -> int:
    """How many blocks of `old` samples the filter reaches to either side."""
    old, _ = resampling_ratio(sample_rate)
    return math.ceil(resampler(sample_rate).width / old)


def resample(wav: np.ndarray, sample_rate: int, blocks: int | None = None) -> np.ndarray:
    """Samples at `sample_rate` as samples at 16 kHz.

    Arguments
    ---------
    wav : array [samples], float32
    sample_rate : int
        Hz.
    blocks : int or None
        Return so many whole blocks of `new` samples, what is beyond the end being silence. None
        (default): `resampled_length` samples.

    Returns
    -------
    array [samples], float32
    """
    old, new = resampling_ratio(sample_rate)
    length = resampled_length(len(wav), sample_rate) if blocks is None else blocks * new
    if old == new:
        return wav
    if blocks is None:
        blocks = math.ceil(length / new) + spare_blocks(sample_rate)
    # whole blocks: torchaudio works out the length of others in float32, and may drop a sample
    wav = np.pad(wav, (0, blocks * old - len(wav)))
    return resampler(sample_rate)(torch.from_numpy(wav)).numpy()[:length]
