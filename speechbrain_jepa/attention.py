"""Self-attention over rows of tokens, ragged or not, through one function with three backends.

`sdpa` is PyTorch's scaled_dot_product_attention: rows stay padded and padded keys are masked out.
`flash_attn` is the flash-attn package on CUDA in half precision: ragged rows are packed end to
end once per forward pass, so that no layer computes padding.
`matmul` is what "auto" takes on a CPU in half precision for the short rows of patches: batched
matrix products and their backward, several times faster there than sdpa's tiled kernel
(benchmarks/attention.py).
"""

import importlib
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_jepa.cpu import HALF, LONGEST_MATMUL_ROW, MatmulAttention

CHOICES = ("auto", "flash_attn", "sdpa")
FLASH_ATTN = {  # modules that serve, best first: least compute capability of the backward pass
    "flash_attn.flash_attn_interface": (8, 0),
    "flash_attn.cute": (9, 0),
}


def check_attention(attention: str) -> None:
    """Raise ValueError unless `attention` is a choice."""
    if attention not in CHOICES:
        raise ValueError(f"attention={attention!r}: choose one of {', '.join(CHOICES)}")


@cache
def _flash_attn_module():
    """flash-attn 2.x where installed, else its CuTe version (flash-attn-4), else None."""
    for name in FLASH_ATTN:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def choose_backend(
    attention: str, device: torch.device, dtype: torch.dtype, row_length: int = 0
) -> str:
    """The backend that `attention` means for rows of this device, dtype and length.

    Arguments
    ---------
    attention : str
        "sdpa", "flash_attn" or "auto": flash-attn when it is installed, can train on this GPU
        (compute capability 8.0, 9.0 for its CuTe version) and the tensors are in half precision,
        matmul for short rows in half precision on a CPU, else sdpa.

    Raises
    ------
    ValueError
        If flash-attn is asked for and cannot serve; the message says what is missing.

    Example
    -------
    >>> choose_backend("auto", torch.device("cpu"), torch.float32, row_length=65)
    'sdpa'
    """
    check_attention(attention)
    if attention == "sdpa":
        return "sdpa"
    missing = _flash_attn_lacks(device, dtype)
    if missing is None:
        return "flash_attn"
    if attention == "flash_attn":
        raise ValueError(f"attention=flash_attn {missing}, or use attention=auto")
    short = device.type == "cpu" and dtype in HALF and row_length <= LONGEST_MATMUL_ROW
    return "matmul" if short else "sdpa"


def _flash_attn_lacks(device: torch.device, dtype: torch.dtype) -> str | None:
    """What flash-attn needs and what to do about it; None where it can serve."""
    if device.type != "cuda" or dtype not in HALF:
        return (
            f"needs half precision on a CUDA device, got {dtype} on {device}: "
            "use --precision bf16 --device cuda"
        )
    module = _flash_attn_module()
    if module is None:
        return "but flash-attn is not installed: pip install --no-build-isolation flash-attn"
    least, capability = FLASH_ATTN[module.__name__], torch.cuda.get_device_capability(device)
    if capability < least:
        remedy = (
            "install flash-attn 2, which does from 8.0 on" if capability >= (8, 0) else "use sdpa"
        )
        return (
            f"but {module.__name__} has no backward pass below compute capability "
            f"{least[0]}.{least[1]}, and {device} has {capability[0]}.{capability[1]}: {remedy}"
        )
    return None


class Packing(NamedTuple):
    """Where the tokens that count are in padded rows [B, K], when rows are packed end to end."""

    place: Tensor  # [tokens], int64, ascending: their places in the padded rows, flattened
    starts: Tensor  # [B + 1], int32: where each row begins among the tokens, and the end

    @staticmethod
    def of(valid: Tensor, tokens: int | None = None) -> "Packing":
        """
        Arguments
        ---------
        valid : Tensor [B, K], bool
        tokens : int or None
            How many there are. None asks the device, which the host then waits for.

        Example
        -------
        >>> Packing.of(torch.tensor([[True, False], [True, True]]), tokens=3)
        Packing(place=tensor([0, 2, 3]), starts=tensor([0, 1, 3], dtype=torch.int32))
        """
        flat = valid.flatten()
        if tokens is None:
            place = flat.nonzero().squeeze(1)
        else:
            place = flat.logical_not().byte().argsort(stable=True)[:tokens]
        return Packing(place, F.pad(valid.sum(1).cumsum(0, dtype=torch.int32), (1, 0)))


