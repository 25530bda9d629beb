"""The vision transformers of the paper's section 4.1: encoder and predictor.

Shapes: B clips, F frequency and T time patches, N = F * T patches, K of them visible, D dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_jepa.attention import Packing, Rows, check_attention
from speechbrain_jepa.casts import LayerNorm, Linear, cast_together, parameters_for
from speechbrain_jepa.patches import PatchGrid, first_columns, sincos_positions


def _working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else float32 parameters' own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.float32


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, round(dim * mlp_ratio))
        self.layers = [m for m in self.modules() if isinstance(m, Linear | LayerNorm)]

    def forward(
        self, x: Tensor, rows: Rows, keep: int | None = None, memory: Tensor | None = None
    ) -> Tensor:
        """All tokens in the layout of `rows`, or the first `keep` of every row, unpacked.

        With `memory`, which is in the layout of `rows`, tokens [B, Q, D] that attend to it and not
        to each other.
        """
        if torch.compiler.is_compiling():  # it fuses casts with what uses them
            return self._forward(x, rows, keep, memory)
        with cast_together(self.layers, x.dtype):
            return self._forward(x, rows, keep, memory)

    def _forward(self, x: Tensor, rows: Rows, keep: int | None, memory: Tensor | None) -> Tensor:
        if memory is not None:
            return self._across(x, memory, rows)
        attended = rows.attend(self.attn.qkv(self.norm1(x)), self.attn.num_heads)
        if keep is not None:
            x, attended = (rows.unpack(tokens)[:, :keep] for tokens in (x, attended))
        return self._leave(x, attended)

    def _across(self, x: Tensor, memory: Tensor, rows: Rows) -> Tensor:
        dim = x.shape[-1]
        weight, bias = parameters_for(self.attn.qkv, x)
        queries = F.linear(self.norm1(x), weight[:dim], bias[:dim])
        keys_values = F.linear(self.norm1(memory), weight[dim:], bias[dim:])
        return self._leave(x, rows.attend_from(queries, keys_values, self.attn.num_heads))

    def _leave(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn.proj(attended)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def _initialize(module: nn.Module) -> None:
    """Xavier-uniform weights, zero biases; not all as the released code (docs/released_code.md)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")


