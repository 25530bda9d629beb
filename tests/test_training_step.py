"""Optimiser steps of one process against the same steps written out by hand (written_out.py)."""

import csv
import itertools

import pytest
import torch
from written_out import (
    BASE_RATE,
    CLIPS,
    CROP_FRAMES,
    EMA_RATES,
    RATE_SHARES,
    STEPS,
    DiaryBrain,
    assert_same_weights,
    in_steps,
    joined,
    make_brain,
    recipe_hparams,
    written_out,
)

from speechbrain_jepa.data import CropDataset, CropSampler, crop_loader, scan_folder
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

# 24 files make 8 batches an epoch: two steps of 3 batches, and 2 batches left over
EPOCHS, ACCUMULATED, BATCHES = 2, 3, 8
LIMIT = 1.0  # of the gradient norm: the first steps are above, the last below


@pytest.fixture(scope="module")
def make_loaders(audio_folder, tmp_path_factory):
    manifest, _ = scan_folder(audio_folder, tmp_path_factory.mktemp("scan"), progress=False)

    def make():
        dataset = CropDataset(manifest, audio_folder, CROP_FRAMES)
        train = crop_loader(dataset, CropSampler(len(dataset), CLIPS))
        return train, crop_loader(dataset, CropSampler(len(dataset), CLIPS, shuffle=False))

    return make


def accumulating(folder, **options):
    options = {"grad_accumulation_factor": ACCUMULATED, "max_grad_norm": LIMIT, **options}
    return make_brain(folder, EPOCHS, **options)


def rows(folder):
    """What metrics.csv says of each optimiser step."""
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train_gradient_norm"]]


def column(folder, name):
    return [float(row[f"train_{name}"]) for row in rows(folder)]


