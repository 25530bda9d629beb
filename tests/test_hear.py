"""The HEAR API as its harnesses use it, and HEAR's own validator where that is installed."""

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

MODULE = "speechbrain_jepa.hear"
RATES = (16_000, 22_050, 32_000, 44_100, 48_000)  # those of HEAR's data sets


def make_folder(path, **grid):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(**{"frames": 208, **grid}), dim=24, depth=2, num_heads=3)
    return save_pretrained(path, encoder, Normalization(-7.06, 4.19))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pretrained")


@pytest.fixture
def hear():
    return importlib.import_module(MODULE)


def noise(sounds, seconds, rate):
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(sounds, int(seconds * rate), generator=generator) - 1


def test_a_model_has_the_attributes_of_the_api(hear, folder):
    model = hear.load_model(str(folder))
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in RATES
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int


@pytest.mark.parametrize("options", [{}, {"flat": True}], ids=["concatenated", "flat"])
def test_embeddings_have_the_sizes_that_the_model_says(options, hear, folder):
    model = hear.load_model(str(folder), **options)
    audio = noise(4, 3.74, model.sample_rate)
    scene = hear.get_scene_embeddings(audio, model)
    assert scene.dtype == torch.float32
    assert scene.shape == (4, model.scene_embedding_size)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    assert embeddings.shape == (*timestamps.shape, model.timestamp_embedding_size)
    assert len(timestamps) == 4


def test_embeddings_are_those_of_audio_jepa(hear, folder):
    model, audio = hear.load_model(folder), noise(3, 2.5, 16_000)
    ours = AudioJEPA(folder)
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), ours.embed(audio))
    torch.testing.assert_close(hear.get_timestamp_embeddings(audio, model)[0], ours(audio))


@pytest.mark.parametrize(("patch_time", "step"), [(16, 160), (4, 40), (2, 20)])
def test_timestamps_are_centres_in_milliseconds(patch_time, step, hear, tmp_path):
    model = hear.load_model(make_folder(tmp_path / "p", patch_time=patch_time))
    _, timestamps = hear.get_timestamp_embeddings(noise(2, 2.0, 16_000), model)
    whole = 200 // patch_time  # patches that end inside the audio
    frame_centres = torch.arange(0, 2000, 10).float()  # of 2 s, one every 10 ms
    means = frame_centres[: whole * patch_time].unflatten(0, (-1, patch_time)).mean(1)
    for row in timestamps:
        torch.testing.assert_close(row[:whole], means)
        assert (row.diff() == step).all()


def test_timestamps_stay_regular_in_long_audio(hear, tmp_path):
    """In seconds, float32 is off by 0.01 ms after 5 minutes; HEAR allows a thousandth."""
    grid = PatchGrid(frames=208, patch_frequency=80, patch_time=2)
    encoder = Encoder(grid, dim=4, depth=1, num_heads=1)
    model = hear.load_model(save_pretrained(tmp_path / "p", encoder, Normalization(-7.06, 4.19)))
    _, timestamps = hear.get_timestamp_embeddings(noise(1, 300, 16_000), model)
    assert timestamps.shape == (1, 15_000)
    assert (timestamps.diff() == 20).all()
    assert timestamps[0, -1] == 300_000 - 15


def test_a_model_that_is_not_there_says_so(hear):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hear.load_model("not there")


def test_all_layers_at_once_are_refused(hear, folder):
    with pytest.raises(ValueError, match="one layer only"):
        hear.load_model(folder, output_all_hiddens=True)


@pytest.mark.skipif(
    not (find_spec("hearvalidator") and find_spec("tensorflow")),
    reason="HEAR's validator is not installed: pip install hearvalidator",
)
def test_hears_own_validator_is_content(folder):
    command = [sys.executable, "-m", "hearvalidator.validate", MODULE, "--model", str(folder)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("Looks good!")