class Encoder(nn.Module):
    """A ViT over the visible patches of a log-mel spectrogram (f_theta of section 3.1).

    Only visible patches are embedded. Under autocast the whole encoder works in autocast's dtype.

    Arguments
    ---------
    grid : PatchGrid
    dim, depth, num_heads : int
        Default ViT-Base: 768, 12, 12.
    mlp_ratio : float
        Width of the hidden layer over `dim`. Default 4.
    norm_eps : float
        Of the layer norms. Default 1e-6 (M2D, MATPAC); the released JEPA code has 1e-5.
    class_token : bool
        A learnable token goes through the layers beside the patches, in every row's attention,
        and is left out of the output. Default False.
    stored_positions : bool
        Positions are kept in the state dict, for weights trained with others. Default False:
        they are the sine-cosine positions of the grid.
    attention : str
        "auto", "flash_attn" or "sdpa" (see `speechbrain_jepa.attention`).

    Example
    -------
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> spectrogram = torch.randn(4, 80, 208)
    >>> encoder(spectrogram).shape
    torch.Size([4, 65, 48])
    >>> encoder(spectrogram, index=torch.arange(26).expand(4, -1), all_layers=True).shape
    torch.Size([3, 4, 26, 48])
    """

    positions: Tensor
    class_token: nn.Parameter | None

    def __init__(
        self,
        grid: PatchGrid,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        class_token: bool = False,
        stored_positions: bool = False,
        attention: str = "auto",
    ):
        super().__init__()
        _check_heads(dim, num_heads)
        check_attention(attention)
        self.grid = grid
        self.dim = dim
        self.attention = attention
        self.config = dict(
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            class_token=class_token,
            stored_positions=stored_positions,
        )
        self.patch_embed = Linear(grid.patch_values, dim)
        positions = sincos_positions(grid.frequency_patches, grid.time_patches, dim)
        self.register_buffer("positions", positions, persistent=stored_positions)
        token = nn.Parameter(0.02 * torch.randn(dim)) if class_token else None
        self.register_parameter("class_token", token)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth)
        )
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.apply(_initialize)

    def forward(
        self,
        spectrogram: Tensor,
        index: Tensor | None = None,
        valid: Tensor | None = None,
        all_layers: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """
        Arguments
        ---------
        spectrogram : Tensor [B, bands, frames]
            Normalised log-mel; at most the grid's frames, a whole number of patches.
        index : Tensor [B, K], int64, or None
            The visible patches. None: all of them.
        valid : Tensor [B, K], bool, or None
            False marks padding: no token attends to it, and its output is zero.
        all_layers : bool
            Also give what enters the first layer and leaves each.
        packing : Packing or None
            Of `valid`, where it is known (see `PatchMasks`).

        Returns
        -------
        Tensor [B, K, D], or [1 + depth, B, K, D]
            The last layer is behind the final layer norm, the ones before are not.
        """
        positions = self._positions_for(spectrogram)
        patches = self.grid.patches(spectrogram)
        if index is None:
            positions = positions.expand(patches.shape[0], -1, -1)
        else:
            patches = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
            positions = F.embedding(index, positions)
        dtype = _working_dtype(spectrogram)
        with torch.autocast(spectrogram.device.type, enabled=False):
            x = self.patch_embed(patches.to(dtype)) + positions.to(dtype)
            if self.class_token is not None:
                x, valid = _append_token(x, valid, self.class_token)
                packing = None  # that of rows without the token
            rows = Rows(self.attention, x, valid, packing)
            x = rows.pack(x)
            layers = [x]
            for block in self.blocks:
                x = block(x, rows)
                layers.append(x)
            layers[-1] = self.norm(x)
            wanted = layers if all_layers else layers[-1:]
            outputs = [rows.unpack(layer) for layer in wanted]
            if self.class_token is not None:
                outputs = [tokens[:, :-1] for tokens in outputs]
            return torch.stack(outputs) if all_layers else outputs[0]

    def _positions_for(self, spectrogram: Tensor) -> Tensor:
        """Positions [N', D] of a spectrogram no longer than the grid."""
        bands, frames = spectrogram.shape[1:]
        grid = self.grid
        if bands != grid.bands or frames > grid.frames or frames % grid.patch_time:
            raise ValueError(
                f"spectrogram of {bands} bands x {frames} frames: this encoder takes "
                f"{grid.bands} bands and at most {grid.frames} frames in multiples of "
                f"{grid.patch_time}; cut longer audio into windows, pad shorter audio"
            )
        return first_columns(self.positions, grid, frames // grid.patch_time)


def _append_token(x: Tensor, valid: Tensor | None, token: Tensor) -> tuple[Tensor, Tensor | None]:
    """Behind the patches, where their numbers stay as they are."""
    x = torch.cat([x, token.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
    return x, None if valid is None else F.pad(valid, (0, 1), value=True)


class Predictor(nn.Module):
    """A narrow ViT that predicts target representations from the context (g_phi, section 3.1).

    Its tokens are the context representations and, for every target, one shared learnable mask
    token; both get the fixed position of their patch.

    Arguments
    ---------
    grid : PatchGrid
    encoder_dim : int
        Dims of the representations it reads and predicts. Default 768.
    dim, depth, num_heads : int
        Default 512, 8, 16.
    mlp_ratio, norm_eps, attention
        As in `Encoder`.
    cross_attention : bool
        Targets attend to the context only, whose tokens stay as they are: less to compute, and a
        prediction does not depend on which others are made (CrossMAE,
        https://arxiv.org/abs/2401.14391). Same parameters. Default False: all attend to all.

    Example
    -------
    >>> grid = PatchGrid(frames=208)
    >>> predictor = Predictor(grid, encoder_dim=48, dim=32, depth=1, num_heads=4)
    >>> context, target = torch.arange(26).expand(4, -1), torch.arange(26, 65).expand(4, -1)
    >>> predictor(torch.randn(4, 26, 48), context, target).shape
    torch.Size([4, 39, 48])
    """

    positions: Tensor

    def __init__(
        self,
        grid: PatchGrid,
        encoder_dim: int = 768,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        attention: str = "auto",
        cross_attention: bool = False,
    ):
        super().__init__()
        _check_heads(dim, num_heads)
        check_attention(attention)
        self.cross_attention = cross_attention
        if depth < 1:
            raise ValueError(f"predictor depth={depth}: at least one layer is needed")
        self.grid = grid
        self.attention = attention
        self.proj_in = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        positions = sincos_positions(grid.frequency_patches, grid.time_patches, dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth)
        )
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.proj_out = Linear(dim, encoder_dim)
        self.apply(_initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        context_valid: Tensor | None = None,
        target_valid: Tensor | None = None,
        packing: Packing | None = None,
        time_patches: int | None = None,
    ) -> Tensor:
        """
        Arguments
        ---------
        context : Tensor [B, Kc, D]
            Representations of the context patches.
        context_index, target_index : Tensor [B, Kc] and [B, Kt], int64
        context_valid, target_valid : Tensor [B, Kc] and [B, Kt], bool, or None
        packing : Packing or None
            Of both side by side, targets first, or with `cross_attention` of the context, where it
            is known (see `PatchMasks`).
        time_patches : int or None
            T of the spectrograms, where they are shorter than the grid. None: the grid's.

        Returns
        -------
        Tensor [B, Kt, D]
        """
        num_targets = target_index.shape[1]
        positions = first_columns(self.positions, self.grid, time_patches).to(context.dtype)
        with torch.autocast(context.device.type, enabled=False):
            targets = self.mask_token.to(context.dtype) + F.embedding(target_index, positions)
            context = self.proj_in(context) + F.embedding(context_index, positions)
            if self.cross_attention:
                rows = Rows(self.attention, context, context_valid, packing)
                memory = rows.pack(context)
                for block in self.blocks:
                    targets = block(targets, rows, memory=memory)
                return self.proj_out(self.norm(targets))
            x = torch.cat([targets, context], 1)
            valid = join_valid(target_index, target_valid, context_index, context_valid)
            rows = Rows(self.attention, x, valid, packing)
            x = rows.pack(x)
            for block in self.blocks[:-1]:
                x = block(x, rows)
            x = self.blocks[-1](x, rows, keep=num_targets)
            return self.proj_out(self.norm(x))


def join_valid(first_index, first_valid, second_index, second_valid) -> Tensor | None:
    """Validity of two ragged parts side by side; None where every entry counts."""
    if first_valid is None and second_valid is None:
        return None
    parts = (
        torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        for index, valid in ((first_index, first_valid), (second_index, second_valid))
    )
    return torch.cat(list(parts), 1)
