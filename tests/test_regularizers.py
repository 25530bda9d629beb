"""Each regulariser against its formula in NumPy, ragged, under autocast and on two processes."""

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import MultiBlockMasking, UnstructuredMasking
from speechbrain_jepa.regularizers import SIGReg, VarianceCovariance
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

GRID = PatchGrid(frames=208)
REGULARIZERS = {"variance-covariance": VarianceCovariance, "sigreg": SIGReg}
all_regularizers = pytest.mark.parametrize("name", REGULARIZERS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def variance_covariance(rows: np.ndarray, deviation=1.0) -> tuple[float, float]:
    """VICReg's v (eq. 1) and c (eq. 4)."""
    covariance = np.cov(rows, rowvar=False)
    dims = len(covariance)
    spread = np.sqrt(np.diag(covariance) + 1e-4)
    off_diagonal = covariance[~np.eye(dims, dtype=bool)]
    return np.maximum(0, deviation - spread).mean(), np.square(off_diagonal).sum() / dims


def epps_pulley(rows: np.ndarray, directions: np.ndarray, knots: np.ndarray) -> float:
    """The integral over the whole line of |empirical characteristic function - normal's|²."""
    values = []
    for direction in directions.T:
        empirical = np.exp(1j * np.outer(knots, rows @ direction)).mean(1)
        normal = np.exp(-np.square(knots) / 2)
        values.append(np.trapezoid(np.square(np.abs(empirical - normal)) * normal, knots))
    return float(np.mean(values))


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [1.0, 0.3])
def test_variance_covariance_is_vicregs_formula(deviation):
    tokens = draw(5, 7, 12) @ draw(12, 12, seed=1) * 0.2 + 3.0
    terms = VarianceCovariance(weight=0.5, deviation=deviation, covariance_weight=0.1).terms(tokens)
    variance, covariance = variance_covariance(tokens.flatten(0, 1).double().numpy(), deviation)
    assert terms["variance"].item() == pytest.approx(0.5 * variance, rel=1e-4)
    assert terms["covariance"].item() == pytest.approx(0.5 * 0.1 * covariance, rel=1e-4)


def test_sigreg_is_the_integral_over_the_whole_line():
    tokens = draw(5, 7, 12) * 0.5 + 0.3
    regularizer = SIGReg(weight=2.0, directions=8, knots=9, limit=5.0)
    directions = regularizer._draw_directions(12, torch.device("cpu")).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(directions, axis=0), 1, rtol=1e-6)
    expected = epps_pulley(
        tokens.flatten(0, 1).double().numpy(), directions, np.linspace(-5, 5, 17)
    )
    regularizer.step = 0  # the same directions once more
    assert regularizer(tokens).item() == pytest.approx(2.0 * expected, rel=1e-4)


def test_sigregs_integral_is_fine_enough():
    tokens = draw(5, 7, 12) * 0.5 + 0.3
    coarse, fine = SIGReg(), SIGReg(knots=401, limit=12.0)
    assert coarse(tokens).item() == pytest.approx(fine(tokens).item(), rel=1e-2)


@all_regularizers
def test_gradient_is_that_of_finite_differences(name):
    """Below a deviation of 1, where the hinge is open. Steps of float32: a loose tolerance."""
    regularizer = REGULARIZERS[name](weight=10.0).eval()
    tokens = (draw(3, 4, 5) * 0.4).requires_grad_()
    regularizer(tokens).backward()
    for place in [(0, 0, 0), (1, 2, 3), (2, 3, 4)]:
        sides = []
        for step in (1e-2, -1e-2):
            moved = tokens.detach().clone()
            moved[place] += step
            sides.append(regularizer(moved).item())
        slope = (sides[0] - sides[1]) / 2e-2
        assert tokens.grad[place].item() == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_isotropic_tokens_cost_little_and_collapsed_ones_much():
    isotropic = 1.1 * draw(64, 26, 16)
    for collapsed in (0.01 * isotropic, isotropic[..., :1].expand(-1, -1, 16)):
        assert VarianceCovariance()(collapsed) > 10 * VarianceCovariance()(isotropic)
        assert SIGReg()(collapsed) > 10 * SIGReg()(isotropic)


@all_regularizers
def test_equal_tokens_have_a_finite_gradient(name):
    tokens = torch.ones(4, 6, 8, requires_grad=True)
    REGULARIZERS[name]()(tokens).backward()
    assert tokens.grad.isfinite().all()


# --- which tokens count -----------------------------------------------------------------------


@all_regularizers
def test_padding_counts_for_nothing(name):
    tokens, lengths = draw(4, 9, 6), [9, 3, 5, 1]
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    padded = tokens.masked_fill(~valid[..., None], float("nan")).requires_grad_()
    ours = REGULARIZERS[name]()(padded, valid)
    ours.backward()
    whole = tokens[valid].requires_grad_()
    theirs = REGULARIZERS[name]()(whole[None])
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(padded.grad[valid], whole.grad)
    assert not padded.grad[~valid].any()


