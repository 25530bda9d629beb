"""Two processes that train together, against one on the joined batches written out by hand."""

import csv
import itertools
import shutil

import numpy as np
import pytest
import torch
from one_rank import ACCUMULATED, EPOCHS, LIMIT, RUNS
from written_out import (
    BASE_RATE,
    CLIPS,
    CROP_FRAMES,
    RATE_SHARES,
    REPOSITORY,
    assert_same_weights,
    in_steps,
    joined,
    make_brain,
    recipe_hparams,
    run_two_ranks,
    written_out,
)

from speechbrain_jepa.data import scan_folder
from speechbrain_jepa.monitors import MetricsTable
from speechbrain_jepa.validation import KeptBatches

BATCHES = 4  # an epoch, of each process: 24 files, 3 clips
VALID_CLIPS = 8


@pytest.fixture(scope="module")
def together(audio_folder, tmp_path_factory):
    """Folder of both runs, and for each its first weights and the diaries of both ranks."""
    folder = tmp_path_factory.mktemp("together")
    manifest, _ = scan_folder(audio_folder, folder / "scan", progress=False)
    for run, part in itertools.product(RUNS, ("train", "valid")):
        items = np.arange(VALID_CLIPS if part == "valid" else len(manifest))
        manifest.subset(items).save(folder / run / "split" / part)
    run_two_ranks("one_rank.py", folder, audio_folder, timeout=240)
    runs = {}
    for name in RUNS:
        files = [folder / name / f"rank{rank}.pt" for rank in (0, 1)]
        starts, diaries = zip(*(torch.load(file, weights_only=False) for file in files))
        runs[name] = starts[0], diaries
    return folder, runs


def steps_of(diaries):
    return in_steps(joined(diaries), ACCUMULATED, BATCHES)


def test_two_ranks_take_the_steps_of_one_process_on_the_joined_batch(together):
    """With what each rank really read and drew."""
    _, runs = together
    start, diaries = runs["plain"]
    weights, norms = written_out(start, steps_of(diaries), LIMIT)
    assert min(norms) < 0.9 * LIMIT and max(norms) > 1.1 * LIMIT
    assert_same_weights(diaries[0].weights, weights)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_hold_the_same_weights_to_the_bit(together, name):
    _, runs = together
    _, (first, second) = runs[name]
    assert len(first.weights) == len(second.weights) == 4
    for ours, theirs in zip(first.weights, second.weights):
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours)


def test_the_learning_rate_counts_the_clips_of_all_ranks(together):
    _, runs = together
    _, diaries = runs["plain"]
    peak = BASE_RATE * 2 * ACCUMULATED * CLIPS / 256
    for diary in diaries:
        assert diary.rates == pytest.approx([peak * share for share in RATE_SHARES])


def test_a_loss_that_is_not_finite_on_one_rank_makes_all_skip_the_step(together):
    """Weights, target and moments stay; every rank counts; the steps around it are as ever."""
    folder, runs = together
    start, diaries = runs["broken"]
    weights, _ = written_out(start, steps_of(diaries), LIMIT, skipped={0, 3})
    assert_same_weights(diaries[0].weights, weights)
    assert [diary.skipped for diary in diaries] == [[1, 1, 1, 2]] * 2
    with open(folder / "broken" / "metrics.csv", newline="") as file:
        counts = [row["train_nonfinite_steps"] for row in csv.DictReader(file)]
    assert [count for count in counts if count] == list("1112")


def test_gradients_are_averaged_once_a_step(together):
    _, runs = together
    for diary in runs["plain"][1]:
        assert diary.synchronised == [False, True] * (EPOCHS * BATCHES // ACCUMULATED)


def test_ranks_draw_masks_of_their_own(together):
    _, runs = together
    first, second = ([masks.target_index for masks in diary.masks] for diary in runs["plain"][1])
    assert len(first) == len(second) == EPOCHS * BATCHES
    assert not any(torch.equal(ours, theirs) for ours in first for theirs in second)


def test_ranks_share_the_validation_and_log_what_one_process_measures(
    together, audio_folder, tmp_path, monkeypatch
):
    """Three batches: rank 0 has the first and the last. Masks go with the batch."""
    folder, runs = together
    _, diaries = runs["plain"]
    start, _ = torch.load(folder / "plain" / "rank0.pt", weights_only=False)  # not trained here yet
    masks = [diary.valid_masks for diary in diaries]
    times = 1 + EPOCHS
    assert [len(rank) for rank in masks] == [2 * times, times]

    monkeypatch.syspath_prepend(REPOSITORY)
    from train import make_loaders

    shutil.copytree(folder / "plain" / "split", tmp_path / "split")
    options = dict(batch_size=CLIPS, crop_frames=CROP_FRAMES, num_workers=0)
    options["data_folder"] = str(audio_folder)
    _, loader = make_loaders(recipe_hparams("jepa_unstructured", tmp_path, **options))
    alone = make_brain(tmp_path, EPOCHS)
    alone.jepa.load_state_dict(start.state_dict())
    alone.valid_batches, alone.valid_clips = KeptBatches(loader), VALID_CLIPS
    alone._validate(epoch=0)
    together_masks = (masks[0][0], masks[1][0], masks[0][1])
    for ours, theirs in zip(alone.diary.valid_masks, together_masks, strict=True):
        assert torch.equal(ours.target_index, theirs.target_index)
    (expected,) = alone.metrics.read()
    logged = MetricsTable(folder / "plain" / "metrics.csv", ["step"]).read()[0]
    names = [name for name, value in expected.items() if name.startswith("valid_") and value]
    assert len(names) == 4
    for name in names:
        assert float(logged[name]) == pytest.approx(float(expected[name]), rel=1e-4), name


def test_crops_of_the_ranks_are_disjoint_and_cover_the_epoch(together):
    """Through the recipe's own loaders."""
    _, runs = together
    ranks = [torch.cat(diary.items).view(EPOCHS, -1) for diary in runs["plain"][1]]
    for first, second in zip(*ranks):
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(24))
