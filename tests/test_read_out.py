"""Which layers an embedding is read from, and how a clip's time steps are pooled."""

import json

import numpy as np
import pytest
import torch

from speechbrain_jepa import AudioJEPA, embed, export, hear
from speechbrain_jepa.checkpoints import load_pretrained, save_pretrained
from speechbrain_jepa.evaluation.online_probe import embed_with
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.read_out import ReadOut, pooled, step_statistics
from speechbrain_jepa.vit import Encoder, PatchGrid

PAIR = (-7.06, 4.19)
LENGTHS = (100_000, 3_000, 1, 50_001)  # three windows, one, one of one time step, two
CHOICES = {"last": [2], "all": [0, 1, 2], "0": [0], "2, 0": [2, 0], "-2": [1]}


def make_encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder(PatchGrid(frames=208), dim=24, depth=2, num_heads=3)


def make_model(**options):
    return AudioJEPA((make_encoder(), Normalization(*PAIR)), **options)


def clips():
    generator = torch.Generator().manual_seed(0)
    wavs = [torch.randn(n, generator=generator).cumsum(0) / 100 for n in LENGTHS]
    lengths = torch.tensor(LENGTHS)
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths / lengths.max()


def choice(name):
    return name if name in ("last", "all") else [int(number) for number in name.split(",")]


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"step_seconds": 0.08}], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_time_steps_are_those_of_the_layers_side_by_side(name, options):
    every = make_model(output_all_hiddens=True, **options)(*clips())
    model = make_model(layers=choice(name), **options)
    ours = model(*clips())
    torch.testing.assert_close(ours, torch.cat(list(every[CHOICES[name]]), -1), rtol=0, atol=0)
    assert ours.shape[-1] == model.get_output_dim()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flat": True},
        {"step_seconds": 0.04},
        {"output_norm": True},
        {"normalization": "instance"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CHOICES)
def test_an_embedding_is_of_each_clips_own_time_steps_alone(name, options):
    """By numpy over `forward`'s own output, clip by clip and layer by layer."""
    model = make_model(layers=choice(name), pooling="mean_std", **options)
    every = make_model(output_all_hiddens=True, **options)
    ours, (wav, _) = model.embed(*clips()), clips()
    assert ours.shape == (4, model.embedding_dim)
    for samples, row, own in zip(LENGTHS, wav, ours):
        steps = every(row[None, :samples])[CHOICES[name], 0].double().numpy()
        expected = np.concatenate([np.r_[layer.mean(0), layer.std(0)] for layer in steps])
        np.testing.assert_allclose(own, expected, atol=2e-6, rtol=2e-5)


def test_one_by_one_and_side_by_side_are_the_same_numbers():
    one_by_one = make_model(output_all_hiddens=True, pooling="mean_std").embed(*clips())
    together = make_model(layers="all", pooling="mean_std").embed(*clips())
    assert torch.equal(together, torch.cat(list(one_by_one), -1))
    assert torch.equal(
        make_model(layers="all").embed(*clips())[:, -120:], make_model().embed(*clips())
    )


def test_the_deviation_of_dims_far_from_zero_is_not_lost():
    """A difference of two sums of squares would leave 0.03 of noise in float32."""
    windows = 1_000 + torch.randn(1, 40, 13, 8, generator=torch.Generator().manual_seed(0)) / 100
    present = torch.ones(1, 40, 13, dtype=torch.bool)
    present[:, -1, 5:] = False
    statistics = step_statistics(windows * present[..., None], present)
    mean, variance = pooled(statistics.squeeze(-2))
    own = windows[present].double()
    torch.testing.assert_close(mean[0].double(), own.mean(0), rtol=1e-6, atol=0)
    expected = own.std(0, correction=0)
    torch.testing.assert_close(variance[0].sqrt().double(), expected, rtol=0.01, atol=0)


def test_gradients_are_finite_where_a_clip_has_one_time_step():
    model = make_model(layers="all", pooling="mean_std", freeze=False)
    model.embed(*clips()).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())


# The folder's own choice


@pytest.fixture
def folder(tmp_path):
    """A folder whose config asks for all layers, mean and deviation."""
    read_out = ReadOut("all", "mean_std")
    return save_pretrained(
        tmp_path / "wide", make_encoder(), Normalization(*PAIR), {"a": 1}, read_out
    )


