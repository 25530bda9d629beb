"""Context and target patches: the three strategies of the paper's section 3.2.

A strategy is built from the patch grid and its own numbers and is called with a batch size. It
draws every clip's patches independently, on the device asked for, without a loop over clips.
Patches are numbered row by row: index = frequency_patch * time_patches + time_patch.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speechbrain_jepa.attention import Packing
from speechbrain_jepa.vit import PatchGrid, join_valid

MAX_REDRAWS = 100  # of the clips of a batch whose blocks left too little context
TRIAL_CLIPS = 4096  # drawn at construction to see how often that happens


@dataclass(frozen=True)
class PatchMasks:
    """Which patches are context and which are targets, clip by clip.

    Arguments
    ---------
    context_index : Tensor [B, Kc], int64
        Patch numbers, ascending where valid.
    target_index : Tensor [B, Kt], int64
        Likewise. No patch of a clip is in both.
    context_valid : Tensor [B, Kc], bool, or None
        False marks the padding after a clip's own patches. None: every entry counts.
    target_valid : Tensor [B, Kt], bool, or None
        Likewise.
    context_packing, target_packing, joint_packing : Packing or None
        Of the context, the targets, and the predictor's rows, targets first. They spare
        the three passes of a step the wait for the device. None: worked out where needed.
    predicted : Tensor [B, Kp], int64, or None
        Which of a clip's targets are predicted: columns of `target_index`, ascending where valid.
        None: all of them.
    predicted_valid : Tensor [B, Kp], bool, or None
        As the others.
    frames : int or None
        Of the spectrograms that they are for. None: of the encoder's grid.
    """

    context_index: Tensor
    target_index: Tensor
    context_valid: Tensor | None = None
    target_valid: Tensor | None = None
    context_packing: Packing | None = None
    target_packing: Packing | None = None
    joint_packing: Packing | None = None
    predicted: Tensor | None = None
    predicted_valid: Tensor | None = None
    frames: int | None = None

    def __len__(self) -> int:
        return len(self.target_index)

    def predicting(self, share: float, generator: torch.Generator | None = None) -> "PatchMasks":
        """The same context and targets, of which each clip predicts a random share.

        Arguments
        ---------
        share : float
            Above 0, at most 1; of every clip's own targets, rounded, one at least.
        generator : torch.Generator or None
            On the masks' device.

        Example
        -------
        >>> masks = PatchMasks(torch.tensor([[0, 1]]), torch.tensor([[2, 3, 5, 7]]))
        >>> masks.predicting(0.5).predicted.shape
        torch.Size([1, 2])
        """
        if not 0 < share <= 1:
            raise ValueError(f"predicted_share={share}: must be above 0 and at most 1")
        clips, longest = self.target_index.shape
        order = torch.rand(clips, longest, device=self.target_index.device, generator=generator)
        most = max(int(share * longest + 0.5), 1)
        if self.target_valid is None:
            predicted = order.argsort(1)[:, :most].sort(1).values
            return replace(self, predicted=predicted, predicted_valid=None, joint_packing=None)
        order = order.masked_fill(~self.target_valid, 2.0).argsort(1)[:, :most]
        counts = (share * self.target_valid.sum(1).double() + 0.5).long().clamp(min=1)
        valid = torch.arange(most, device=order.device) < counts[:, None]
        predicted = order.masked_fill(~valid, longest).sort(1).values
        predicted = predicted.masked_fill(~valid, 0)
        return replace(self, predicted=predicted, predicted_valid=valid, joint_packing=None)

    @property
    def predicted_index(self) -> Tensor:
        """Patch numbers of what is predicted: [B, Kp], or `target_index`."""
        if self.predicted is None:
            return self.target_index
        return self.target_index.gather(1, self.predicted)

    @property
    def loss_valid(self) -> Tensor | None:
        """Which of the predictions count."""
        return self.target_valid if self.predicted is None else self.predicted_valid

    def clip(self, row: int) -> "PatchMasks":
        """The masks of one clip alone, without padding."""

        def own(index, valid):
            return index[row : row + 1] if valid is None else index[row, valid[row]][None]

        return PatchMasks(
            own(self.context_index, self.context_valid), own(self.target_index, self.target_valid)
        )

    @staticmethod
    def from_maps(context: Tensor, target: Tensor) -> "PatchMasks":
        """From two boolean maps [B, N]; True says that the patch belongs.

        Example
        -------
        >>> target = torch.tensor([[True, False, False], [True, False, True]])
        >>> masks = PatchMasks.from_maps(context=~target, target=target)
        >>> masks.clip(0).context_index, masks.clip(1).context_index
        (tensor([[1, 2]]), tensor([[1]]))
        >>> masks.context_valid
        tensor([[ True,  True],
                [ True, False]])
        """
        counts = torch.stack([context.sum(1), target.sum(1)])
        sizes = torch.stack([counts.amin(1), counts.amax(1), counts.sum(1)], 1)
        of_context, of_target = sizes.tolist()  # all that the CPU needs, in one synchronisation
        context_index, context_valid = _indices(context, counts[0], *of_context[:2])
        target_index, target_valid = _indices(target, counts[1], *of_target[:2])
        joint_valid = join_valid(target_index, target_valid, context_index, context_valid)
        of_context_packing, of_target_packing, of_both = (
            None if valid is None else Packing.of(valid, tokens)
            for valid, tokens in (
                (context_valid, of_context[2]),
                (target_valid, of_target[2]),
                (joint_valid, of_context[2] + of_target[2]),
            )
        )
        return PatchMasks(
            context_index,
            target_index,
            context_valid,
            target_valid,
            of_context_packing,
            of_target_packing,
            of_both,
        )


def _indices(belongs: Tensor, counts: Tensor, shortest: int, longest: int):
    """Boolean rows [B, N] to ascending indices [B, K], K the longest row's count, and validity."""
    index = torch.argsort(belongs.logical_not().byte(), dim=1, stable=True)[:, :longest]
    if shortest == longest:
        return index, None
    return index, torch.arange(longest, device=belongs.device) < counts[:, None]