@all_regularizers
def test_statistics_are_float32_under_autocast(name):
    tokens = draw(4, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = REGULARIZERS[name]()(tokens)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, REGULARIZERS[name]()(tokens))


# --- random directions ------------------------------------------------------------------------


def test_sigreg_draws_new_directions_at_every_training_step_and_after_a_resume():
    tokens = draw(4, 9, 6)
    regularizer = SIGReg()
    first, second = regularizer(tokens), regularizer(tokens)
    assert first != second
    state = {name: value.clone() for name, value in regularizer.state_dict().items()}
    third = regularizer(tokens)
    resumed = SIGReg()
    resumed.load_state_dict(state)
    assert torch.equal(resumed(tokens), third)


def test_sigreg_does_not_draw_in_validation():
    tokens, regularizer = draw(4, 9, 6), SIGReg()
    before = regularizer.step
    with torch.no_grad():
        regularizer.eval()(tokens)
    assert regularizer.step == before


# --- inside the JEPA --------------------------------------------------------------------------


def build(regularizer, seed=0):
    torch.manual_seed(seed)
    return JEPA(
        Encoder(GRID, dim=48, depth=1, num_heads=3),
        Predictor(GRID, encoder_dim=48, dim=32, depth=1, num_heads=2),
        SmoothL1(),
        regularizer=regularizer,
    )


def test_no_regularizer_and_one_of_weight_zero_train_alike_to_the_last_bit():
    masks = UnstructuredMasking(GRID)(4, generator=torch.Generator().manual_seed(0))
    spectrogram = draw(4, 80, 208)
    plain, zero = build(None), build(VarianceCovariance(weight=0.0))
    outputs = [jepa(spectrogram, masks) for jepa in (plain, zero)]
    assert outputs[0].parts == {}
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    assert plain.state_dict().keys() == zero.state_dict().keys()
    for ours, theirs in zip(plain.predictor.parameters(), zero.predictor.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


@all_regularizers
def test_the_loss_is_the_sum_of_its_parts(name):
    masks = MultiBlockMasking(GRID)(4, generator=torch.Generator().manual_seed(0))
    assert masks.context_valid is not None
    spectrogram = draw(4, 80, 208)
    jepa, plain = build(REGULARIZERS[name]().eval()), build(None)
    output = jepa(spectrogram, masks)
    assert list(output.parts) == ["prediction", *REGULARIZERS[name].names]
    torch.testing.assert_close(sum(output.parts.values()), output.loss.detach())
    torch.testing.assert_close(output.parts["prediction"], plain(spectrogram, masks).loss.detach())
    context = jepa.context_encoder(spectrogram, masks.context_index, masks.context_valid)
    jepa.regularizer.step = 0
    torch.testing.assert_close(
        sum(output.parts[part] for part in REGULARIZERS[name].names),
        jepa.regularizer(context, masks.context_valid).detach(),
    )
    assert not any(part.requires_grad for part in output.parts.values())


# --- several processes ------------------------------------------------------------------------


def train_two_steps(name, rank, world_size):
    """Weights after two steps of SGD on this process's share of the same eight clips."""
    jepa = build(REGULARIZERS[name](weight=2.0))
    model = jepa
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(jepa)
    parameters = [p for p in jepa.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for step in range(2):
        masks = MultiBlockMasking(GRID)(8, generator=torch.Generator().manual_seed(step))
        masks = type(masks)(
            masks.context_index[share],
            masks.target_index[share],
            masks.context_valid[share],
            masks.target_valid[share],
        )
        optimizer.zero_grad()
        model(draw(8, 80, 208, seed=step)[share], masks).loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in jepa.context_encoder.named_parameters()}


def process(rank, folder, name):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    torch.save(train_two_steps(name, rank, 2), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@all_regularizers
def test_two_processes_train_as_one_on_the_joined_batch(name, tmp_path):
    multiprocessing.spawn(process, (str(tmp_path), name), nprocs=2)
    alone = train_two_steps(name, 0, 1)
    start = dict(build(None).context_encoder.named_parameters())
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for parameter, weights in alone.items():
            torch.testing.assert_close(together[parameter], weights, rtol=1e-4, atol=1e-6)
            if parameter.endswith("weight"):
                assert (weights - start[parameter]).abs().max() > 1e-5


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VarianceCovariance(weight=-1), "weight=-1"),
        (lambda: VarianceCovariance(deviation=0), "deviation=0"),
        (lambda: SIGReg(weight=-0.1), r"weight=-0\.1"),
        (lambda: SIGReg(knots=1), "knots=1"),
        (lambda: SIGReg(directions=0), "directions=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
