"""Any rate to 16 kHz in bounded memory."""

import numpy as np
import pytest

from speechbrain_jepa.data import resampling
from speechbrain_jepa.data.audio import HIGHEST_RATE, LOWEST_RATE
from speechbrain_jepa.data.resampling import resample, resampler, resampling_ratio


def test_ratios_are_bounded_near_and_exact_for_the_usual_rates():
    rates = np.unique(np.geomspace(LOWEST_RATE, HIGHEST_RATE, 20_000).astype(int)).tolist()
    for rate in [*rates, LOWEST_RATE, HIGHEST_RATE]:
        old, new = resampling_ratio(rate)
        assert 1 <= old <= 640 and 1 <= new <= 640
        assert abs(old / new * 16_000 / rate - 1) < 1e-3
    usual = [8000, 11_025, 12_000, 22_050, 24_000, 32_000, 37_800, 44_100, 48_000, 88_200, 96_000]
    for rate in [*usual, 176_400, 192_000, 352_800, 384_000, 500_000, 768_000]:
        old, new = resampling_ratio(rate)
        assert old * 16_000 == new * rate


def test_filters_of_many_rates_take_bounded_memory():
    resampling._filter.cache_clear()
    for rate in range(44_001, 44_101, 2):
        resampler(rate)
    kept = resampling._filter.cache_info().currsize
    assert kept <= resampling.FILTERS_KEPT == 16
    kernel = resampler(HIGHEST_RATE - 1).kernel
    assert kernel.numel() * kernel.element_size() <= 1.7e6  # times 16: 27 MB


@pytest.mark.parametrize("rate", [8_000, 11_127, 44_100, 999_983])
def test_a_resampled_tone_keeps_its_frequency(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate, dtype=np.float32)
    wav = resample(tone, rate)
    assert abs(len(wav) - 16_000) <= 16
    assert abs(np.abs(np.fft.rfft(wav)).argmax() - 440) <= 1