def for_grid(strategy, grid: PatchGrid):
    """The same strategy on another grid: every other argument of its constructor as it was.

    Raises
    ------
    TypeError
        If the strategy does not keep an argument under the argument's name.

    Example
    -------
    >>> for_grid(UnstructuredMasking(PatchGrid(208), target_share=0.8), PatchGrid(64)).num_context
    4
    """
    names = [name for name in inspect.signature(type(strategy)).parameters if name != "grid"]
    lost = [name for name in names if not hasattr(strategy, name)]
    if lost:
        raise TypeError(
            f"{type(strategy).__name__} does not keep its {', '.join(lost)}, so it cannot be built "
            "for another duration: store each argument under its own name"
        )
    return type(strategy)(grid, **{name: getattr(strategy, name) for name in names})


def for_durations(strategy, grid: PatchGrid, durations) -> dict[int, Any]:
    """The strategy on grids of so many frames, by frames; those of its own grid are left out."""
    others = [frames for frames in durations if frames != grid.frames]
    return {frames: for_grid(strategy, replace(grid, frames=frames)) for frames in others}


class UnstructuredMasking:
    """A random subset of the patches is the target, all others are the context (section 3.2).

    Arguments
    ---------
    grid : PatchGrid
    target_share : float
        Share of the patches that are targets. Default 0.6, as in the released code: 39 of 65.

    Raises
    ------
    ValueError
        If the share leaves no context or no target patch.

    Example
    -------
    >>> masks = UnstructuredMasking(PatchGrid(frames=208))(batch_size=4)
    >>> masks.context_index.shape, masks.target_index.shape
    (torch.Size([4, 26]), torch.Size([4, 39]))
    """

    def __init__(self, grid: PatchGrid, target_share: float = 0.6):
        self.target_share = target_share
        self.num_patches = grid.num_patches
        self.num_context = round((1 - target_share) * self.num_patches)
        if not 0 < self.num_context < self.num_patches:
            raise ValueError(
                f"target_share={target_share} of {self.num_patches} patches leaves "
                f"{self.num_context} context patches: both sides need at least one"
            )

    def __call__(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> PatchMasks:
        """Draw the masks of `batch_size` clips; `generator` must live on `device`."""
        order = torch.rand(batch_size, self.num_patches, device=device, generator=generator)
        order = order.argsort(1)
        context, target = order.split([self.num_context, self.num_patches - self.num_context], 1)
        return PatchMasks(context.sort(1).values, target.sort(1).values)


class _BlockMasking:
    """Several target blocks and one context block, from which the targets are removed.

    Every clip draws the size and the place of each of its blocks. The few clips whose targets
    leave fewer than `min_context_patches` draw again, all their blocks: the result is the
    independent draw, conditioned on enough context. Subclasses say how a block is drawn.
    """

    def __init__(
        self,
        grid: PatchGrid,
        num_targets: int,
        target_share: tuple[float, float],
        context_share: tuple[float, float],
        min_context_patches: int,
    ):
        for name, (low, high) in {"target": target_share, "context": context_share}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}_share={(low, high)}: needs 0 < low <= high <= 1")
        if num_targets < 1:
            raise ValueError(f"num_targets={num_targets}: at least one target block is needed")
        if min_context_patches < 1:
            raise ValueError(f"min_context_patches={min_context_patches}: at least 1 is needed")
        self.grid = grid
        self.num_targets = num_targets
        self.target_share = target_share
        self.context_share = context_share
        self.min_context_patches = min_context_patches
        context, _ = self._draw_maps(TRIAL_CLIPS, None, torch.Generator().manual_seed(0))
        enough = (context.sum(1) >= min_context_patches).float().mean().item()
        if enough < 0.5:
            raise ValueError(
                f"{num_targets} target blocks of {target_share} of the patches leave "
                f"{min_context_patches} context patches in only {enough:.0%} of the draws: use "
                "fewer or smaller target blocks, or a larger context_share"
            )

    def __call__(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> PatchMasks:
        """Draw the masks of `batch_size` clips; `generator` must live on `device`."""
        context, target = self._draw_maps(batch_size, device, generator)
        for _ in range(MAX_REDRAWS):
            poor = (context.sum(1) < self.min_context_patches).nonzero().squeeze(1)
            if len(poor) == 0:
                return PatchMasks.from_maps(context, target)
            context[poor], target[poor] = self._draw_maps(len(poor), device, generator)
        raise RuntimeError(f"no draw left enough context in {MAX_REDRAWS} tries")  # p < 2**-100

    def _draw_maps(self, batch_size, device, generator) -> tuple[Tensor, Tensor]:
        """Context (targets removed) and target maps, bool [B, N], not yet checked for size."""

        def uniform(low, high, blocks):
            draws = torch.rand(batch_size, blocks, device=device, generator=generator)
            return low + (high - low) * draws

        target = self._draw_blocks(self.num_targets, self.target_share, uniform, "target").any(1)
        context = self._draw_blocks(1, self.context_share, uniform, "context").squeeze(1)
        return (context & ~target).flatten(1), target.flatten(1)

    def _draw_blocks(self, blocks, share, uniform, role) -> Tensor:
        """Independent blocks, bool [B, blocks, F, T]."""
        raise NotImplementedError


def _spans(sizes: Tensor, length: int, uniform) -> Tensor:
    """Spans of the given sizes [B, blocks], each place equally likely: bool [B, blocks, length]."""
    places = length - sizes + 1
    start = (uniform(0.0, 1.0, sizes.shape[1]) * places).long()
    start = torch.minimum(start, places - 1)[..., None]  # float32 products can round up to `places`
    positions = torch.arange(length, device=sizes.device)
    return (positions >= start) & (positions < start + sizes[..., None])


class MultiBlockMasking(_BlockMasking):
    """Rectangular target blocks, and a large context block without them (I-JEPA; section 3.2).

    A block's area is a share of the patches drawn uniformly from its range, its aspect ratio
    (height / width, in patches) likewise and independently; sides are rounded to whole patches.
    A side longer than the grid is cut to the grid and the other side grows to keep the area, so
    that 85-100 % of a 5 x 13 grid are 11 to 13 full columns. Places are uniform over all that fit.

    Arguments
    ---------
    grid : PatchGrid
    num_targets : int
        Target blocks a clip; they may overlap. Default 4.
    target_share : (float, float)
        Area of a target block as a share of all patches. Default (0.15, 0.2).
    target_aspect : (float, float)
        Default (0.75, 1.5).
    context_share : (float, float)
        Default (0.85, 1.0).
    context_aspect : (float, float)
        Default (1.0, 1.0).
    min_context_patches : int
        Clips left with less draw again. Default 1.

    Raises
    ------
    ValueError
        If a range is empty or the targets leave too little context in most draws.

    Example
    -------
    >>> masks = MultiBlockMasking(PatchGrid(frames=208))(batch_size=16)
    >>> masks.clip(0).target_index.shape[1] >= 9  # one 3 x 3 block is the least there can be
    True
    """

    def __init__(
        self,
        grid: PatchGrid,
        num_targets: int = 4,
        target_share: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_share: tuple[float, float] = (0.85, 1.0),
        context_aspect: tuple[float, float] = (1.0, 1.0),
        min_context_patches: int = 1,
    ):
        for name, (low, high) in {"target": target_aspect, "context": context_aspect}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name}_aspect={(low, high)}: needs 0 < low <= high")
        self.target_aspect = target_aspect
        self.context_aspect = context_aspect
        super().__init__(grid, num_targets, target_share, context_share, min_context_patches)

    def _draw_blocks(self, blocks, share, uniform, role):
        rows, columns = self.grid.frequency_patches, self.grid.time_patches
        area = uniform(*share, blocks) * self.grid.num_patches
        aspect = self.target_aspect if role == "target" else self.context_aspect
        aspect = uniform(*aspect, blocks)
        height = (area * aspect).sqrt().clamp(max=rows)
        width = (area / height).clamp(max=columns)
        height = (area / width).clamp(max=rows)
        heights = height.round().long().clamp(min=1)
        widths = width.round().long().clamp(min=1)
        in_rows = _spans(heights, rows, uniform)
        in_columns = _spans(widths, columns, uniform)
        return in_rows[..., :, None] & in_columns[..., None, :]


