"""Patches, positions, encoder and predictor against plain PyTorch and naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speechbrain_jepa.vit import Encoder, LayerNorm, PatchGrid, Predictor, sincos_positions

GRIDS = {
    "16x16": PatchGrid(frames=208),  # 5 x 13 patches
    "16x4": PatchGrid(frames=64, patch_frequency=16, patch_time=4),  # 5 x 16
    "80x2": PatchGrid(frames=40, patch_frequency=80, patch_time=2),  # 1 x 20
}
all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
SMALL = {"dim": 48, "depth": 2, "num_heads": 3}
SMALL_PREDICTOR = {"encoder_dim": 48, "dim": 32, "depth": 2, "num_heads": 4}


def assert_close(ours, theirs, relative=1e-5):
    """Within `relative` of the largest entry: float32 sums in another order."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def randomized(module: nn.Module) -> nn.Module:
    """Biases and norms away from the 0 and 1 they start with, so that their use is tested."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def encoder_of(grid: PatchGrid, **settings) -> Encoder:
    torch.manual_seed(0)
    return randomized(Encoder(grid, **{**SMALL, **settings}))


def predictor_of(grid: PatchGrid) -> Predictor:
    torch.manual_seed(0)
    return randomized(Predictor(grid, **SMALL_PREDICTOR))


def noise(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random_index(clips, patches, count) -> torch.Tensor:
    """Some patches of each clip, ascending."""
    order = torch.rand(clips, patches, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :count].sort(1).values


# --- an independent implementation ------------------------------------------------------------


def naive_position(row: int, column: int, dim: int) -> list[float]:
    """MAE's order: sines and cosines of the time patch, then of the frequency patch."""
    values = []
    for place in (column, row):
        angles = [place / 10_000 ** (i / (dim // 4)) for i in range(dim // 4)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return values


def naive_positions(grid: PatchGrid, time_patches: int, dim: int) -> torch.Tensor:
    rows = range(grid.frequency_patches)
    return torch.tensor(
        [naive_position(row, column, dim) for row in rows for column in range(time_patches)]
    )


def plain_layers(blocks, dim, num_heads) -> nn.ModuleList:
    """torch.nn's pre-norm transformer layers with the same weights."""
    layers = nn.ModuleList()
    for block in blocks:
        hidden = block.mlp.fc1.out_features
        layer = nn.TransformerEncoderLayer(
            dim,
            num_heads,
            hidden,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=block.norm1.eps,
            batch_first=True,
            norm_first=True,
        )
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.attn.qkv.weight,
                "self_attn.in_proj_bias": block.attn.qkv.bias,
                "self_attn.out_proj.weight": block.attn.proj.weight,
                "self_attn.out_proj.bias": block.attn.proj.bias,
                "linear1.weight": block.mlp.fc1.weight,
                "linear1.bias": block.mlp.fc1.bias,
                "linear2.weight": block.mlp.fc2.weight,
                "linear2.bias": block.mlp.fc2.bias,
                "norm1.weight": block.norm1.weight,
                "norm1.bias": block.norm1.bias,
                "norm2.weight": block.norm2.weight,
                "norm2.bias": block.norm2.bias,
            }
        )
        layers.append(layer)
    return layers


def conv_patches(encoder: Encoder, spectrogram: torch.Tensor) -> torch.Tensor:
    """Patch embedding as vision transformers write it: a convolution that strides by its size."""
    grid = encoder.grid
    size = (grid.patch_frequency, grid.patch_time)
    weight = encoder.patch_embed.weight.view(encoder.dim, 1, *size)
    image = F.conv2d(spectrogram[:, None], weight, encoder.patch_embed.bias, stride=size)
    return image.flatten(2).transpose(1, 2)


def plain_encoder(encoder: Encoder, spectrogram, index=None) -> list[torch.Tensor]:
    """Every layer's output [K, D] of one clip [bands, frames], the last one normed."""
    grid = encoder.grid
    x = conv_patches(encoder, spectrogram[None])
    x = x + naive_positions(grid, spectrogram.shape[1] // grid.patch_time, encoder.dim)
    if index is not None:
        x = x[:, index]
    outputs = [x[0]]
    for layer in plain_layers(encoder.blocks, encoder.dim, encoder.config["num_heads"]):
        x = layer(x)
        outputs.append(x[0])
    outputs[-1] = F.layer_norm(
        x[0], (encoder.dim,), encoder.norm.weight, encoder.norm.bias, encoder.norm.eps
    )
    return outputs


def plain_predictor(predictor: Predictor, grid, context, context_index, target_index):
    """One clip: context [Kc, D] in the encoder's dims to predictions [Kt, D]; context first."""
    dim = predictor.mask_token.shape[0]
    positions = naive_positions(grid, grid.time_patches, dim)
    known = F.linear(context, predictor.proj_in.weight, predictor.proj_in.bias)
    known = known + positions[context_index]
    asked = predictor.mask_token + positions[target_index]
    x = torch.cat([known, asked])[None]
    for layer in plain_layers(predictor.blocks, dim, SMALL_PREDICTOR["num_heads"]):
        x = layer(x)
    norm = predictor.norm
    x = F.layer_norm(x[0, len(known) :], (dim,), norm.weight, norm.bias, norm.eps)
    return F.linear(x, predictor.proj_out.weight, predictor.proj_out.bias)


# --- grid and patches -------------------------------------------------------------------------


def test_the_grids_of_the_paper():
    """80 / 16 = 5 frequency patches; Table 2's 2.1, 3.2 and 6.4 s are 13, 20 and 40 in time."""
    for frames, time_patches in ((208, 13), (320, 20), (640, 40)):
        grid = PatchGrid(frames=frames)
        assert (grid.frequency_patches, grid.time_patches) == (5, time_patches)
        assert grid.num_patches == 5 * time_patches
    assert PatchGrid(208, 16, 4).num_patches == 5 * 52
    assert PatchGrid(208, 80, 2).num_patches == 104


@all_grids
def test_patch_f_T_plus_t_holds_its_bands_and_frames_row_by_row(grid):
    spectrogram = noise(2, 80, grid.frames)
    patches = grid.patches(spectrogram)
    assert patches.shape == (2, grid.num_patches, grid.patch_values)
    for row in range(grid.frequency_patches):
        for column in range(grid.time_patches):
            bands = slice(row * grid.patch_frequency, (row + 1) * grid.patch_frequency)
            frames = slice(column * grid.patch_time, (column + 1) * grid.patch_time)
            patch = patches[:, row * grid.time_patches + column]
            assert torch.equal(patch, spectrogram[:, bands, frames].flatten(1))


@all_grids
def test_patch_embedding_equals_a_strided_convolution_with_the_same_weights(grid):
    encoder, spectrogram = encoder_of(grid), noise(2, 80, grid.frames)
    assert_close(encoder.patch_embed(grid.patches(spectrogram)), conv_patches(encoder, spectrogram))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 200}, "crop_frames=200 .* patch_time=16: use 192 or 208"),
        ({"frames": 8}, "crop_frames=8 .* use 16"),
        ({"frames": 208, "patch_time": 0}, "patch_time=0"),
        ({"patch_frequency": 32}, "bands=80 .* patch_frequency=32: use 64 or 96"),
        ({"patch_frequency": 160}, "bands=80 .* patch_frequency=160"),
    ],
)
def test_a_grid_that_does_not_tile_is_refused_with_the_nearest_that_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        PatchGrid(**wrong)