@pytest.fixture(scope="module")
def plain(make_loaders, tmp_path_factory):
    """A run of four accumulated steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("plain")
    brain = accumulating(folder)
    brain.fit(brain.counter, *make_loaders())
    steps = in_steps(joined([brain.diary]), ACCUMULATED, BATCHES)
    weights, norms = written_out(brain.start, steps, LIMIT)
    return brain, folder, weights, norms


def test_accumulated_steps_equal_the_same_steps_written_out(plain):
    """Mean gradient of the batches, joint clipping, AdamW, decay of matrices, one EMA update."""
    brain, _, weights, norms = plain
    assert min(norms) < 0.9 * LIMIT and max(norms) > 1.1 * LIMIT
    assert_same_weights(brain.diary.weights, weights)


def test_the_logged_gradient_norm_is_that_of_the_mean_gradient_before_clipping(plain):
    _, folder, _, norms = plain
    assert column(folder, "gradient_norm") == pytest.approx(norms, rel=1e-4)


def test_rates_follow_the_optimiser_steps_and_the_global_batch(plain):
    brain, folder, _, _ = plain
    assert brain.total_steps == STEPS
    peak = BASE_RATE * ACCUMULATED * CLIPS / 256
    rates = [peak * share for share in RATE_SHARES]
    assert brain.diary.rates == pytest.approx(rates)
    assert column(folder, "learning_rate") == pytest.approx(rates)
    assert column(folder, "ema_rate") == pytest.approx(EMA_RATES)


def test_a_skipped_step_moves_neither_weights_nor_target_nor_moments(make_loaders, tmp_path):
    """One batch of a step is enough, the first or the last; the batches left over take no step."""
    # steps 1 and 4 (batches 0-2 and 11-13), and a batch left over of the first epoch
    brain = accumulating(tmp_path, broken={0: float("nan"), 7: float("nan"), 13: float("inf")})
    brain.fit(brain.counter, *make_loaders())
    steps = in_steps(joined([brain.diary]), ACCUMULATED, BATCHES)
    weights, _ = written_out(brain.start, steps, LIMIT, skipped={0, 3})
    assert_same_weights(brain.diary.weights, weights)
    assert brain.diary.skipped == [1, 1, 1, 2]
    assert brain.nonfinite_streak == 1  # the good steps between them began it anew
    assert column(tmp_path, "nonfinite_steps") == [1, 1, 1, 2]


def test_masks_are_drawn_anew_for_every_batch_and_epoch(plain):
    brain, *_ = plain
    targets = [masks.target_index for masks in brain.diary.masks]
    assert len(targets) == EPOCHS * BATCHES
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(targets, 2))


def test_validation_masks_are_the_same_every_time(plain):
    brain, *_ = plain
    targets = [masks.target_index for masks in brain.diary.valid_masks]
    times = [targets[start : start + BATCHES] for start in range(0, len(targets), BATCHES)]
    assert len(times) == 1 + EPOCHS
    for batches in zip(*times):
        assert all(torch.equal(batches[0], batch) for batch in batches[1:])


def test_every_epoch_reads_every_file_in_another_order(plain):
    brain, *_ = plain
    items = torch.cat(brain.diary.items).view(EPOCHS, BATCHES * CLIPS)
    assert not torch.equal(*items)
    for epoch in items:
        assert epoch.sort().values.tolist() == list(range(BATCHES * CLIPS))


# --- checkpoints within an epoch ----------------------------------------------------------------


def test_checkpoints_lie_between_optimiser_steps(make_loaders, tmp_path, monkeypatch):
    saved = []
    brain = accumulating(tmp_path, checkpoints=True, ckpt_interval_steps=1, ckpt_interval_minutes=0)
    save = brain._save_intra_epoch_ckpt

    def saves():
        saved.append((brain.epoch, brain.step, brain.optimizer_step))
        save()

    monkeypatch.setattr(brain, "_save_intra_epoch_ckpt", saves)
    brain.fit(brain.counter, *make_loaders())
    assert saved == [(1, 3, 1), (1, 6, 2), (2, 3, 3), (2, 6, 4)]


class Killed(DiaryBrain):
    """Dies before the fifth batch of the second epoch: one batch after its first step."""

    def on_fit_batch_start(self, batch, should_step):
        if (self.epoch, self.step) == (2, ACCUMULATED + 2):
            raise KeyboardInterrupt
        super().on_fit_batch_start(batch, should_step)


def test_a_run_killed_within_an_accumulation_continues_bit_for_bit(plain, make_loaders, tmp_path):
    whole, whole_folder, *_ = plain
    options = dict(checkpoints=True, ckpt_interval_steps=1, ckpt_interval_minutes=0)
    brain = accumulating(tmp_path, kind=Killed, **options)
    with pytest.raises(KeyboardInterrupt):
        brain.fit(brain.counter, *make_loaders())
    assert len(brain.diary.items) == BATCHES + ACCUMULATED + 1

    resumed = accumulating(tmp_path, model_seed=1, **options)
    resumed.fit(resumed.counter, *make_loaders())
    read = [items.tolist() for items in resumed.diary.items]
    expected = [items.tolist() for items in whole.diary.items[BATCHES + ACCUMULATED :]]
    assert read == expected
    for name, value in whole.jepa.state_dict().items():
        assert torch.equal(value, resumed.jepa.state_dict()[name]), name
    names = ("step", "epoch", "train_loss", "train_learning_rate", "train_ema_rate")
    names += ("train_gradient_norm", "train_nonfinite_steps")
    ours, theirs = (
        [[row[name] for name in names] for row in rows(folder)]
        for folder in (tmp_path, whole_folder)
    )
    assert ours == theirs


# --- the optimiser's groups ---------------------------------------------------------------------

BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MATRICES = {
    "context_encoder.patch_embed.weight",
    *(f"context_encoder.blocks.0.{layer}.weight" for layer in BLOCK),
    "predictor.proj_in.weight",
    *(f"predictor.blocks.0.{layer}.weight" for layer in BLOCK),
    "predictor.proj_out.weight",
}
VECTORS = {
    "context_encoder.patch_embed.bias",
    *(f"context_encoder.blocks.0.{layer}.bias" for layer in BLOCK),
    *(f"context_encoder.blocks.0.{norm}.{part}" for norm in ("norm1", "norm2")
      for part in ("weight", "bias")),
    "context_encoder.norm.weight",
    "context_encoder.norm.bias",
    "predictor.mask_token",
    "predictor.proj_in.bias",
    *(f"predictor.blocks.0.{layer}.bias" for layer in BLOCK),
    *(f"predictor.blocks.0.{norm}.{part}" for norm in ("norm1", "norm2")
      for part in ("weight", "bias")),
    "predictor.norm.weight",
    "predictor.norm.bias",
    "predictor.proj_out.bias",
}  # fmt: skip


def decays(brain):
    """The weight decay of each parameter that the optimiser steps, by name."""
    brain.init_optimizers()
    names = {parameter: name for name, parameter in brain.jepa.named_parameters()}
    pairs = [
        (names[parameter], group["weight_decay"])
        for group in brain.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(dict(pairs)), "a parameter in two groups"
    return dict(pairs)


@pytest.mark.parametrize(
    "recipe", ["jepa_unstructured", "jepa_multiblock", "jepa_time", "quickstart"]
)
def test_recipes_decay_matrices_alone_and_never_step_the_target_encoder(recipe, tmp_path):
    hparams = recipe_hparams(recipe, tmp_path)
    brain = DiaryBrain(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"})
    expected = dict.fromkeys(MATRICES, hparams["weight_decay"]) | dict.fromkeys(VECTORS, 0.0)
    assert hparams["weight_decay"] > 0
    assert decays(brain) == expected


def test_a_class_token_is_not_decayed(tmp_path):
    hparams = recipe_hparams("jepa_unstructured", tmp_path)
    grid = PatchGrid(frames=CROP_FRAMES)
    hparams["modules"]["jepa"] = JEPA(
        Encoder(grid, dim=24, depth=1, num_heads=1, class_token=True),
        Predictor(grid, encoder_dim=24, dim=24, depth=1, num_heads=1),
        SmoothL1(),
    )
    brain = DiaryBrain(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"})
    expected = dict.fromkeys(MATRICES, hparams["weight_decay"]) | dict.fromkeys(VECTORS, 0.0)
    assert decays(brain) == {**expected, "context_encoder.class_token": 0.0}
