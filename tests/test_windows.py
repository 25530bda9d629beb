"""Clips cut into windows: every time step once, the audio of a clip alone, silence behind it."""

import pytest
import torch

from speechbrain_jepa.features import LogMelSpectrogram
from speechbrain_jepa.vit import PatchGrid
from speechbrain_jepa.windows import SILENCE, cut_into_windows

GRID = PatchGrid(frames=208)  # 13 time patches of 2560 samples


def test_every_time_step_of_every_clip_is_in_one_window():
    steps = torch.tensor([1, 12, 13, 14, 26, 40])
    width = 40 * 2_560
    windows = cut_into_windows(torch.zeros(6, width), steps * 2_560 / width, GRID, max_windows=3)
    assert windows.steps.tolist() == steps.tolist()
    covered = [
        (clip, 13 * number + step)
        for batch in windows.batches
        for clip, _, number, patches in zip(*map(torch.Tensor.tolist, vars(batch).values()))
        for step in range(patches)
    ]
    assert sorted(covered) == [
        (clip, step) for clip, count in enumerate(steps) for step in range(count)
    ]


def test_windows_of_a_batch_are_few_and_at_least_half_as_long_as_its_longest():
    steps = torch.randint(1, 60, (50,), generator=torch.Generator().manual_seed(0))
    windows = cut_into_windows(torch.zeros(50, 59 * 2_560), steps / 59, GRID, max_windows=8)
    for batch in windows.batches:
        assert len(batch.clip) <= 8
        assert batch.patches.min() >= batch.longest / 2
        assert batch.longest < 13 or not batch.ragged


def test_a_tiny_clip_is_reflected_back_and_forth():
    """The log-mel of three samples is that of their endless reflection."""
    clips = cut_into_windows(torch.tensor([[0.1, -0.3, 0.2]]), None, GRID, 128)
    _, log_mel, audio = next(clips.log_mels(LogMelSpectrogram()))
    cycle = torch.tensor([0.1, -0.3, 0.2, -0.3])  # from sample 0 on
    window = cycle[(torch.arange(400) - 200) % 4][None]
    assert audio.sum() == 1
    expected = LogMelSpectrogram()(window, margins=True)
    torch.testing.assert_close(log_mel[..., :1], expected)
    assert (log_mel[..., 1:] == SILENCE).all()


def test_silence_is_log_mel_of_zeros():
    assert LogMelSpectrogram()(torch.zeros(1, 1_000)).unique().item() == pytest.approx(SILENCE)