# --- positions --------------------------------------------------------------------------------


@all_grids
@pytest.mark.parametrize("dim", [4, 48, 768])
def test_positions_equal_a_naive_loop(grid, dim):
    ours = sincos_positions(grid.frequency_patches, grid.time_patches, dim)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, naive_positions(grid, grid.time_patches, dim))


def test_positions_are_distinct_and_neither_trained_nor_stored():
    encoder = encoder_of(GRIDS["16x16"])
    assert len(encoder.positions.unique(dim=0)) == 65
    assert "positions" not in encoder.state_dict()
    assert "positions" not in dict(encoder.named_parameters())


def test_positions_need_a_multiple_of_four_dims():
    with pytest.raises(ValueError, match="dim=46"):
        sincos_positions(5, 13, 46)


# --- encoder ----------------------------------------------------------------------------------


@all_grids
def test_encoder_equals_torch_nn_layers_with_the_same_weights(grid):
    encoder, spectrogram = encoder_of(grid), noise(3, 80, grid.frames)
    ours = encoder(spectrogram, all_layers=True)
    assert ours.shape == (3, 3, grid.num_patches, 48)  # 1 + depth layers
    for clip in range(3):
        for layer, plain in enumerate(plain_encoder(encoder, spectrogram[clip])):
            assert_close(ours[layer, clip], plain)
    assert torch.equal(encoder(spectrogram), ours[-1])


