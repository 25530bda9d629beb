"""Weights cast in one call are those cast one by one: values, gradients, what comes and goes."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from speechbrain_jepa.casts import Linear, cast_together
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

GRID = PatchGrid(frames=64)
INDEX, TARGETS = torch.arange(8).expand(3, -1), torch.arange(8, 20).expand(3, -1)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(GRID, dim=48, depth=2, num_heads=3)


def gradients(module, *inputs, dtype=torch.bfloat16):
    """Output, and the gradient of each parameter (None where it takes none)."""
    module.zero_grad()
    with torch.autocast("cpu", dtype):
        out = module(*inputs)
    out.float().pow(3).sum().backward()
    return [out, *(parameter.grad for parameter in module.parameters())]


def same(ours, theirs) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def one_by_one(monkeypatch):
    """Switches to casts of single weights, as compiled code has them."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_those_of_single_casts(encoder, one_by_one, dtype):
    encoder.blocks[0].attn.requires_grad_(False)
    encoder.blocks[1].norm1.weight.requires_grad_(False)
    spectrogram = torch.randn(3, 80, 64)
    together = gradients(encoder, spectrogram, dtype=dtype)
    one_by_one()
    single = gradients(copy.deepcopy(encoder), spectrogram, dtype=dtype)
    assert same(together, single)
    assert sum(gradient is None for gradient in together) == 5
    assert all(gradient is None or gradient.abs().sum() > 0 for gradient in together)


@pytest.mark.parametrize("cross_attention", [False, True])
def test_bits_of_the_predictor(one_by_one, cross_attention):
    torch.manual_seed(0)
    shape = dict(encoder_dim=48, dim=32, depth=2, num_heads=4)
    predictor = Predictor(GRID, **shape, cross_attention=cross_attention)
    inputs = torch.randn(3, 8, 48).bfloat16(), INDEX, TARGETS
    together = gradients(predictor, *inputs)
    one_by_one()
    single = gradients(copy.deepcopy(predictor), *inputs)
    names = ["output", *(name for name, _ in predictor.named_parameters())]
    for name, ours, theirs in zip(names, together, single, strict=True):
        if cross_attention and ".norm1." in name:  # used twice: its gradients meet as bfloat16
            assert (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()
        else:
            assert torch.equal(ours, theirs), name


def test_a_layer_is_one_call_forward_and_one_backward(encoder):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            calls[name] += name != "_to_copy" or id(args[0]) in weights
            return func(*args, **(kwargs or {}))

    calls, weights = Counter(), {id(parameter) for parameter in encoder.parameters()}
    spectrogram = torch.randn(3, 80, 64)
    with torch.autocast("cpu", torch.bfloat16), Calls():
        out = encoder(spectrogram)
    assert calls["_foreach_copy_"] == len(encoder.blocks)
    assert calls["_to_copy"] == 4  # the patch embedding and the last norm
    with Calls():
        out.float().sum().backward()
    assert calls["_foreach_copy_"] == 2 * len(encoder.blocks)
    calls.clear()
    with Calls():
        encoder(spectrogram)  # float32: nothing to cast
    assert calls["_foreach_copy_"] == calls["_to_copy"] == 0


def test_compiled_gradients_are_those_of_eager_code(encoder):
    spectrogram = torch.randn(3, 80, 64)
    eager = gradients(encoder, spectrogram)
    assert same(eager, gradients(torch.compile(encoder, backend="aot_eager"), spectrogram))


def test_recomputed_layers_cast_again(encoder):
    spectrogram = torch.randn(3, 80, 64)
    stored = gradients(encoder, spectrogram)
    for block in encoder.blocks:
        block.forward = _checkpointed(block.forward)
    assert same(stored, gradients(encoder, spectrogram))


def _checkpointed(forward):
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def test_copies_are_gone_after_a_failure():
    layer = Linear(4, 4)
    with pytest.raises(RuntimeError), cast_together([layer], torch.bfloat16):
        assert layer(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
        layer(torch.randn(2, 5).bfloat16())
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert layer(torch.ones(2, 4).bfloat16()).abs().max() == 0  # no stale copy


def test_gradients_of_gradients_pass_through():
    layer = Linear(4, 4)
    x = torch.randn(2, 4, dtype=torch.bfloat16)

    def penalty(together):
        with cast_together([layer] if together else [], torch.bfloat16):
            out = layer(x).float().pow(3).sum()
        (slope,) = torch.autograd.grad(out, layer.weight, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), layer.weight)[0]

    assert torch.equal(penalty(True), penalty(False)) and penalty(True).abs().sum() > 0
