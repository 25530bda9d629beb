"""Any sample rate to 16 kHz."""

import math
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np
import torch
import torchaudio
from torch import Tensor

from speechbrain_jepa.features import SAMPLE_RATE

LARGEST_TERM = 640  # of a ratio in lowest terms: a filter has at most 640 x 652 taps, 1.7 MB
FILTERS_KEPT = 16  # 27 MB at most
BLOCK = 160  # output samples of one row of the matrix products, at least
GROUP = 16  # neighbouring output samples that are computed by one matrix product


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


class Polyphase:
    """torchaudio's filter for one ratio, as matrix products that leave out its zeros.

    torchaudio convolves with `new` kernels that are each as long as a whole period of the ratio:
    475 taps from 44.1 to 16 kHz, of which a kernel has 34 that are not zero. Neighbouring outputs
    look at nearly the same input, so 16 of them share one window of 76 samples, and each of the
    ten groups of a period is one product [periods, 76] x [76, 16]. What comes out is torchaudio's
    result to the rounding of float32.

    Arguments
    ---------
    old, new : int
        The ratio in lowest terms.

    Example
    -------
    >>> wav = torch.randn(441 * 20)
    >>> theirs = torchaudio.transforms.Resample(441, 160)(wav)
    >>> bool(torch.allclose(Polyphase(441, 160)(wav, 20), theirs, atol=1e-6))
    True
    """

    def __init__(self, old: int, new: int):
        transform = torchaudio.transforms.Resample(old, new)
        kernels = transform.kernel[:, 0]
        self.width: int = transform.width  # samples that the filter reaches to either side
        self.old, self.new = old, new
        self.periods = -(-BLOCK // new)  # in a row
        begins = (kernels != 0).int().argmax(1).tolist()
        ends = [kernels.shape[1] - end for end in (kernels != 0).flip(1).int().argmax(1).tolist()]
        self.groups: list[tuple[int, int, Tensor]] = []  # first output, first input, taps
        for first in range(0, self.periods * new, GROUP):
            outputs = range(first, min(first + GROUP, self.periods * new))
            shifts = [(output // new * old, output % new) for output in outputs]
            begin = min(shift + begins[phase] for shift, phase in shifts)
            end = max(shift + ends[phase] for shift, phase in shifts)
            taps = torch.zeros(end - begin, len(outputs))
            for column, (shift, phase) in enumerate(shifts):
                place = shift + begins[phase] - begin
                kernel = kernels[phase, begins[phase] : ends[phase]]
                taps[place : place + len(kernel), column] = kernel
            self.groups.append((first, begin, taps))

    def __call__(self, wav: Tensor, blocks: int) -> Tensor:
        """Samples [blocks * new] of wav [samples], silence before and after."""
        rows = -(-blocks // self.periods)
        step, out_step = self.periods * self.old, self.periods * self.new
        used = min(len(wav), rows * step + self.width)
        reach = max(begin + len(taps) for _, begin, taps in self.groups)
        padded = torch.zeros(max((rows - 1) * step + reach, self.width + used))
        padded[self.width : self.width + used] = wav[:used]
        out = torch.empty(rows, out_step)
        for first, begin, taps in self.groups:
            windows = padded.as_strided((rows, len(taps)), (step, 1), begin)
            torch.mm(windows, taps, out=out[:, first : first + taps.shape[1]])
        return out.view(-1)[: blocks * self.new]


@lru_cache(FILTERS_KEPT)
def _filter(old: int, new: int) -> Polyphase:
    return Polyphase(old, new)


def polyphase(sample_rate: int) -> Polyphase:
    """The filter to 16 kHz by `resampling_ratio`; the last 16 are kept."""
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
    return math.ceil(polyphase(sample_rate).width / old)


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
    if old == new:
        return wav
    length = resampled_length(len(wav), sample_rate) if blocks is None else blocks * new
    return polyphase(sample_rate)(torch.from_numpy(wav), math.ceil(length / new))[:length].numpy()