def test_one_layer_of_the_base_size_equals_torch_nn():
    """768 dims and 12 heads as in the paper; one layer keeps it quick."""
    encoder = encoder_of(GRIDS["16x16"], dim=768, depth=1, num_heads=12)
    spectrogram = noise(1, 80, 208)
    assert_close(encoder(spectrogram)[0], plain_encoder(encoder, spectrogram[0])[-1])


@all_grids
def test_encoding_some_patches_equals_the_plain_model_on_these_patches(grid):
    encoder, spectrogram = encoder_of(grid), noise(3, 80, grid.frames)
    index = random_index(3, grid.num_patches, 8)
    ours = encoder(spectrogram, index)
    for clip in range(3):
        assert_close(ours[clip], plain_encoder(encoder, spectrogram[clip], index[clip])[-1])


def test_all_patches_by_index_equals_no_index():
    encoder, spectrogram = encoder_of(GRIDS["16x16"]), noise(2, 80, 208)
    assert_close(encoder(spectrogram, torch.arange(65).expand(2, -1)), encoder(spectrogram))


def test_patches_out_of_sight_do_not_matter():
    encoder, spectrogram = encoder_of(GRIDS["16x16"]), noise(1, 80, 208)
    index = torch.arange(5, 30)[None]
    changed = spectrogram.clone()
    changed[:, 64:] += 1.0  # the last row: patches 52 to 64
    assert torch.equal(encoder(spectrogram, index), encoder(changed, index))


@all_grids
@pytest.mark.parametrize("with_index", [False, True])
def test_shorter_inputs_keep_the_positions_of_their_time_patches(grid, with_index):
    encoder, time_patches = encoder_of(grid), 7
    spectrogram = noise(2, 80, time_patches * grid.patch_time)
    count = grid.frequency_patches * time_patches
    index = random_index(2, count, 5) if with_index else None
    ours = encoder(spectrogram, index)
    for clip in range(2):
        picked = None if index is None else index[clip]
        assert_close(ours[clip], plain_encoder(encoder, spectrogram[clip], picked)[-1])


@pytest.mark.parametrize("with_index", [False, True])
def test_a_class_token_takes_part_and_is_left_out(with_index):
    """As one more token in front of the plain layers, whose output for it is dropped."""
    grid = GRIDS["16x16"]
    encoder, spectrogram = encoder_of(grid, class_token=True), noise(3, 80, 208)
    index = random_index(3, 65, 8) if with_index else None
    ours = encoder(spectrogram, index, all_layers=True)
    assert ours.shape == (3, 3, 8 if with_index else 65, 48)
    patches = conv_patches(encoder, spectrogram) + naive_positions(grid, 13, 48)
    for clip in range(3):
        visible = patches[clip] if index is None else patches[clip, index[clip]]
        x = torch.cat([encoder.class_token[None], visible])[None]
        outputs = [x[0, 1:]]
        for layer in plain_layers(encoder.blocks, 48, SMALL["num_heads"]):
            x = layer(x)
            outputs.append(x[0, 1:])
        outputs[-1] = encoder.norm(outputs[-1])
        for layer, plain in enumerate(outputs):
            assert_close(ours[layer, clip], plain)
    assert torch.equal(encoder(spectrogram, index), ours[-1])


def test_stored_positions_are_those_of_the_state_dict():
    grid, spectrogram = GRIDS["16x16"], noise(2, 80, 112)
    encoder = encoder_of(grid, stored_positions=True)
    assert_close(encoder(spectrogram), encoder_of(grid)(spectrogram))
    positions = noise(5, 13, 48)
    encoder.load_state_dict({**encoder.state_dict(), "positions": positions.flatten(0, 1)})
    other = encoder_of(grid)
    other.positions = positions.flatten(0, 1)
    assert torch.equal(encoder(spectrogram), other(spectrogram))
    assert "positions" not in dict(encoder.named_parameters())