def test_embed_reads_what_the_folder_says_wherever_it_is_loaded(folder, tmp_path, audio_folder):
    expected = make_model(layers="all", pooling="mean_std").embed(*clips())
    model, (wav, wav_lens) = AudioJEPA(folder), clips()
    assert torch.equal(model.embed(wav, wav_lens), expected)
    scenes = hear.load_model(folder)
    assert scenes.scene_embedding_size == 720 and scenes.timestamp_embedding_size == 120
    assert hear.get_scene_embeddings(wav, scenes).shape == (4, 720)
    assert hear.get_timestamp_embeddings(wav, scenes)[0].shape[-1] == 120
    assert embed_with(model)([wav[0].numpy()]).shape == (1, 720)
    for out, options, dims in (
        ("a.npy", [], 720),
        ("b.npy", ["--layers", "1", "--pooling", "mean"], 120),
        ("c.npy", ["--layers", "0,-1"], 480),
    ):
        command = [str(folder), str(audio_folder), "--out", str(tmp_path / out), "--device", "cpu"]
        embed.main([*command, *options])
        assert np.load(tmp_path / out).shape == (24, dims)


def test_a_choice_of_ones_own_goes_before_the_folders(folder):
    wav = clips()
    assert torch.equal(AudioJEPA(folder)(*wav), make_model()(*wav))  # time steps: the last layer
    ours = AudioJEPA(folder, layers="last", pooling="mean").embed(*wav)
    assert torch.equal(ours, make_model().embed(*wav))
    ours = AudioJEPA(folder, layers=[1]).embed(*wav)
    assert torch.equal(ours, make_model(layers=[1], pooling="mean_std").embed(*wav))
    ours = AudioJEPA(folder, output_all_hiddens=True).embed(*wav)
    assert torch.equal(ours, make_model(output_all_hiddens=True).embed(*wav))


def test_a_folder_written_again_keeps_the_choice(folder, tmp_path):
    for number, options in enumerate(({}, {"output_all_hiddens": True, "freeze": False})):
        again = AudioJEPA(folder, **options).save_pretrained(tmp_path / str(number))
        assert load_pretrained(again)[2]["embedding"] == {"layers": "all", "pooling": "mean_std"}
    again = AudioJEPA(folder, layers=[0, 2]).save_pretrained(tmp_path / "other")
    assert load_pretrained(again)[2]["embedding"] == {"layers": [0, 2], "pooling": "mean_std"}


def test_a_folder_from_before_there_was_a_choice_gives_what_it_gave(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["embedding"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(AudioJEPA(folder).embed(*clips()), make_model().embed(*clips()))


def test_an_export_may_choose_anew(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer

    from speechbrain_jepa.checkpoints import write_config
    from speechbrain_jepa.jepa import JEPA
    from speechbrain_jepa.losses import SmoothL1
    from speechbrain_jepa.vit import Predictor

    predictor = Predictor(PatchGrid(208), encoder_dim=24, dim=16, depth=1, num_heads=2)
    jepa, run = JEPA(make_encoder(), predictor, SmoothL1()), tmp_path / "run"
    config = (run / "encoder_config.json", jepa.context_encoder, Normalization(*PAIR), {})
    write_config(*config, ReadOut([1]))
    Checkpointer(run / "save", {"jepa": jepa}).save_checkpoint()
    for number, (options, expected) in enumerate(
        (
            ([], {"layers": [1], "pooling": "mean"}),
            (["--pooling", "mean_std"], {"layers": [1], "pooling": "mean_std"}),
            (["--layers", "0,2"], {"layers": [0, 2], "pooling": "mean"}),
        )
    ):
        export.main([str(run), str(tmp_path / str(number)), *options])
        assert load_pretrained(tmp_path / str(number))[2]["embedding"] == expected
    with pytest.raises(SystemExit, match="there is no 3"):
        export.main([str(run), str(tmp_path / "none"), "--layers", "3"])


@pytest.mark.parametrize(
    "embedding",
    [
        *({"layers": value} for value in ("first", 1, [], [3], [-4], [True], [0.5], [0] * 9, None)),
        *({"pooling": value} for value in ("max", 2, None, ["mean"])),
        *({"layers": [10**400]}, {"steps": 3}, [], "all"),
    ],
    ids=lambda value: f"{value}"[:30],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(folder, embedding):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "embedding": embedding}))
    with pytest.raises(ValueError, match=r"config\.json.*embedding"):
        AudioJEPA(folder)


def test_what_cannot_be_chosen_is_an_error_that_says_what_can():
    with pytest.raises(ValueError, match=r"no 3; this encoder has 0 .* to 2"):
        make_model(layers=[3])
    with pytest.raises(ValueError, match="layers='first': choose one of last, all"):
        make_model(layers="first")
    with pytest.raises(ValueError, match="pooling='max': choose one of mean, mean_std"):
        make_model(pooling="max")
    with pytest.raises(ValueError, match="choose one of them"):
        make_model(layers="all", output_all_hiddens=True)
