"""Small real audio for every test that needs files."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors as small as the tests' are slower on more: threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory):
    """24 flac files of 3 s: tones with a vibrato and some noise, 16 kHz."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    time = np.arange(3 * 16_000) / 16_000
    for number in range(24):
        frequency = 200 * 2 ** (number / 8) * (1 + 0.01 * np.sin(2 * np.pi * 5 * time))
        tone = np.sin(2 * np.pi * np.cumsum(frequency) / 16_000) * np.exp(-time * (number % 3))
        wav = 0.3 * tone + 0.01 * rng.standard_normal(len(time))
        soundfile.write(folder / f"tone_{number:02d}.flac", wav, 16_000)
    return folder


@pytest.fixture
def clips(tmp_path):
    """Eight labelled clips of noise, 0.5 to 4 s: five train, one validates, two test."""
    from speechbrain_jepa.evaluation.labelled import LabelledClips

    rng = np.random.default_rng(0)
    names = [f"{number}.wav" for number in range(8)]
    for number, name in enumerate(names):
        wav = rng.normal(0, 0.02 * (number + 1), 8_000 * (number + 1))
        soundfile.write(tmp_path / name, wav, 16_000)
    splits = ["train"] * 5 + ["valid"] + ["test"] * 2
    files = [str(tmp_path / name) for name in names]
    return LabelledClips(names, files, list("abababab"), splits, [None] * 8)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def noise_tasks(tmp_path_factory):
    """Noise of two colours and three splits; valid has labels that are the other way round."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = ["file,split,label"]
    for number in range(24):
        noise = rng.normal(0, 0.1, 8_000)
        low = number % 2
        soundfile.write(folder / f"{number}.wav", noise.cumsum() / 50 if low else noise, 16_000)
        split = ("train", "train", "valid", "test")[number // 2 % 4]
        rows.append(f"{number}.wav,{split},{'high' if bool(low) == (split == 'valid') else 'low'}")
    (folder / "meta.csv").write_text("\n".join(rows))
    return folder
