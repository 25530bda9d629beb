"""The options of the recipe's yaml: each run goes on bit for bit, and is one on two ranks."""

import csv
from dataclasses import replace

import pytest
import torch
from option_runs import CLIPS, OPTIONS, STEPS, make_brain, split
from written_out import recipe_hparams, run_two_ranks

NAMES = ("step", "epoch", "train_loss", "train_learning_rate", "train_gradient_norm")
OFF = {
    **{"target_masking": "audio", "target_layers": "last", "regularizer": None},
    **{"masks_per_clip": 1, "predicted_share": None, "predictor_cross_attention": False},
    **{"mixed_frames": None, "mix_background": None, "random_gain_db": None, "muon": False},
}


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [[row[name] for name in NAMES] for row in csv.DictReader(file) if row["train_loss"]]


@pytest.mark.parametrize("recipe", ["jepa_unstructured", "jepa_multiblock", "jepa_time"])
def test_the_papers_recipes_have_all_options_off(recipe, tmp_path):
    hparams = recipe_hparams(recipe, tmp_path)
    assert {name: hparams[name] for name in OFF} == OFF


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_killed_between_two_steps_continues_bit_for_bit(name, audio_folder, tmp_path):
    finished = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        split(folder, audio_folder)
        options = dict(ckpt_interval_steps=1, ckpt_interval_minutes=0)
        brain, loaders = make_brain(folder, audio_folder, OPTIONS[name], **options)
        if folder.name == "killed":
            brain.dies_before = STEPS // 2
            with pytest.raises(KeyboardInterrupt):
                brain.fit(brain.counter, *loaders)
            brain, loaders = make_brain(folder, audio_folder, OPTIONS[name], **options)
            with torch.no_grad():
                for parameter in brain.jepa.parameters():
                    parameter.fill_(0.1)
        brain.fit(brain.counter, *loaders)
        finished.append(brain.jepa.state_dict())
    whole, resumed = finished
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    assert len(rows(tmp_path / "whole")) == STEPS
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


@pytest.fixture(scope="module")
def two_ranks(audio_folder, tmp_path_factory):
    """By option: the first weights, the last of both ranks, and what their JEPAs were given."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in OPTIONS:
        split(folder / name, audio_folder)
    run_two_ranks("option_runs.py", folder, audio_folder, timeout=600)
    files = {name: [folder / name / f"rank{rank}.pt" for rank in (0, 1)] for name in OPTIONS}
    return {
        name: [torch.load(file, weights_only=False) for file in pair]
        for name, pair in files.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_are_one_process_on_the_joined_batch(name, two_ranks, audio_folder, tmp_path):
    (start, first, given), (_, second, others) = two_ranks[name]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(given) == len(others) == STEPS
    split(tmp_path, audio_folder)
    options = {**OPTIONS[name], "batch_size": 2 * OPTIONS[name].get("batch_size", CLIPS)}
    brain, (train, _) = make_brain(tmp_path, audio_folder, options)
    brain.jepa.load_state_dict(start)
    batches = iter([joined(*pair) for pair in zip(given, others, strict=True)])
    brain.compute_forward = lambda batch, stage: brain.modules.jepa(*next(batches))
    brain.total_steps, brain.train_set = STEPS, train
    brain.init_optimizers()
    brain.modules.train()
    brain.epoch = 1
    brain.interval.restart()
    for _ in range(STEPS):
        brain.step += 1
        brain.fit_batch([None] * 2 * CLIPS)
    # Muon iterates in bfloat16, which makes more of what float32 rounds
    tolerance, moved = 2e-4 if name == "muon" else 3e-6, 0.0
    for key, value in brain.jepa.state_dict().items():
        if not key.startswith("target_rest"):
            assert (first[key] - value).abs().max() <= tolerance, key
            moved = max(moved, (first[key] - start[key]).abs().max().item())
    assert moved > 5 * tolerance


def joined(ours, theirs):
    """Spectrograms and masks of the two ranks as those of one batch."""
    (spectrogram, masks), (other, more) = ours, theirs
    pairs = {name: (value, getattr(more, name)) for name, value in vars(masks).items()}
    parts = {name: torch.cat(pair) for name, pair in pairs.items() if torch.is_tensor(pair[0])}
    return torch.cat([spectrogram, other]), replace(masks, **parts)
