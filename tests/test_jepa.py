"""The JEPA of section 3: what trains, what follows, and that a clip is on its own in a batch."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import NormalizedL2, SmoothL1, SmoothL1Norms
from speechbrain_jepa.masking import (
    MultiBlockMasking,
    PatchMasks,
    TimeMasking,
    UnstructuredMasking,
    for_grid,
)
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

GRID = PatchGrid(frames=208)
STRATEGIES = {
    "unstructured": UnstructuredMasking,
    "multi-block": MultiBlockMasking,
    "time": TimeMasking,
}
DOMAINS = ["audio", "latent"]
LOSSES = [SmoothL1(), SmoothL1Norms(), NormalizedL2()]
# Table 3's six rows at 208 frames and Table 2's three durations; their first rows are the same
TABLE_ROWS = [(name, domain, 208) for domain, name in itertools.product(DOMAINS, STRATEGIES)]
TABLE_ROWS += [("unstructured", "audio", frames) for frames in (208, 320, 640)]

all_strategies = pytest.mark.parametrize("strategy", STRATEGIES)
all_domains = pytest.mark.parametrize("domain", DOMAINS)


def assert_close(ours, theirs, relative=1e-5):
    """Within `relative` of the largest entry: float32 sums in another order."""
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def build(domain="audio", grid=GRID, loss=None, moved=True, **settings) -> JEPA:
    """A small JEPA, with the context encoder away from the target encoder if `moved`."""
    torch.manual_seed(0)
    jepa = JEPA(
        Encoder(grid, dim=48, depth=2, num_heads=3),
        Predictor(grid, encoder_dim=48, dim=32, depth=2, num_heads=4),
        loss or SmoothL1(),
        target_masking=domain,
        **settings,
    )
    if moved:
        with torch.no_grad():
            for parameter in (
                *jepa.context_encoder.parameters(),
                *jepa.predictor.parameters(),
            ):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return jepa


def batch(clips=6, frames=208):
    return torch.randn(clips, 80, frames, generator=torch.Generator().manual_seed(1))


def draw(strategy, clips=6, grid=GRID):
    return STRATEGIES[strategy](grid)(clips, generator=torch.Generator().manual_seed(2))


def gradients(jepa, loss):
    trained = {name: p for name, p in jepa.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def patch_map(index, valid, clips=6, grid=GRID):
    """Boolean [B, 80, frames]: which values of the spectrogram belong to the listed patches."""
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    listed = torch.zeros(clips, grid.num_patches, dtype=torch.int64)
    listed.scatter_add_(1, index, valid.long())
    image = listed.bool().view(clips, grid.frequency_patches, grid.time_patches)
    image = image.repeat_interleave(grid.patch_frequency, 1)
    return image.repeat_interleave(grid.patch_time, 2)


# --- the target encoder -----------------------------------------------------------------------


def test_target_encoder_starts_as_a_copy_and_shares_no_memory():
    jepa = build(moved=False)
    ours, theirs = (e.state_dict() for e in (jepa.target_encoder, jepa.context_encoder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    assert torch.equal(jepa.target_encoder(batch()), jepa.context_encoder(batch()))


@all_domains
@all_strategies
def test_target_encoder_takes_no_gradient(domain, strategy):
    jepa = build(domain)
    output = jepa(batch(), draw(strategy))
    assert not output.targets.requires_grad
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in jepa.target_encoder.parameters())


def test_trainable_parameters_are_those_of_context_encoder_and_predictor():
    jepa = build()
    trainable = {id(p) for p in jepa.parameters() if p.requires_grad}
    expected = {id(p) for p in (*jepa.context_encoder.parameters(), *jepa.predictor.parameters())}
    assert trainable == expected


def test_target_encoder_is_always_in_eval_mode():
    jepa = build()
    for mode in (True, False, True):
        assert jepa.train(mode) is jepa
        assert not any(module.training for module in jepa.target_encoder.modules())
        assert jepa.context_encoder.training == jepa.predictor.training == mode
    torch.nn.ModuleDict({"jepa": jepa}).train()  # as SpeechBrain holds it
    assert not any(module.training for module in jepa.target_encoder.modules())


def test_target_encoder_is_stored_for_resuming():
    jepa, other = build(), build(moved=False)
    jepa.update_target(0.5)
    other.load_state_dict(jepa.state_dict())
    assert torch.equal(jepa.target_encoder(batch()), other.target_encoder(batch()))
    assert not torch.equal(jepa.target_encoder(batch()), jepa.context_encoder(batch()))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.99995, 1.0])
def test_update_target_equals_equation_1_in_numpy(rate):
    jepa = build()
    before = {n: p.double().numpy().copy() for n, p in jepa.target_encoder.named_parameters()}
    jepa.update_target(rate)
    context = dict(jepa.context_encoder.named_parameters())
    for name, after in jepa.target_encoder.named_parameters():
        expected = rate * before[name] + (1 - rate) * context[name].detach().double().numpy()
        np.testing.assert_allclose(after.numpy(), expected, rtol=1e-6, atol=1e-7)


@all_domains
@all_strategies
def test_a_class_token_trains_and_the_target_encoders_follows(domain, strategy):
    encoder = Encoder(GRID, dim=48, depth=2, num_heads=3, class_token=True, stored_positions=True)
    predictor = Predictor(GRID, encoder_dim=48, dim=32, depth=2, num_heads=4)
    jepa = JEPA(encoder, predictor, SmoothL1(), target_masking=domain)
    masks = draw(strategy)
    output = jepa(batch(), masks)
    output.loss.backward()
    assert output.predictions.shape == (*masks.target_index.shape, 48)
    assert encoder.class_token.grad.count_nonzero() > 0
    before = jepa.target_encoder.class_token.clone()
    with torch.no_grad():
        encoder.class_token.add_(1)
    jepa.update_target(0.75)
    assert_close(jepa.target_encoder.class_token, before + 0.25)


def test_many_small_updates_follow_the_closed_form():
    """With a fixed context encoder n updates leave rate ** n of the start.

    Each update rounds to float32, by at most 2 ** -24 of the parameter.
    """
    jepa, rate, updates = build(), 0.999, 500
    start = [p.double() for p in jepa.target_encoder.parameters()]
    for _ in range(updates):
        jepa.update_target(rate)
    for before, context, after in zip(
        start, jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True
    ):
        context = context.detach().double()
        expected = context + rate**updates * (before - context)
        assert_close(after.double(), expected, relative=updates * 2.0**-24)


def test_updates_at_the_recipes_end_rate_follow_float64():
    """Rate 0.99999 towards weights 0.2 % away, which move on: each update is under half the
    spacing of float32. Compared with the same average in float64, rounded once.
    """
    jepa, rate, updates = build(moved=False), 0.99999, 3000
    context = list(jepa.context_encoder.parameters())
    target = list(jepa.target_encoder.parameters())
    with torch.no_grad():
        for ours, theirs in zip(context, target, strict=True):
            theirs.normal_()
            ours.copy_(theirs * (1 + 0.002 * torch.rand_like(theirs)))
    start = [p.detach().double() for p in target]
    expected = [p.clone() for p in start]
    for _ in range(updates):
        jepa.update_target(rate)
        torch._foreach_lerp_(expected, [p.detach().double() for p in context], 1 - rate)
        torch._foreach_mul_([p.data for p in context], 1 + 1e-7)
    for before, ours, theirs in zip(start, target, expected, strict=True):
        # half a spacing of the result, and less than a thousandth of the way
        assert ((ours - theirs).abs() <= 1.01 * 2.0**-24 * theirs.abs()).all()
        assert (ours - theirs).norm() < 2e-3 * (theirs - before).norm()


def test_an_average_taken_up_from_its_state_dict_goes_on_to_the_last_bit():
    jepa, resumed = build(), build(moved=False)
    for _ in range(5):
        jepa.update_target(0.9999)
    resumed.load_state_dict(jepa.state_dict())
    for _ in range(5):
        jepa.update_target(0.9999)
        resumed.update_target(0.9999)
    for ours, theirs in zip(resumed.parameters(), jepa.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert any(rest.any() for rest in jepa.target_rest)


def test_update_target_does_not_touch_the_context_encoder_or_the_graph():
    jepa = build()
    before = [p.detach().clone() for p in jepa.context_encoder.parameters()]
    loss = jepa(batch(), draw("unstructured")).loss
    jepa.update_target(0.5)
    loss.backward()  # the targets were detached: moving the target encoder breaks nothing
    assert all(map(torch.equal, before, jepa.context_encoder.parameters()))


# --- what sees what ---------------------------------------------------------------------------


@all_strategies
def test_audio_targets_do_not_see_the_context(strategy):
    jepa, masks, spectrogram = build("audio"), draw(strategy), batch()
    elsewhere = ~patch_map(masks.target_index, masks.target_valid)
    changed = spectrogram + elsewhere
    assert elsewhere.any()
    ours, theirs = jepa.targets(spectrogram, masks), jepa.targets(changed, masks)
    assert torch.equal(ours, theirs)


@all_strategies
def test_latent_targets_see_the_context(strategy):
    jepa, masks, spectrogram = build("latent"), draw(strategy), batch()
    changed = spectrogram + patch_map(masks.context_index, masks.context_valid)
    ours, theirs = jepa.targets(spectrogram, masks), jepa.targets(changed, masks)
    difference = (ours - theirs).abs().amax(-1)
    valid = difference > -1 if masks.target_valid is None else masks.target_valid
    assert (difference[valid] > 1e-4).all()


@all_domains
@all_strategies
def test_predictions_do_not_see_the_targets(domain, strategy):
    jepa, masks, spectrogram = build(domain), draw(strategy), batch()
    elsewhere = ~patch_map(masks.context_index, masks.context_valid)
    ours, theirs = jepa(spectrogram, masks), jepa(spectrogram + elsewhere, masks)
    assert torch.equal(ours.predictions, theirs.predictions)
    assert not torch.equal(ours.targets, theirs.targets)


@all_domains
@all_strategies
def test_the_loss_sends_gradient_to_the_context_patches_of_the_input_only(domain, strategy):
    """Through the context encoder alone: nothing comes back by way of the target encoder."""
    jepa, masks = build(domain), draw(strategy)
    spectrogram = batch().requires_grad_()
    jepa(spectrogram, masks).loss.backward()
    context = patch_map(masks.context_index, masks.context_valid)
    assert spectrogram.grad[~context].count_nonzero() == 0
    assert (spectrogram.grad[context] != 0).float().mean() > 0.99


@pytest.mark.parametrize("domain", DOMAINS)
def test_targets_are_the_target_encoders_view_of_each_clip(domain):
    """Audio: of its target patches alone. Latent: of all patches, the targets picked out."""
    jepa, masks, spectrogram = build(domain, normalize_targets=False), draw("multi-block"), batch()
    ours = jepa.targets(spectrogram, masks)
    for clip in range(6):
        index = masks.clip(clip).target_index
        one = spectrogram[clip, None]
        if domain == "audio":
            alone = jepa.target_encoder(one, index)[0]
        else:
            alone = jepa.target_encoder(one)[0, index[0]]
        assert_close(ours[clip, : index.shape[1]], alone)


@all_domains
@all_strategies
def test_targets_are_normalised_per_patch(domain, strategy):
    masks, spectrogram = draw(strategy), batch()
    ours = build(domain).targets(spectrogram, masks)
    raw = build(domain, normalize_targets=False).targets(spectrogram, masks).double().numpy()
    assert ours.dtype == torch.float32
    deviation = np.sqrt(raw.var(-1, keepdims=True) + 1e-6)  # no affine, eps 1e-6: released code
    expected = (raw - raw.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)
    valid = np.ones(raw.shape[:2], bool) if masks.target_valid is None else masks.target_valid
    np.testing.assert_allclose(ours.numpy()[valid].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(ours.numpy()[valid].var(-1), 1, rtol=1e-3)


def test_the_output_holds_what_the_loss_saw():
    jepa, masks = build(), draw("multi-block")
    output = jepa(batch(), masks)
    assert torch.equal(
        output.loss, jepa.loss(output.predictions, output.targets, masks.target_valid)
    )
    assert output.target_valid is masks.target_valid
    assert torch.equal(output.targets, jepa.targets(batch(), masks))


# --- a clip is on its own ---------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["multi-block", "time"])
def test_the_block_strategies_make_ragged_batches(strategy):
    masks = draw(strategy)
    assert masks.context_valid is not None and masks.target_valid is not None


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@all_domains
@all_strategies
def test_a_batch_gives_the_mean_of_the_losses_and_gradients_of_its_clips_alone(
    strategy, domain, loss
):
    jepa, masks, spectrogram = build(domain, loss=loss), draw(strategy), batch()
    together = jepa(spectrogram, masks).loss
    alone = torch.stack([jepa(spectrogram[clip, None], masks.clip(clip)).loss for clip in range(6)])
    assert_close(together.detach(), alone.mean().detach())
    ours, theirs = gradients(jepa, together), gradients(jepa, alone.mean())
    for name in ours:
        assert_close(ours[name], theirs[name])


@all_domains
@all_strategies
def test_predictions_and_targets_do_not_depend_on_batch_mates(domain, strategy):
    jepa, masks, spectrogram = build(domain), draw(strategy), batch()
    output = jepa(spectrogram, masks)
    for clip in range(6):
        alone = jepa(spectrogram[clip, None], masks.clip(clip))
        count = alone.predictions.shape[1]
        assert_close(output.predictions[clip, :count], alone.predictions[0])
        assert_close(output.targets[clip, :count], alone.targets[0])


@all_strategies
def test_the_order_of_the_clips_does_not_matter(strategy):
    jepa, masks, spectrogram = build(), draw(strategy), batch()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    parts = (masks.context_index, masks.target_index, masks.context_valid, masks.target_valid)
    shuffled = type(masks)(*(None if part is None else part[order] for part in parts))
    ours, theirs = jepa(spectrogram[order], shuffled), jepa(spectrogram, masks)
    assert_close(ours.loss.detach(), theirs.loss.detach())
    assert_close(ours.predictions.detach(), theirs.predictions.detach()[order])


# --- precision and the table ------------------------------------------------------------------


@all_domains
@all_strategies
def test_the_loss_under_bfloat16_autocast_is_near_the_float32_loss(domain, strategy):
    """Targets and predictions are each off by some roundings of 2 ** -8, in both directions, and
    the loss averages them over thousands of values: 1 % leaves room for all of them to agree.
    """
    jepa, masks, spectrogram = build(domain), draw(strategy), batch()
    full = jepa(spectrogram, masks).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = jepa(spectrogram, masks).loss
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.01)
    assert half.item() != full.item()  # autocast was on
    ours, theirs = gradients(jepa, half), gradients(jepa, full)
    for name in ours:
        assert ours[name].dtype == torch.float32
        # ten roundings in a row, of the Euclidean norm
        assert (ours[name] - theirs[name]).norm() < 10 * 2.0**-8 * theirs[name].norm(), name


@pytest.mark.parametrize(("strategy", "domain", "frames"), TABLE_ROWS)
def test_the_nine_rows_of_tables_2_and_3_train(strategy, domain, frames):
    grid = PatchGrid(frames=frames)
    jepa = build(domain, grid=grid, moved=False)
    masks, spectrogram = draw(strategy, clips=2, grid=grid), batch(2, frames)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        output = jepa(spectrogram, masks)
        output.loss.backward()
        grads = {name: p.grad for name, p in jepa.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        assert all(grad.count_nonzero() > 0 for grad in grads.values())
        optimizer.step()
        optimizer.zero_grad()
        jepa.update_target(0.99)
        losses.append(output.loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "grid", [PatchGrid(64, 16, 4), PatchGrid(208, 80, 2)], ids=["16x4", "80x2"]
)
@all_strategies
def test_finer_patches_train_too(grid, strategy):
    jepa = build(grid=grid)
    loss = jepa(batch(4, grid.frames), draw(strategy, clips=4, grid=grid)).loss
    assert all(g.isfinite().all() for g in gradients(jepa, loss).values())


@pytest.mark.parametrize("wrong", ["Audio", "", "both", None])
def test_an_unknown_target_domain_is_refused_with_the_two_there_are(wrong):
    with pytest.raises(ValueError, match="choose one of audio, latent"):
        build(wrong)


def test_a_spectrogram_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected \(2, 80, 208\)"):
        build()(torch.zeros(2, 80, 192), UnstructuredMasking(GRID)(2))


# --- targets of all layers ---------------------------------------------------------------------


@all_domains
@all_strategies
def test_targets_of_all_layers_are_the_mean_of_each_normalised(domain, strategy):
    """Clip by clip, layer by layer, in numpy; EAT and data2vec average what leaves each block."""
    jepa, masks, spectrogram = build(domain, target_layers="all"), draw(strategy), batch()
    targets = jepa.targets(spectrogram, masks)
    for row in range(len(masks)):
        own = masks.clip(row)
        visible = own.target_index if domain == "audio" else None
        layers = jepa.target_encoder(spectrogram[row, None], visible, all_layers=True)[1:, 0]
        layers = layers if domain == "audio" else layers[:, own.target_index[0]]
        layers = layers.detach().double().numpy()
        normal = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in layers]
        mean = np.mean(normal, 0)
        expected = (mean - mean.mean(1, keepdims=True)) / mean.std(1, keepdims=True)
        ours = targets[row, : expected.shape[0]]
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert len(layers) == 2


def test_one_layer_is_the_same_by_either_name():
    torch.manual_seed(0)
    encoder = Encoder(GRID, dim=48, depth=1, num_heads=3)
    predictor = Predictor(GRID, encoder_dim=48, dim=32, depth=1, num_heads=4)
    one, all_of_one = (
        JEPA(encoder, predictor, SmoothL1(), "latent", target_layers=name)
        for name in ("last", "all")
    )
    masks = draw("unstructured")
    assert_close(all_of_one.targets(batch(), masks), one.targets(batch(), masks))


def test_unknown_target_layers_are_an_error():
    with pytest.raises(ValueError, match="target_layers='first': choose one of last, all"):
        build(target_layers="first")


# --- many masks for one pass of the target encoder ---------------------------------------------


@all_strategies
def test_many_masks_per_clip_are_as_many_batches_of_one(strategy):
    """Loss and gradients are the mean of those of each mask alone; ragged rows included."""
    jepa, spectrogram = build("latent"), batch()
    masks = draw(strategy, clips=18)
    output = jepa(spectrogram, masks)
    singles = []
    for number in range(3):
        rows = torch.arange(number, 18, 3)
        parts = {
            name: value[rows]
            for name, value in vars(masks).items()
            if isinstance(value, torch.Tensor)
        }
        singles.append(jepa(spectrogram, PatchMasks(**parts)))
        assert_close(output.targets[rows], singles[-1].targets)
    mean = sum(single.loss for single in singles) / 3
    assert_close(output.loss, mean)
    ours, theirs = gradients(jepa, output.loss), gradients(jepa, mean)
    for name in ours:
        assert_close(ours[name], theirs[name], relative=1e-4)


def test_the_target_encoder_sees_a_clip_once_for_all_its_masks():
    jepa, seen = build("latent", target_layers="all"), []
    jepa.target_encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    jepa(batch(), draw("unstructured", clips=24))
    assert seen == [6]


def test_masks_that_cannot_share_a_pass_are_an_error():
    with pytest.raises(ValueError, match=r"4 masks per clip .* use target_masking=latent"):
        build("audio")(batch(), draw("unstructured", clips=24))
    for rows in (3, 9):
        with pytest.raises(ValueError, match=f"masks for {rows} clips"):
            build("latent")(batch(), draw("unstructured", clips=rows))


# --- cheaper predictors -------------------------------------------------------------------------


def with_cross_attention(jepa):
    jepa.predictor.cross_attention = True  # the parameters are the same
    return jepa


def predict_slowly(predictor, context, context_index, target_index):
    """One clip, target by target: full attention over the context and that target alone, where
    the context's tokens are put back after each layer and the target does not see itself."""
    positions = predictor.positions
    context = predictor.proj_in(context) + positions[context_index]
    out = []
    for place in target_index:
        x = predictor.mask_token + positions[place]
        for block in predictor.blocks:
            heads, dim = block.attn.num_heads, len(x)
            q = block.attn.qkv(block.norm1(x))[:dim].view(heads, -1)
            _, k, v = (
                block.attn.qkv(block.norm1(context)).view(len(context), 3, heads, -1).unbind(1)
            )
            weights = (torch.einsum("hd,nhd->hn", q, k) / q.shape[-1] ** 0.5).softmax(-1)
            x = x + block.attn.proj(torch.einsum("hn,nhd->hd", weights, v).flatten())
            x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        out.append(predictor.proj_out(predictor.norm(x)))
    return torch.stack(out)