RAGGED = torch.arange(20) < torch.tensor([20, 3, 11, 1])[:, None]


@all_grids
@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("class_token", [False, True], ids=["no class token", "class token"])
def test_a_ragged_batch_equals_every_clip_alone(grid, all_layers, class_token):
    encoder, spectrogram = encoder_of(grid, class_token=class_token), noise(4, 80, grid.frames)
    index = random_index(4, grid.num_patches, 20)
    ours = encoder(spectrogram, index, RAGGED, all_layers=all_layers)
    for clip, valid in enumerate(RAGGED):
        alone = encoder(spectrogram[clip, None], index[clip, valid][None], all_layers=all_layers)
        assert_close(ours[..., clip, valid, :], alone[..., 0, :, :])
    assert ours[..., ~RAGGED, :].count_nonzero() == 0  # padding


@pytest.mark.parametrize("clip", range(4))
def test_gradients_of_a_clip_do_not_depend_on_batch_mates(clip):
    """Of every parameter and of the spectrogram, from a loss on one clip of a ragged batch."""
    encoder = encoder_of(GRIDS["16x16"])
    spectrogram, weight = noise(4, 80, 208), noise(20, 48)
    index = random_index(4, 65, 20)
    valid = RAGGED[clip]

    def gradients(rows, index, valid_rows, picked):
        rows = rows.clone().requires_grad_()
        out = encoder(rows, index, valid_rows)[picked]
        loss = (out[: valid.sum()] * weight[: valid.sum()]).sum()
        return torch.autograd.grad(loss, [rows, *encoder.parameters()])

    together = gradients(spectrogram, index, RAGGED, clip)
    alone = gradients(spectrogram[clip, None], index[clip, valid][None], None, 0)
    assert_close(together[0][clip], alone[0][0])
    others = [other for other in range(4) if other != clip]
    assert together[0][others].count_nonzero() == 0
    for ours, theirs in zip(together[1:], alone[1:], strict=True):
        assert_close(ours, theirs)


def test_what_stands_in_padding_does_not_matter():
    encoder, spectrogram = encoder_of(GRIDS["16x16"]), noise(4, 80, 208)
    index = random_index(4, 65, 20)
    other = torch.where(RAGGED, index, 64 - index)
    ours, theirs = (encoder(spectrogram, pick, RAGGED) for pick in (index, other))
    assert torch.equal(ours, theirs)


def test_encoder_under_bfloat16_autocast_is_near_float32():
    """Two layers: about ten roundings of 2 ** -8 each, of the Euclidean norm."""
    encoder, spectrogram = encoder_of(GRIDS["16x16"]), noise(4, 80, 208)
    index = random_index(4, 65, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(spectrogram, index, RAGGED)
    full = encoder(spectrogram, index, RAGGED)
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert (half.float() - full).norm() < 10 * 2.0**-8 * full.norm()


def test_gradients_under_autocast_are_float32_for_every_parameter():
    encoder, spectrogram = encoder_of(GRIDS["16x16"]), noise(2, 80, 208)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = encoder(spectrogram, random_index(2, 65, 20)).float().square().mean()
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [130, 4_160, 33_280])  # 65 tokens of 2, 64 and 512 clips
def test_layer_norm_in_half_precision_sums_its_gradients_in_float32(dtype, rows):
    """Summed in bfloat16 they stop growing at 256 times a row's share: 70 % off at 33 280 rows."""
    norm = randomized(LayerNorm(48, eps=1e-6))
    x, grad = noise(rows, 48).to(dtype), (noise(rows, 48).flip(0) + 0.1).to(dtype)
    parameters = (norm.weight, norm.bias)
    ours, theirs = (
        torch.autograd.grad(norm(x.to(kind)), parameters, grad.to(kind))
        for kind in (dtype, torch.float32)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        # x, its normalised form, their product and the sum are rounded, once each
        assert (our - their).norm() < 4 * torch.finfo(dtype).eps / 2 * their.norm()


def test_base_encoder_has_the_parameters_of_vit_base():
    """A layer has 12 d^2 + 13 d, the patch projection 256 d + d, the last norm 2 d; d = 768."""
    assert Encoder(GRIDS["16x4"], dim=4, num_heads=1).config["depth"] == 12
    for depth in (0, 1):
        encoder, d = Encoder(PatchGrid(frames=208), depth=depth), 768
        expected = depth * (12 * d * d + 13 * d) + (256 * d + d) + 2 * d
        assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_initialisation_is_xavier_uniform_with_zero_biases():
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=192, depth=1, num_heads=3)
    predictor = Predictor(PatchGrid(frames=208), encoder_dim=192, dim=1024, depth=1, num_heads=4)
    for module in (*encoder.modules(), *predictor.modules()):
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.99 * bound < module.weight.abs().max() <= bound
            # the deviation of U(-b, b) is b / sqrt(3); over 4e4 and more weights 2 % is > 5 sigma
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
            assert module.bias.count_nonzero() == 0
    # N(0, 0.02), released code; 1024 values: the deviation's own is 2.2 %, five of them 11 %
    assert predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.11)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 64, 208), "64 bands"),
        ((1, 80, 224), "at most 208 frames"),
        ((1, 80, 200), "multiples of 16"),
    ],
)
def test_spectrograms_that_do_not_fit_are_refused_with_what_would(shape, message):
    with pytest.raises(ValueError, match=message):
        encoder_of(GRIDS["16x16"])(torch.zeros(shape))


