"""Muon and AdamW as one optimiser, against each on its own and against Muon written out."""

import copy
import itertools

import pytest
import torch
from speechbrain.utils.optimizers import rm_vector_weight_decay

from speechbrain_jepa import optimizers
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import UnstructuredMasking
from speechbrain_jepa.optimizers import MuonAdamW, block_matrices, make_optimizer
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

GRID = PatchGrid(frames=64)
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")


def build():
    torch.manual_seed(0)
    encoder = Encoder(GRID, dim=24, depth=2, num_heads=3)
    return JEPA(encoder, Predictor(GRID, 24, dim=24, depth=1, num_heads=3), SmoothL1())


def gradients(jepa, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = UnstructuredMasking(GRID)(4, generator=generator)
    jepa.zero_grad()
    jepa(torch.randn(4, 80, 64, generator=generator), masks).loss.backward()


@needs_muon
def test_each_has_its_own_parameters_and_none_is_forgotten():
    jepa = build()
    optimizer = make_optimizer(rm_vector_weight_decay(jepa), jepa, muon=True, **ADAMW)
    muons, adamws = (
        {id(p) for group in part.param_groups for p in group["params"]}
        for part in (optimizer.muon, optimizer.adamw)
    )
    names = {name for name, p in jepa.named_parameters() if id(p) in muons}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = ("context_encoder.blocks.0", "context_encoder.blocks.1", "predictor.blocks.0")
    assert names == {f"{block}.{layer}.weight" for block in blocks for layer in layers}
    trained = {id(p) for p in jepa.parameters() if p.requires_grad}
    assert muons | adamws == trained and not muons & adamws
    decays = {
        p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decays == {1: 0.0, 2: 0.05}


def newton_schulz(matrix):
    """The quintic iteration of Jordan et al., as their page has it, in float64."""
    x = matrix / matrix.norm()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@needs_muon
def test_two_steps_are_those_of_muon_and_adamw_each_alone():
    jepa, mirror = build(), build()
    optimizer = make_optimizer(rm_vector_weight_decay(jepa), jepa, muon=True, **ADAMW)
    chosen = {id(p) for p in block_matrices(mirror)}
    rest = [p for p in mirror.parameters() if p.requires_grad and id(p) not in chosen]
    vectors = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}
    alone = (
        torch.optim.AdamW([vectors, {"params": [p for p in rest if p.ndim > 1]}], **ADAMW),
        torch.optim.Muon(block_matrices(mirror), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
    for rate, seed in ((1e-3, 1), (5e-4, 2)):
        for group in itertools.chain(optimizer.param_groups, *(o.param_groups for o in alone)):
            group["lr"] = rate  # as the brain sets it
        gradients(jepa, seed)
        for ours, theirs in zip(jepa.parameters(), mirror.parameters()):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        for each in (optimizer, *alone):
            each.step()
    for (name, ours), theirs in zip(jepa.named_parameters(), mirror.parameters()):
        assert torch.equal(ours, theirs), name


@needs_muon
def test_the_first_update_is_muons_orthogonalised_gradient_at_adamws_size():
    """torch iterates in bfloat16, which leaves a tenth of noise in a 24 x 24 matrix."""
    jepa, start = build(), build()
    optimizer = make_optimizer(rm_vector_weight_decay(jepa), jepa, muon=True, **ADAMW)
    gradients(jepa, 1)
    optimizer.step()
    for ours, first in zip(block_matrices(jepa), block_matrices(start)):
        with torch.no_grad():
            moved = ((1 - 1e-3 * 0.05) * first - ours).double()
        expected = 1e-3 * 0.2 * max(ours.shape) ** 0.5 * newton_schulz(ours.grad.double())
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.93
        assert 0.9 < moved.norm() / expected.norm() < 1.1


@needs_muon
def test_a_state_that_is_loaded_goes_on_to_the_bit():
    jepa = build()
    first = make_optimizer(rm_vector_weight_decay(jepa), jepa, muon=True, **ADAMW)
    gradients(jepa, 1)
    first.step()
    other = build()
    other.load_state_dict(jepa.state_dict())
    second = make_optimizer(rm_vector_weight_decay(other), other, muon=True, **ADAMW)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares what it loads
    for each, optimizer in ((jepa, first), (other, second)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3
        gradients(each, 2)
        optimizer.step()
    for (name, ours), theirs in zip(jepa.named_parameters(), other.parameters()):
        assert torch.equal(ours, theirs), name


def test_without_it_it_is_adamw_itself():
    jepa = build()
    optimizer = make_optimizer(rm_vector_weight_decay(jepa), jepa, **ADAMW)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_a_torch_without_muon_is_an_error_that_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(optimizers.torch, "__version__", "2.8.0")
    with pytest.raises(ImportError, match=r"torch 2\.8\.0 does not have: install torch 2\.9"):
        MuonAdamW(build().parameters(), [], **ADAMW)