class TimeMasking(_BlockMasking):
    """Target and context blocks along time only, over the entire spectrum (section 3.2).

    A block's length is a share of the time patches drawn uniformly and rounded, its place uniform;
    all frequency patches of a chosen time belong together.

    Arguments
    ---------
    grid : PatchGrid
    num_targets : int
        Target blocks a clip; they may overlap. Default 4.
    target_share : (float, float)
        Length of a target block as a share of the duration. Default (0.15, 0.2).
    context_share : (float, float)
        Default (0.85, 1.0).
    min_context_patches : int
        Clips left with less draw again. Default 1.

    Raises
    ------
    ValueError
        If a range is empty or the targets leave too little context in most draws.

    Example
    -------
    >>> masks = TimeMasking(PatchGrid(frames=208))(batch_size=4).clip(0)
    >>> times = masks.target_index % 13
    >>> bool((times.unique(return_counts=True)[1] == 5).all())
    True
    """

    def __init__(
        self,
        grid: PatchGrid,
        num_targets: int = 4,
        target_share: tuple[float, float] = (0.15, 0.2),
        context_share: tuple[float, float] = (0.85, 1.0),
        min_context_patches: int = 1,
    ):
        super().__init__(grid, num_targets, target_share, context_share, min_context_patches)

    def _draw_blocks(self, blocks, share, uniform, role):
        rows, columns = self.grid.frequency_patches, self.grid.time_patches
        lengths = (uniform(*share, blocks) * columns).round().long().clamp(min=1)
        return _spans(lengths, columns, uniform)[..., None, :].expand(-1, -1, rows, -1)