@all_strategies
def test_cross_attention_is_each_target_on_its_own_over_the_context(strategy):
    jepa, masks, spectrogram = with_cross_attention(build()), draw(strategy), batch()
    predictions = jepa(spectrogram, masks).predictions
    for row in range(0, len(masks), 2):
        own = masks.clip(row)
        context = jepa.context_encoder(spectrogram[row, None], own.context_index)
        expected = predict_slowly(
            jepa.predictor, context[0], own.context_index[0], own.target_index[0]
        )
        assert_close(predictions[row, : len(expected)], expected, relative=1e-4)


def test_cross_attention_in_bfloat16_is_near_float32():
    """The batched matrix products that stand for sdpa on a CPU, ragged rows included."""
    jepa, masks = with_cross_attention(build()), draw("multi-block")
    exact = jepa(batch(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        half = jepa(batch(), masks)
    valid = masks.target_valid
    assert_close(half.predictions[valid].float(), exact.predictions[valid], relative=0.05)
    ours, theirs = gradients(jepa, half.loss), gradients(jepa, exact.loss)
    name = "predictor.blocks.0.attn.qkv.weight"
    assert_close(ours[name], theirs[name], relative=0.1)


@all_domains
@all_strategies
def test_a_share_of_the_targets_are_those_of_all_of_them(domain, strategy):
    """With cross-attention a prediction does not depend on the others, so each must be the same."""
    jepa, masks = with_cross_attention(build(domain)), draw(strategy)
    some = masks.predicting(0.4, torch.Generator().manual_seed(3))
    every, part = jepa(batch(), masks), jepa(batch(), some)
    losses = []
    for row in range(len(masks)):
        own = masks.clip(row).target_index.shape[1]
        kept = some.predicted[row]
        kept = kept if some.predicted_valid is None else kept[some.predicted_valid[row]]
        assert len(kept) == round(0.4 * own + 1e-9) and kept.max() < own
        assert (kept.diff() > 0).all()
        assert torch.equal(some.predicted_index[row, : len(kept)], masks.target_index[row, kept])
        assert_close(part.predictions[row, : len(kept)], every.predictions[row, kept])
        assert_close(part.targets[row, : len(kept)], every.targets[row, kept])
        pair = (part.predictions[row, None, : len(kept)], part.targets[row, None, : len(kept)])
        losses.append(jepa.loss(*pair))
    assert_close(part.loss, torch.stack(losses).mean())


def test_every_target_is_predicted_as_often_as_any_other():
    masks = draw("multi-block", clips=3000)
    some = masks.predicting(0.25, torch.Generator().manual_seed(0))
    chosen = torch.zeros(masks.target_index.shape).scatter_add_(
        1, some.predicted, some.predicted_valid.float()
    )
    early, late = chosen[:, :5].mean(), chosen[masks.target_valid].mean()
    assert abs(early - late) < 0.02


def test_a_share_that_cannot_be_is_an_error():
    for share in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"predicted_share=.*above 0 and at most 1"):
            draw("unstructured").predicting(share)


# --- several durations --------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
@all_domains
def test_a_shorter_crop_is_as_with_a_grid_of_its_own(domain, cross):
    """Same weights in a JEPA that was built for 64 frames."""
    jepa, short = build(domain), PatchGrid(frames=64)
    own = build(domain, grid=short)
    own.load_state_dict(jepa.state_dict())
    own.predictor.cross_attention = jepa.predictor.cross_attention = cross
    masks = for_grid(MultiBlockMasking(GRID, num_targets=2), short)(6)
    theirs = own(batch(frames=64), masks)
    ours = jepa(batch(frames=64), replace(masks, frames=64))
    # the grid's positions are those of the shorter one, to float32's rounding of sine and cosine
    assert_close(ours.targets, theirs.targets)
    assert_close(ours.predictions, theirs.predictions)
    assert_close(ours.loss, theirs.loss)


def test_a_crop_that_the_masks_are_not_for_is_an_error():
    masks = UnstructuredMasking(PatchGrid(frames=64))(6)
    for frames, meant in ((208, 64), (64, None), (48, 64)):
        with pytest.raises(ValueError, match=r"expected \(6, 80, (64|208)\)"):
            build()(batch(frames=frames), replace(masks, frames=meant))
    with pytest.raises(ValueError, match="cut longer audio"):
        build()(batch(frames=224), replace(masks, frames=224))