class Rows:
    """A batch of token rows in the layout its attention backend wants.

    `pack` brings [B, K, D] into that layout, `unpack` brings it back (padding as zeros), and
    `attend` runs attention within each row. Every layer in between works on the last axis alone.

    Arguments
    ---------
    attention : str
        See `choose_backend`.
    tokens : Tensor [B, K, D]
        Only shape, device and dtype are used.
    valid : Tensor [B, K], bool, or None
        False marks padding. None: every token counts.
    packing : Packing or None
        Of `valid`, where it is known. None: worked out if the backend packs.

    Example
    -------
    >>> x = torch.randn(2, 3, 8)
    >>> rows = Rows("auto", x, valid=torch.tensor([[True, True, False], [True, True, True]]))
    >>> qkv = torch.cat([x, x, x], -1)
    >>> rows.attend(qkv, num_heads=2).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        attention: str,
        tokens: Tensor,
        valid: Tensor | None = None,
        packing: Packing | None = None,
    ):
        self.backend = choose_backend(
            attention, tokens.device, tokens.dtype, row_length=tokens.shape[1]
        )
        self.valid = valid
        self.packed = self.backend == "flash_attn" and valid is not None
        self.key_mask = None
        if valid is not None and self.packed:
            self.shape = valid.shape
            self.place, self.starts = Packing.of(valid) if packing is None else packing
        elif valid is not None:
            # a row without any valid token would make softmax divide 0 by 0: let it see itself
            some = valid | ~valid.any(1, keepdim=True)
            bias = torch.zeros(some.shape, dtype=tokens.dtype, device=tokens.device)
            self.key_mask = bias.masked_fill_(~some, float("-inf"))[:, None, None, :]

    def pack(self, x: Tensor) -> Tensor:
        """[B, K, D] to the backend's layout."""
        return x.flatten(0, 1)[self.place] if self.packed else x

    def unpack(self, x: Tensor) -> Tensor:
        """The backend's layout to [B, K, D]; tokens that are not valid become zero."""
        if self.packed:
            rows, width = self.shape
            padded = x.new_zeros(rows * width, x.shape[-1])
            return padded.index_copy(0, self.place, x).view(rows, width, -1)
        if self.valid is not None:
            return x.masked_fill(~self.valid[..., None], 0.0)
        return x

    def attend(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Queries, keys and values side by side [..., 3 D] to attended values [..., D]."""
        if self.backend == "matmul":
            return MatmulAttention.apply(qkv, num_heads, self.key_mask)
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)  # [..., heads, head_dim]
        if self.backend == "sdpa":
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.key_mask)
            return out.transpose(1, 2).flatten(-2)
        if self.packed:
            return self._flash_varlen(q, k, v, self.starts, self.shape[1]).flatten(-2)
        return _flash_out(_flash_attn_module().flash_attn_func(q, k, v)).flatten(-2)

    def attend_from(self, queries: Tensor, keys_values: Tensor, num_heads: int) -> Tensor:
        """Attention of other tokens to these rows, each to its own clip's.

        Arguments
        ---------
        queries : Tensor [B, Q, D]
        keys_values : Tensor [..., 2 D]
            Of these rows' tokens, in their layout.

        Returns
        -------
        Tensor [B, Q, D]
        """
        q = queries.unflatten(-1, (num_heads, -1))
        k, v = keys_values.unflatten(-1, (2, num_heads, -1)).unbind(-3)
        if self.backend == "flash_attn":
            if not self.packed:
                return _flash_out(_flash_attn_module().flash_attn_func(q, k, v)).flatten(-2)
            clips, length = q.shape[:2]
            starts = length * torch.arange(clips + 1, dtype=torch.int32, device=q.device)
            out = self._flash_varlen(q.flatten(0, 1), k, v, starts, length)
            return out.unflatten(0, (clips, length)).flatten(-2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.backend == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.key_mask)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            scores = scores if self.key_mask is None else scores + self.key_mask
            out = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return out.transpose(1, 2).flatten(-2)

    def _flash_varlen(self, q, k, v, starts: Tensor, longest: int) -> Tensor:
        """Packed queries that begin at `starts`, packed keys and values of these rows."""
        return _flash_out(
            _flash_attn_module().flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=starts,
                cu_seqlens_k=self.starts,
                max_seqlen_q=longest,
                max_seqlen_k=self.shape[1],
            )
        )


def _flash_out(out) -> Tensor:
    """Some versions return (out, lse)."""
    return out[0] if isinstance(out, tuple) else out
