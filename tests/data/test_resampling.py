"""Any rate to 16 kHz in bounded memory, as torchaudio does it."""

import numpy as np
import pytest
import torch
import torchaudio

from speechbrain_jepa.data import resampling
from speechbrain_jepa.data.audio import HIGHEST_RATE, LOWEST_RATE
from speechbrain_jepa.data.resampling import polyphase, resample, resampling_ratio


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
        polyphase(rate)
    kept = resampling._filter.cache_info().currsize
    assert kept <= resampling.FILTERS_KEPT == 16
    # torchaudio's own filter for this ratio takes 1.7 MB
    for rate in (HIGHEST_RATE - 1, 999_983, 44_001, LOWEST_RATE):
        taps = polyphase(rate).taps
        assert taps.numel() * taps.element_size() <= 1.7e6  # times 16: 27 MB


RATES = [1_000, 8_000, 11_025, 11_127, 15_999, 22_050, 44_056, 44_100, 48_000, 96_000, 192_000]


@pytest.mark.parametrize("rate", [*RATES, 999_983])
def test_every_sample_is_torchaudios(rate):
    """The first and the last ones too, where the filter reaches beyond the signal."""
    old, new = resampling_ratio(rate)
    transform = torchaudio.transforms.Resample(old, new)
    for periods in (1, 2, 3, 160 // new + 1, -(-rate // old)):
        wav = torch.randn(periods * old, generator=torch.Generator().manual_seed(periods))
        ours = resample(wav.numpy(), rate)
        assert ours.shape == (periods * new,)
        np.testing.assert_allclose(ours, transform(wav).numpy(), atol=2e-6)


def test_blocks_beyond_the_end_are_silence():
    wav = np.random.default_rng(0).standard_normal(4_410, dtype=np.float32)
    longer = resample(wav, 44_100, 20)
    assert longer.shape == (3_200,)
    np.testing.assert_allclose(longer[:1_600], resample(wav, 44_100), atol=1e-6)
    assert not longer[1_700:].any() and longer[1_600:1_606].any()  # the filter rings 6 samples
    assert resample(wav, 44_100, 3).shape == (480,)
    np.testing.assert_allclose(resample(wav, 44_100, 3), longer[:480], atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_127, 44_100, 999_983])
def test_a_resampled_tone_keeps_its_frequency(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate, dtype=np.float32)
    wav = resample(tone, rate)
    assert abs(len(wav) - 16_000) <= 16
    assert abs(np.abs(np.fft.rfft(wav)).argmax() - 440) <= 1
