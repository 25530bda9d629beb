"""Encoders and sounds for the suites' own runners, and how these are started."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import SAMPLE_RATE, Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

PITCHES = {"low": 300, "high": 2000}  # Hz


def make_encoder(folder, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    return save_pretrained(folder, encoder, Normalization(-7.06, 4.19))


def tone(label, number, seconds=1.0, rate=SAMPLE_RATE):
    """[samples]: a tone of the label's pitch, each number's a little apart, in some noise."""
    samples = round(seconds * rate)
    noise = np.random.default_rng(number).standard_normal(samples)
    pitch = PITCHES[label] * (1 + 0.02 * (number % 8))
    return 0.4 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate) + 0.01 * noise


def run_module(*arguments, cwd, **environ):
    """`python -m ...` in a folder, with no GPU and no settings of this test run but the path."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environ
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout
