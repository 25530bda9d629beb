"""What is drawn is what the masks say, and the files are pictures."""

import csv

import matplotlib.image
import numpy as np
import pytest
import torch

from speechbrain_jepa.evaluation.pictures import curve, draw_curves, draw_masks, visible_patches
from speechbrain_jepa.masking import MultiBlockMasking, TimeMasking, UnstructuredMasking
from speechbrain_jepa.vit import PatchGrid


@pytest.mark.parametrize("patch_shape", [(16, 16), (16, 4), (80, 2)])
def test_visible_bins_are_those_that_the_encoder_embeds(patch_shape):
    grid = PatchGrid(208, *patch_shape)
    spectrogram = torch.arange(80.0 * 208).reshape(1, 80, 208)
    index = torch.randperm(grid.num_patches)[: grid.num_patches // 2]
    embedded = grid.patches(spectrogram)[0, index]
    visible = visible_patches(index, 80, 208, patch_shape)
    assert set(spectrogram[0][torch.from_numpy(visible)].tolist()) == set(embedded.ravel().tolist())


def test_patch_zero_holds_the_lowest_bands_and_first_frames():
    visible = visible_patches([0], 80, 208, (16, 16))
    assert visible[:16, :16].all() and visible.sum() == 256


def test_frames_beyond_the_last_whole_patch_are_in_no_patch():
    visible = visible_patches(range(65), 80, 220, (16, 16))
    assert visible[:, :208].all() and not visible[:, 208:].any()


@pytest.mark.parametrize("strategy", [UnstructuredMasking, MultiBlockMasking, TimeMasking])
def test_context_and_target_never_show_the_same_bin(strategy):
    masks = strategy(PatchGrid())(1, generator=torch.Generator().manual_seed(0))
    context = visible_patches(masks.context_index[0], 80, 208, (16, 16))
    target = visible_patches(masks.target_index[0], 80, 208, (16, 16))
    assert context.any() and target.any() and not (context & target).any()


@pytest.mark.parametrize("index", [[-1], [65]])
def test_a_number_that_is_no_patch_is_an_error(index):
    with pytest.raises(ValueError, match="numbered 0 to 64"):
        visible_patches(index, 80, 208, (16, 16))


def test_patches_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        visible_patches([0], 80, 208, (15, 16))


def test_no_masks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="masks is empty"):
        draw_masks(np.zeros((80, 208)), {}, (16, 16), tmp_path / "masks.png")


def test_masks_picture_has_low_frequencies_at_the_bottom(tmp_path):
    spectrogram = np.zeros((80, 208), np.float32)
    spectrogram[:16] = 10.0  # bright in the lowest patches only
    patches = range(65)
    path = draw_masks(spectrogram, {"all": (patches, patches)}, (16, 16), tmp_path / "a" / "m.png")
    image = read_picture(path)
    height = len(image)
    whole = image[: height // 3, image.shape[1] // 3 : image.shape[1] // 2].mean((1, 2))
    inside = whole[whole < 0.95]  # not the white margin
    assert inside[-len(inside) // 6 :].mean() > inside[: len(inside) // 2].mean() + 0.3


def test_masks_picture_grows_by_a_column_for_each_strategy(tmp_path):
    spectrogram = torch.randn(80, 208)
    pair = (torch.arange(26), torch.arange(26, 65))
    one = read_picture(draw_masks(spectrogram, {"a": pair}, (16, 16), tmp_path / "1.png"))
    masks = {name: pair for name in "abc"}
    three = read_picture(draw_masks(spectrogram, masks, (16, 16), tmp_path / "3.png"))
    assert three.shape[1] > 1.8 * one.shape[1]
    assert three.shape[0] == one.shape[0]


def history():
    """As a run's metrics.csv: train and validation rows alternate and leave each other empty."""
    for step in range(100, 1100, 100):
        yield {
            "step": step,
            "train_loss": 1 / step,
            "train_learning_rate": 1e-3,
            "train_ema_rate": 0.99 + step * 1e-6,
        }
        yield {
            "step": step,
            "valid_loss": 1.1 / step,
            "valid_embedding_rank": 20 + step / 100,
            "valid_embedding_deviation": 0.8,
            "valid_target_deviation": 0.9,
        }


def test_a_curve_keeps_only_the_rows_that_have_its_value():
    steps, values = curve(history(), "valid_loss")
    assert steps.tolist() == list(range(100, 1100, 100))
    np.testing.assert_allclose(values, 1.1 / steps)


def test_curves_from_rows_and_from_their_csv_are_the_same_picture(tmp_path):
    rows = list(history())
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, {name: None for row in rows for name in row})
        writer.writeheader()
        writer.writerows(rows)
    from_rows = read_picture(draw_curves(rows, tmp_path / "rows.png"))
    from_csv = read_picture(draw_curves(tmp_path / "metrics.csv", tmp_path / "csv.png"))
    np.testing.assert_array_equal(from_rows, from_csv)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "train_loss": 0.5}],
        [{"step": 1, "valid_loss": 0.5, "train_ema_rate": 1.0}],
        [{"step": 1, "train_loss": float("nan")}, {"step": 2, "train_loss": 0.5}],
    ],
    ids=["one report", "EMA rate of 1", "a loss that is not a number"],
)
def test_curves_of_a_run_stopped_early_are_drawn(rows, tmp_path):
    read_picture(draw_curves(rows, tmp_path / "curves.png"))


def test_a_history_without_a_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no row with a train_loss"):
        draw_curves([{"step": 1, "train_loss": ""}], tmp_path / "curves.png")


def read_picture(path):
    """Pixels of a PNG file of a sensible size, which is neither blank nor huge."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(path)[..., :3]
    assert 300 <= image.shape[0] <= 2000 and 500 <= image.shape[1] <= 3000
    assert path.stat().st_size < 2_000_000 and image.std() > 0.02
    return image
