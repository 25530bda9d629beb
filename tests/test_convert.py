"""Weights of each family against a plain ViT of its layout, and checkpoints that do not fit."""

import argparse
import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.checkpoints import CARD, load_pretrained
from speechbrain_jepa.convert import convert, main
from speechbrain_jepa.features import LogMelSpectrogram

DIM, DEPTH, HEADS = 48, 2, 3
FRAMES = 96  # a window: 5 x 6 patches of 16 x 16
NAME = "m2d_vit_base-80x96p16x16-random"  # as M2D names its folders
HEADS_OPTION = ["--num_heads", str(HEADS)]
STATISTICS = {
    "m2d": (-7.1, 4.2),
    "matpac": (-7.056, 4.193),
    "released-jepa": (-7.0633, 4.1971),  # its configs/data/audioset.yaml
}
families = pytest.mark.parametrize("family", STATISTICS)


# --- the models that the weights are of, as timm builds a ViT -----------------------------------


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        shape = (batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Layers(nn.Module):
    def __init__(self, dim=DIM, heads=HEADS, depth=DEPTH, eps=1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def patch_embedding(dim, patch):
    embedding = nn.Module()
    embedding.proj = nn.Conv2d(1, dim, patch, stride=patch)
    return embedding


class WithClassToken(Layers):
    """M2D: class token and positions [1, 1 + N, D], everything at the top."""

    def __init__(self, frames=FRAMES, patch=(16, 16), dim=DIM, **sizes):
        super().__init__(dim, **sizes)
        self.grid = (80 // patch[0], frames // patch[1])
        self.patch_embed = patch_embedding(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))

    def forward(self, spectrogram):
        """[B, 80, frames] of at most a window to patch tokens [B, N, D]."""
        x = self.patch_embed.proj(spectrogram[:, None])
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        table = self.pos_embed[:, 1:].reshape(1, *self.grid, -1)
        x = x + table[:, :, :columns].reshape(1, rows * columns, -1)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.run(torch.cat([token, x], 1))[:, 1:]


class Matpac(WithClassToken):
    """The same with layers and last norm in a module of their own."""

    def __init__(self, dim=DIM, **sizes):
        super().__init__(dim=dim, **sizes)
        self.student_encoder = Layers(dim)
        del self.blocks, self.norm

    def run(self, x):
        return self.student_encoder.run(x)


class Released(Layers):
    """The paper's code: no class token, positions [1, F, T, D]."""

    def __init__(self):
        super().__init__(eps=1e-5)
        self.patch_embed = patch_embedding(DIM, (16, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, FRAMES // 16, DIM))

    def forward(self, spectrogram):
        x = self.patch_embed.proj(spectrogram[:, None]).permute(0, 2, 3, 1)
        x = x + self.pos_embed[:, :, : x.shape[2]]
        return self.run(x.flatten(1, 2))


def randomized(module, seed=0):
    """Every parameter away from zero and one; tokens so small that the norms' eps matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "embed" in name or "token" in name:
                parameter.copy_(0.003 * values)
            elif "norm" in name:
                parameter.add_(0.2 * values)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
    return module.eval()


def reference(family):
    """The plain model of a family, and a checkpoint of it as its training code writes one."""
    if family == "released-jepa":
        model, target = randomized(Released()), randomized(Released(), seed=1)
        predictor = randomized(Layers(dim=24), seed=2)
        parts = {"encoder": model, "target_encoder": target, "predictor": predictor}
        state = nn.ModuleDict(parts).state_dict()
        return model, {"epoch": 3, "state_dict": state, "hyper_parameters": {"base_lr": 3e-4}}
    model = randomized(Matpac() if family == "matpac" else WithClassToken())
    state = model.state_dict()
    others = randomized(Layers(dim=24), seed=2).state_dict()
    if family == "matpac":
        return model, {**state, **{f"decoder.decoder_{name}": x for name, x in others.items()}}
    teacher = randomized(Layers(), seed=1).state_dict()
    state |= {f"target_{name}": x for name, x in teacher.items()}
    state |= {f"decoder_{name}": x for name, x in others.items()}
    state["mask_token"] = torch.zeros(1, 1, 24)
    return model, {"model": state, "epoch": 300, "args": argparse.Namespace(lr=3e-4)}


def save(contents, tmp_path, folder=NAME):
    path = tmp_path / folder / "checkpoint.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save(contents, path)
    return path


def run(path, out, family, *options):
    main([str(path), str(out), "--from", family, *HEADS_OPTION, *options])
    return load_pretrained(out)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same_output(ours, theirs, frames=(FRAMES, 64, 16)):
    for number in frames:
        spectrogram = noise(3, 80, number)
        actual, expected = ours(spectrogram), theirs(spectrogram)
        assert actual.shape == expected.shape
        deviation = (actual - expected).abs().max() / expected.abs().max()
        assert deviation < 1e-5, f"{number} frames: {deviation:.2g}"


# --- equal outputs ------------------------------------------------------------------------------


@families
def test_a_converted_encoder_gives_what_the_original_gives(family, tmp_path):
    model, contents = reference(family)
    encoder, normalization, config = run(save(contents, tmp_path), tmp_path / "out", family)
    assert_same_output(encoder, model)
    measured = (normalization.mean.item(), normalization.std.item())
    assert measured == pytest.approx(STATISTICS[family])
    assert config["training"]["checkpoint"] == f"{NAME}/checkpoint.pth"


@families
def test_the_comparison_tells_apart_what_could_be_mapped_wrongly(family, tmp_path):
    model, contents = reference(family)
    encoder, _, _ = run(save(contents, tmp_path), tmp_path / "out", family)
    changes = [swap_eps, transpose_patches, shift_positions]
    if encoder.class_token is not None:
        changes.append(drop_class_token)
    for change in changes:
        changed = copy.deepcopy(encoder)
        with torch.no_grad():
            change(changed)
        with pytest.raises(AssertionError, match="frames"):
            assert_same_output(changed, model)


def swap_eps(encoder):
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = {1e-5: 1e-6, 1e-6: 1e-5}[module.eps]


def transpose_patches(encoder):
    weight = encoder.patch_embed.weight
    weight.copy_(weight.unflatten(1, (16, 16)).transpose(1, 2).flatten(1))


def shift_positions(encoder):
    encoder.positions.copy_(encoder.positions.roll(1, 0))


def drop_class_token(encoder):
    encoder.class_token = None


@families
def test_audio_jepa_gives_what_the_original_gives_window_by_window(family, tmp_path):
    """16 patches of audio in windows of 6, 6 and 4, each with the positions from the first on."""
    model, contents = reference(family)
    out = tmp_path / "out"
    run(save(contents, tmp_path), out, family)
    wav = noise(2, 16 * 2_560)
    mean, std = STATISTICS[family]
    with torch.no_grad():
        spectrogram = (LogMelSpectrogram()(wav)[..., :256] - mean) / std
        windows = [model(window).unflatten(1, (5, -1)) for window in spectrogram.split(FRAMES, 2)]
    expected = torch.cat(windows, 2).transpose(1, 2).flatten(2)  # [B, T, F * D]
    ours = AudioJEPA(out)
    assert ours.get_output_dim() == expected.shape[2]
    for actual, wanted in ((ours(wav), expected), (ours.embed(wav), expected.mean(1))):
        assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("patch", [(16, 4), (80, 2)], ids=str)
def test_other_patches_are_read_from_the_weights(patch, tmp_path):
    model = randomized(WithClassToken(patch=patch))
    path = save(model.state_dict(), tmp_path, "weights")
    encoder, _, _ = run(path, tmp_path / "out", "m2d")
    assert (encoder.grid.patch_frequency, encoder.grid.patch_time) == patch
    assert_same_output(encoder, model)


def test_heads_are_64_dims_unless_said_otherwise(tmp_path):
    model = randomized(WithClassToken(dim=128, heads=2))
    convert(save(model.state_dict(), tmp_path), tmp_path / "out", "m2d")
    assert_same_output(load_pretrained(tmp_path / "out")[0], model)


def test_the_eps_of_the_layer_norms_can_be_set(tmp_path):
    model, contents = reference("released-jepa")
    swap_eps(model)
    encoder, _, _ = run(
        save(contents, tmp_path), tmp_path / "out", "released-jepa", "--norm_eps", "1e-6"
    )
    assert_same_output(encoder, model)


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("m2d", lambda name: f"module.ar.runtime.backbone.{name}"),  # fine-tuned with EVAR
        ("matpac", lambda name: f"module.{name}"),  # DataParallel
        ("released-jepa", lambda name: name.replace("encoder.", "encoder._orig_mod.")),  # compiled
        ("released-jepa", lambda name: f"module.{name}"),
    ],
)
def test_prefixes_are_found(family, rename, tmp_path):
    model, contents = reference(family)
    state = contents.get("model", contents.get("state_dict", contents))
    path = save({rename(name): tensor for name, tensor in state.items()}, tmp_path)
    assert_same_output(run(path, tmp_path / "out", family)[0], model)


def test_another_of_several_encoders_is_chosen_by_prefix(tmp_path):
    _, contents = reference("released-jepa")
    path = save(contents, tmp_path)
    encoder, _, _ = run(path, tmp_path / "out", "released-jepa", "--prefix", "target_encoder.")
    assert_same_output(encoder, randomized(Released(), seed=1))


def test_half_precision_weights_are_kept_in_float32(tmp_path):
    model, contents = reference("m2d")
    halved = {name: x.half() for name, x in contents["model"].items()}
    model.load_state_dict({name: halved[name].float() for name in model.state_dict()})
    assert_same_output(run(save(halved, tmp_path), tmp_path / "out", "m2d")[0], model)


# --- normalisation, report, card ----------------------------------------------------------------


@pytest.mark.parametrize("stats", [torch.tensor([-6.5, 3.5]), [-6.5, 3.5]], ids=["tensor", "list"])
def test_statistics_are_the_checkpoints_unless_said_otherwise(stats, tmp_path):
    _, contents = reference("m2d")
    path = save({**contents["model"], "norm_stats": stats}, tmp_path)
    _, normalization, _ = run(path, tmp_path / "out", "m2d")
    assert (normalization.mean.item(), normalization.std.item()) == (-6.5, 3.5)
    _, normalization, _ = run(path, tmp_path / "o", "m2d", "--norm_stats", "-5", "2")
    assert (normalization.mean.item(), normalization.std.item()) == (-5, 2)


@families
def test_what_is_left_unused_is_reported(family, tmp_path):
    _, contents = reference(family)
    state = contents.get("model", contents.get("state_dict", contents))
    report = convert(save(contents, tmp_path), tmp_path / "out", family, num_heads=HEADS)
    expected = {"m2d": "target_blocks", "matpac": "decoder", "released-jepa": "target_encoder"}
    assert expected[family] in report.unused
    used = report.encoder.state_dict().keys()
    assert sum(report.unused.values()) == len(state) - len(used)


def test_the_command_prints_the_report(tmp_path):
    path, out = save(reference("m2d")[1], tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "speechbrain_jepa.convert", path, out, "--from", "m2d"]
    done = subprocess.run([*command, *HEADS_OPTION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{convert(path, out, 'm2d', num_heads=HEADS)}\n"
    assert "target_blocks (24)" in done.stdout and str(out) in done.stdout


def test_the_model_card_names_the_origin_and_claims_no_other(tmp_path):
    _, contents = reference("matpac")
    run(save(contents, tmp_path), tmp_path / "out", "matpac")
    card = (tmp_path / "out" / CARD).read_text()
    assert "converted from MATPAC" in card and "github.com/aurianworld/matpac" in card
    assert "Riou" not in card and str(tmp_path) not in card


# --- what does not fit --------------------------------------------------------------------------


def refused(contents, tmp_path, match, *options, family="m2d", folder=NAME):
    path = save(contents, tmp_path, folder)
    with pytest.raises(SystemExit, match=match):
        run(path, tmp_path / "out", family, *options)
    assert not (tmp_path / "out").exists()


@families
@pytest.mark.parametrize(
    "missing",
    ["pos_embed", "patch_embed.proj.bias", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"],
)
def test_a_missing_parameter_is_named(family, missing, tmp_path):
    _, contents = reference(family)
    state = contents.get("model", contents.get("state_dict", contents))
    name = next(name for name in state if f".{name}".endswith(f".{missing}"))
    del state[name]
    refused(contents, tmp_path, rf"{name} (is )?missing", family=family)


def test_a_missing_layer_is_named(tmp_path):
    _, contents = reference("m2d")
    state = contents["model"]
    for name in [name for name in state if name.startswith("blocks.0.")]:
        del state[name]
    refused(contents, tmp_path, r"blocks\.0\.norm1\.weight, .*\(12\) missing")


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "dist_token", "norm_pre.weight"])
def test_an_unknown_parameter_is_refused_unless_ignored(name, tmp_path):
    model, contents = reference("m2d")
    contents["model"] |= {name: torch.ones(DIM), "other.bias": torch.ones(1)}
    refused(contents, tmp_path, rf"{name}, other\.bias unknown .*--ignore {name}")
    refused(contents, tmp_path, r": other\.bias unknown", "--ignore", name)
    path = tmp_path / NAME / "checkpoint.pth"
    encoder, _, _ = run(path, tmp_path / "out", "m2d", "--ignore", name, "--ignore", "other.")
    assert_same_output(encoder, model)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("blocks.1.attn.proj.weight", (DIM, DIM + 1), r"attn\.proj\.weight is \(48, 49\)"),
        ("cls_token", (1, 1, DIM + 4), r"cls_token"),
        ("patch_embed.proj.weight", (DIM, 3, 16, 16), r"\(48, 3, 16, 16\).*not the shapes"),
        ("patch_embed.proj.weight", (DIM, 1, 32, 16), "patch_frequency=32"),
        ("pos_embed", (1, 1 + 29, DIM), "not of the 80 mel bands"),
        ("pos_embed", (1, 5, 6, DIM), "not the shapes of M2D"),
        ("pos_embed", (1, 31, DIM + 4), "no encoder of M2D found"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, match, tmp_path):
    _, contents = reference("m2d")
    contents["model"][name] = torch.zeros(shape)
    refused(contents, tmp_path, match)


def test_positions_without_time_are_refused(tmp_path):
    _, contents = reference("released-jepa")
    contents["state_dict"]["encoder.pos_embed"] = torch.zeros(1, 5, 1, DIM)
    refused(contents, tmp_path, "single time step", family="released-jepa")


@pytest.mark.parametrize(
    ("weights", "family"),
    [("m2d", "matpac"), ("matpac", "m2d"), ("m2d", "released-jepa"), ("released-jepa", "m2d")],
)
def test_weights_of_another_family_are_refused(weights, family, tmp_path):
    refused(
        reference(weights)[1], tmp_path, "missing|several encoders|not the shapes", family=family
    )


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        ("m2d_vit_base-80x208p16x16-x", "80x208 .* of 80x96 .*name says 80x208p16x16"),
        ("m2d_vit_base-80x96p16x8-x", "patches 16x8"),
        ("m2d_vit_base-64x96p16x16-x", "input 64x96"),
        ("m2d_vit_base-80x96p16x16p32k-x", "says 32 kHz"),
    ],
)
def test_a_name_that_does_not_fit_is_refused_unless_overridden(folder, match, tmp_path):
    model, contents = reference("m2d")
    refused(contents, tmp_path, match, folder=folder)
    sizes = ["--input_size", "80x96", "--patch_size", "16x16"]
    path = tmp_path / folder / "checkpoint.pth"
    assert_same_output(run(path, tmp_path / "out", "m2d", *sizes)[0], model)


def test_sizes_that_do_not_fit_the_weights_are_refused(tmp_path):
    _, contents = reference("m2d")
    refused(contents, tmp_path, "80x208 .*does not fit", "--input_size", "80x208")
    refused(contents, tmp_path, "patches 16x4 does not fit", "--patch_size", "16x4")
    with pytest.raises(SystemExit):
        run(tmp_path / NAME / "checkpoint.pth", tmp_path / "out", "m2d", "--input_size", "80")


def test_frames_that_fill_no_patch_are_of_no_account(tmp_path):
    """M2D's ...-80x1001p16x16-... has the positions of 62 patches in time; here 101 and 6."""
    model, contents = reference("m2d")
    path = save(contents, tmp_path, "m2d_vit_base-80x101p16x16-x")
    encoder, _, _ = run(path, tmp_path / "out", "m2d")
    assert encoder.grid.frames == 96
    assert_same_output(encoder, model)


def test_dims_of_no_usual_head_need_an_option(tmp_path):
    path = save(reference("m2d")[1], tmp_path)
    with pytest.raises(ValueError, match="48 dims are not a multiple of 64: set --num_heads"):
        convert(path, tmp_path / "out", "m2d")


@pytest.mark.parametrize("name", ["blocks.0.norm1.bias", "pos_embed", "cls_token"])
def test_weights_that_are_not_numbers_are_refused(name, tmp_path):
    _, contents = reference("m2d")
    contents["model"][name].view(-1)[3] = float("nan")
    refused(contents, tmp_path, "damaged: .* holds NaN")


def test_an_unknown_family_is_refused(tmp_path):
    path = save(reference("m2d")[1], tmp_path)
    with pytest.raises(ValueError, match="choose one of m2d, matpac, released-jepa"):
        convert(path, tmp_path / "out", "beats")


# --- reading without running code ---------------------------------------------------------------


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_that_runs_code_is_refused_unread_unless_unsafe(zipped, tmp_path):
    model, contents = reference("m2d")
    touched = tmp_path / "touched"
    path = save({}, tmp_path)
    contents["args"] = Bomb(touched)
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit, match=r"asks for \S*exec, .* can run any code.*--unsafe"):
        run(path, tmp_path / "out", "m2d")
    assert not touched.exists() and not (tmp_path / "out").exists()
    encoder, _, _ = run(path, tmp_path / "out", "m2d", "--unsafe")
    assert touched.exists()
    assert_same_output(encoder, model)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hydras_lists_and_dicts_are_read_without_omegaconf(zipped, tmp_path, monkeypatch):
    """As the released code leaves them in an optimiser's betas."""
    omegaconf = pytest.importorskip("omegaconf")
    model, contents = reference("released-jepa")
    optimizer = {"lr": 3e-4, "betas": [0.9, 0.95], "fused": True, "name": "adamw", "paths": {}}
    config = omegaconf.OmegaConf.create({"model": {"optimizer": optimizer}})
    config.model.optimizer.merge_with({"lr": "${oc.env:HOME}"})
    contents["optimizer_states"] = [{"param_groups": [dict(config.model.optimizer, lr=1.0)]}]
    assert (
        type(contents["optimizer_states"][0]["param_groups"][0]["betas"]).__name__ == "ListConfig"
    )
    contents["hyper_parameters"] = config
    path = tmp_path / "last.ckpt"
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setitem(sys.modules, "omegaconf", None)  # importing it would fail
    encoder, _, _ = run(path, tmp_path / "out", "released-jepa")
    assert_same_output(encoder, model)


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    path = save(reference("m2d")[1], tmp_path)
    whole = path.read_bytes()
    check = partial(run, path, tmp_path / "out", "m2d")
    for contents in (whole[: len(whole) // 2], b"", b"<!DOCTYPE html>"):
        path.write_bytes(contents)
        with pytest.raises(SystemExit, match="is not a checkpoint, or is damaged"):
            check()
    torch.save([torch.zeros(3)], path)
    with pytest.raises(SystemExit, match="holds a list, not a dict"):
        check()
    path.unlink()
    with pytest.raises(SystemExit, match="no such file"):
        check()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    path = save(reference("m2d")[1], tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"notes\.txt"):
        run(path, tmp_path / "out", "m2d")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
