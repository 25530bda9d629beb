"""Layers that work in the dtype of their input, whatever their parameters are kept in.

One by one, the casts of a transformer layer's twelve parameters and of their gradients are 24 small
kernels; together they are two.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_jepa.cpu import layer_norm


class _Cast(torch.autograd.Function):
    """Tensors of one dtype to another in one call, and their gradients back in one."""

    @staticmethod
    def forward(dtype: torch.dtype, *tensors: Tensor):
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return None, *_Cast.apply(ctx.dtype, *gradients)


class Linear(nn.Linear):
    """A linear layer in the dtype of its input."""

    copies: tuple[Tensor, Tensor] | None = None  # of weight and bias, while `cast_together` is on

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *parameters_for(self, x))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input (its sums are float32 all the same)."""

    copies: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, *parameters_for(self, x), self.eps)


def parameters_for(layer: Linear | LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the dtype of x."""
    return layer.copies or (layer.weight.to(x.dtype), layer.bias.to(x.dtype))


@contextmanager
def cast_together(layers: Sequence[Linear | LayerNorm], dtype: torch.dtype) -> Iterator[None]:
    """While it is entered, the layers use copies of their parameters, made in one call.

    Nothing to do where the parameters have the dtype already.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if all(parameter.dtype == dtype for parameter in parameters):
        yield
        return
    copies = _Cast.apply(dtype, *parameters)
    for layer, weight, bias in zip(layers, copies[::2], copies[1::2]):
        layer.copies = weight, bias
    try:
        yield
    finally:
        for layer in layers:
            layer.copies = None