def test_dims_that_do_not_divide_into_heads_are_refused():
    for build in (
        lambda: Encoder(PatchGrid(), dim=48, depth=1, num_heads=5),
        lambda: Predictor(PatchGrid(), encoder_dim=48, dim=48, depth=1, num_heads=5),
    ):
        with pytest.raises(ValueError, match="dim=48 is not a multiple of num_heads=5"):
            build()


def test_an_unknown_attention_is_refused_at_construction():
    for build in (
        lambda: Encoder(PatchGrid(), **SMALL, attention="fast"),
        lambda: Predictor(PatchGrid(), **SMALL_PREDICTOR, attention="fast"),
    ):
        with pytest.raises(ValueError, match="attention='fast'"):
            build()


# --- predictor --------------------------------------------------------------------------------


def predictor_inputs(grid, clips=4, context=9, targets=7):
    order = random_index(clips, grid.num_patches, grid.num_patches)
    shuffle = torch.rand(order.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    context_index, target_index, _ = shuffle.split(
        [context, targets, grid.num_patches - context - targets], 1
    )
    return noise(clips, context, 48), context_index.sort(1).values, target_index.sort(1).values


RAGGED_CONTEXT = torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]
RAGGED_TARGET = torch.arange(7) < torch.tensor([2, 7, 1, 5])[:, None]


@all_grids
def test_predictor_equals_torch_nn_layers_with_the_same_weights(grid):
    predictor = predictor_of(grid)
    context, context_index, target_index = predictor_inputs(grid)
    ours = predictor(context, context_index, target_index)
    for clip in range(4):
        plain = plain_predictor(
            predictor, grid, context[clip], context_index[clip], target_index[clip]
        )
        assert_close(ours[clip], plain)


@pytest.mark.parametrize("ragged", ["both", "context", "target"])
def test_a_ragged_prediction_equals_every_clip_alone(ragged):
    grid = GRIDS["16x16"]
    predictor = predictor_of(grid)
    context, context_index, target_index = predictor_inputs(grid)
    context_valid = RAGGED_CONTEXT if ragged in ("both", "context") else None
    target_valid = RAGGED_TARGET if ragged in ("both", "target") else None
    ours = predictor(context, context_index, target_index, context_valid, target_valid)
    for clip in range(4):
        known = slice(None) if context_valid is None else context_valid[clip]
        asked = slice(None) if target_valid is None else target_valid[clip]
        plain = plain_predictor(
            predictor,
            grid,
            context[clip, known],
            context_index[clip, known],
            target_index[clip, asked],
        )
        assert_close(ours[clip, asked], plain)


def test_a_prediction_depends_on_where_its_target_is():
    grid = GRIDS["16x16"]
    predictor = predictor_of(grid)
    context, context_index, _ = predictor_inputs(grid, clips=1)
    free = [patch for patch in range(65) if patch not in context_index[0].tolist()]
    first, second = (predictor(context, context_index, torch.tensor([[p]])) for p in free[:2])
    assert (first - second).abs().max() > 1e-3
