"""Each loss against its formula in NumPy, value and gradient, ragged and not."""

import numpy as np
import pytest
import torch

from speechbrain_jepa.losses import NormalizedL2, SmoothL1, SmoothL1Norms


def smooth_l1(z: np.ndarray, t: np.ndarray, beta: float = 1.0) -> float:
    """The released code: element by element, mean over the features of one patch."""
    total = 0.0
    for difference in np.abs(z - t):
        total += difference**2 / (2 * beta) if difference < beta else difference - beta / 2
    return total / len(z)


def equation_3(z: np.ndarray, t: np.ndarray) -> float:
    if np.linalg.norm(z - t, 1) < 1:
        return np.linalg.norm(z - t, 2) ** 2 / 2
    return np.linalg.norm(z - t, 1) - 0.5


def unit_l2(z: np.ndarray, t: np.ndarray) -> float:
    return np.linalg.norm(z / np.linalg.norm(z) - t / np.linalg.norm(t)) ** 2


CASES = [
    pytest.param(SmoothL1(), smooth_l1, id="SmoothL1"),
    pytest.param(SmoothL1(beta=0.3), lambda z, t: smooth_l1(z, t, 0.3), id="SmoothL1 beta 0.3"),
    pytest.param(SmoothL1Norms(), equation_3, id="SmoothL1Norms"),
    pytest.param(NormalizedL2(), unit_l2, id="NormalizedL2"),
]


def pair(clips=4, patches=7, dims=12):
    """Predictions and targets in which some patches are near (L1 norm below 1) and some far."""
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(clips, patches, dims, generator=generator)
    spread = torch.logspace(-2, 0.5, patches)[:, None]
    targets = predictions + spread * torch.randn(clips, patches, dims, generator=generator)
    return predictions, targets


def numpy_loss(formula, predictions, targets, valid=None) -> float:
    """The mean over clips of each clip's mean over its own patches, loops and all."""
    of_clips = []
    for clip in range(len(predictions)):
        own = [
            formula(predictions[clip, k].double().numpy(), targets[clip, k].double().numpy())
            for k in range(predictions.shape[1])
            if valid is None or valid[clip, k]
        ]
        of_clips.append(sum(own) / len(own))
    return sum(of_clips) / len(of_clips)


def ragged_validity():
    """1, 3, 7 and 2 patches of 7: the mean over all patches is not the mean of means."""
    return torch.arange(7) < torch.tensor([1, 3, 7, 2])[:, None]


@pytest.mark.parametrize(("loss", "formula"), CASES)
def test_loss_equals_its_formula_in_numpy(loss, formula):
    predictions, targets = pair()
    assert loss(predictions, targets).item() == pytest.approx(
        numpy_loss(formula, predictions, targets), rel=1e-5
    )


@pytest.mark.parametrize(("loss", "formula"), CASES)
def test_ragged_loss_is_the_mean_over_clips_of_their_own_means(loss, formula):
    predictions, targets = pair()
    valid = ragged_validity()
    value = loss(predictions, targets, valid).item()
    assert value == pytest.approx(numpy_loss(formula, predictions, targets, valid), rel=1e-5)
    over_all_patches = loss.distance(predictions, targets)[valid].mean().item()
    assert abs(value - over_all_patches) > 0.05 * value  # the test can tell the two apart


@pytest.mark.parametrize(("loss", "formula"), CASES)
def test_gradient_equals_central_differences_of_the_formula(loss, formula):
    predictions, targets = pair(clips=2, patches=3, dims=4)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    predictions.requires_grad_()
    loss(predictions, targets, valid).backward()
    step = 1e-5
    for place in np.ndindex(*predictions.shape):
        ends = []
        for sign in (1, -1):
            moved = predictions.detach().double()
            moved[place] += sign * step
            ends.append(numpy_loss(formula, moved, targets, valid))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert predictions.grad[place].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", [case.values[0] for case in CASES])
@pytest.mark.parametrize("rubbish", [0.0, 1e30, float("nan")], ids=["zeros", "huge", "nan"])
def test_padding_changes_neither_value_nor_gradient(loss, rubbish):
    predictions, targets = pair()
    valid = ragged_validity()
    clean = predictions.clone().requires_grad_()
    expected = loss(clean, targets, valid)
    expected.backward()
    padded = predictions.masked_fill(~valid[..., None], rubbish).requires_grad_()
    value = loss(padded, targets.masked_fill(~valid[..., None], 0.0), valid)
    value.backward()
    assert value.item() == expected.item()
    assert torch.equal(padded.grad[valid], clean.grad[valid])
    if rubbish == 0.0:  # what the encoder and the predictor give for padding
        assert padded.grad[~valid].count_nonzero() == 0


@pytest.mark.parametrize("loss", [case.values[0] for case in CASES])
def test_a_loss_is_float32_from_half_precision_and_zero_for_equal_vectors(loss):
    predictions, _ = pair()
    value = loss(predictions.bfloat16(), predictions.bfloat16())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [case.values[0] for case in CASES])
def test_all_valid_equals_no_validity(loss):
    predictions, targets = pair()
    everything = torch.ones(predictions.shape[:2], dtype=torch.bool)
    assert loss(predictions, targets, everything).item() == pytest.approx(
        loss(predictions, targets).item(), rel=1e-6
    )


def test_smooth_l1_is_pytorch_smooth_l1_of_all_elements_when_nothing_is_ragged():
    predictions, targets = pair()
    theirs = torch.nn.functional.smooth_l1_loss(predictions, targets, beta=1.0)
    torch.testing.assert_close(SmoothL1()(predictions, targets), theirs)


def test_equation_3_is_far_steeper_than_the_element_wise_form():
    """D = 768 features, each off by more than 1: gradients of size 1 against 1 / D."""
    gradients = []
    for loss in (SmoothL1Norms(), SmoothL1()):
        predictions = torch.full((1, 1, 768), 2.0, requires_grad=True)
        loss(predictions, torch.zeros(1, 1, 768)).backward()
        gradients.append(predictions.grad)
    torch.testing.assert_close(gradients[0], 768 * gradients[1])


def test_normalized_l2_is_blind_to_length_and_four_for_opposite_vectors():
    predictions, targets = pair()
    loss = NormalizedL2()
    torch.testing.assert_close(loss(5 * predictions, targets / 3), loss(predictions, targets))
    assert loss(predictions, -predictions).item() == pytest.approx(4.0)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_smooth_l1_refuses_a_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match=f"beta={beta}"):
        SmoothL1(beta)
