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
BLOCK = 160  # output samples of one row of the product, at least
GROUP = 16  # neighbouring output samples that share a window


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
    """torchaudio's filter for one ratio, as a matrix product that leaves out most of its zeros.

    torchaudio convolves with `new` kernels that are each as long as a whole period of the ratio:
    475 taps from 44.1 to 16 kHz, of which a kernel has 34 that are not zero. Neighbouring outputs
    look at nearly the same input: 16 of them share a window of 79 samples, and the ten groups of a
    period, whose windows are 44 samples apart, are one batched product [10, periods, 79] x
    [10, 79, 16]. What comes out is torchaudio's result to the rounding of float32.

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
        groups = -(-self.periods * new // GROUP)
        self.shift = round(GROUP * old / new)  # from the window of a group to that of the next
        is_tap = (kernels != 0).int()
        first_taps, last_taps = is_tap.argmax(1), kernels.shape[1] - 1 - is_tap.flip(1).argmax(1)
        output = torch.arange(self.periods * new)
        period, phase, group = output // new, output % new, output // GROUP
        begins = period * old + first_taps[phase] - group * self.shift  # in the group's window
        self.begin = int(begins.min())
        size = int((period * old + last_taps[phase] - group * self.shift).max()) + 1 - self.begin
        self.taps = torch.zeros(groups, size, GROUP)
        for place, begin in enumerate((begins - self.begin).tolist()):
            taps = kernels[phase[place], first_taps[phase[place]] : last_taps[phase[place]] + 1]
            self.taps[place // GROUP, begin : begin + len(taps), place % GROUP] = taps

    def __call__(self, wav: Tensor, blocks: int) -> Tensor:
        """Samples [blocks * new] of wav [samples], silence before and after."""
        groups, size, _ = self.taps.shape
        rows, step = -(-blocks // self.periods), self.periods * self.old
        before = max(self.width, -self.begin)
        begin = before - self.width + self.begin
        reach = begin + (rows - 1) * step + (groups - 1) * self.shift + size
        used = min(len(wav), rows * step + self.width)
        padded = torch.zeros(max(reach, before + used))
        padded[before : before + used] = wav[:used]
        windows = padded.as_strided((groups, rows, size), (self.shift, step, 1), begin)
        out = torch.bmm(windows, self.taps).transpose(0, 1).reshape(rows, -1)
        return out[:, : self.periods * self.new].reshape(-1)[: blocks * self.new]


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
