"""Half precision on a CPU, where PyTorch's own kernels are slow or inexact.

Everything here exists for a figure, and nothing here is used on a GPU or in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
LONGEST_MATMUL_ROW = 128  # tokens: above, the K x K scores outgrow the cache and sdpa wins
SHORTEST_HALF_SOFTMAX_ROW = 64  # tokens: below, softmax is faster in float32, copies included


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis whose weight and bias get exact gradients.

    The CPU's kernel adds up their gradients in half precision, row after row: off by 7 % over 64
    clips of 65 tokens. The backward pass of addcmul sums in float32.
    """
    if x.is_cpu and x.dtype in HALF and torch.is_grad_enabled():
        return torch.addcmul(bias, F.layer_norm(x, weight.shape, eps=eps), weight)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class MatmulAttention(torch.autograd.Function):
    """Attention of short rows by batched matrix products, heads as extra rows of the batch.

    For rows of up to 100 tokens 2.5 to 7 times as fast as sdpa's tiled kernel, forward and backward
    together (benchmarks/attention.py). Written out because autograd of the same lines copies
    queries, keys and values apart and together again, and keeps the scores from before the softmax.
    Short rows go through float32's softmax: its half-precision kernel works on scalars where a
    vector register is not filled.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> Tensor:
        heads = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = heads.flatten(1, 2)  # [B * heads, K, head_dim] each
        scores = _scaled_bmm(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
        if key_mask is not None:
            scores.unflatten(0, (-1, num_heads)).add_(key_mask)
        weights = scores.softmax(-1, dtype=_softmax_dtype(scores)).to(qkv.dtype)
        out = torch.bmm(weights, v)
        ctx.save_for_backward(heads, weights)
        return out.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        heads, weights = ctx.saved_tensors
        _, rows, num_heads, length, head_dim = heads.shape
        scale = head_dim**-0.5
        q, k, v = heads.flatten(1, 2)
        grad = grad.unflatten(-1, (num_heads, head_dim)).transpose(1, 2).reshape(v.shape)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        dtype = _softmax_dtype(weights)
        grad_scores = torch._softmax_backward_data(
            grad_weights.to(dtype), weights.to(dtype), -1, dtype
        ).to(grad.dtype)
        grad_heads = torch.empty_like(heads)
        grad_q, grad_k, grad_v = grad_heads.flatten(1, 2)
        _scaled_bmm(grad_scores, k, scale, out=grad_q)
        _scaled_bmm(grad_scores.transpose(1, 2), q, scale, out=grad_k)
        torch.bmm(weights.transpose(1, 2), grad, out=grad_v)
        grad_qkv = grad_heads.permute(1, 3, 0, 2, 4).reshape(rows, length, -1)
        return grad_qkv, None, None


def _softmax_dtype(scores: Tensor) -> torch.dtype:
    """The scores' own where its kernel is as fast (it sums in float32 either way), else float32."""
    if scores.shape[-1] >= SHORTEST_HALF_SOFTMAX_ROW:
        return scores.dtype
    return torch.promote_types(scores.dtype, torch.float32)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * left @ right in one pass."""
    ignored = left.new_empty(())  # beta = 0: never read
    return torch.baddbmm(ignored, left, right, beta=0, alpha=scale, out=out)
