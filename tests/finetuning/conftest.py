"""A small encoder, labelled clips on the disk, and what a fine-tuning run needs."""

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid


@pytest.fixture
def parts():
    """Windows of 4 time patches, 0.64 s."""
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=2, num_heads=3)
    return encoder, Normalization(-7.0, 4.0)


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """24 files of 0.3 to 0.9 s; their class, 0 to 2, is the pitch."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    files, targets = [], []
    for number in range(24):
        time = np.arange(int(rng.uniform(0.3, 0.9) * 16_000)) / 16_000
        wav = 0.3 * np.sin(2 * np.pi * 300 * 2 ** (number % 3) * time)
        files.append(str(folder / f"{number}.wav"))
        targets.append(number % 3)
        soundfile.write(files[-1], wav + 0.01 * rng.standard_normal(len(time)), 16_000)
    return files, torch.tensor(targets)
