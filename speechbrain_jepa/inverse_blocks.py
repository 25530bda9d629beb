"""Inverse block masks: the context is a few small blocks, all else is to be predicted."""

import torch

from speechbrain_jepa.masking import PatchMasks, UnstructuredMasking
from speechbrain_jepa.vit import PatchGrid


class InverseBlockMasking:
    """The context is a few small blocks, all other patches are targets (data2vec 2.0, EAT).

    Blocks are laid one after the other until the context is full; of the last one random patches
    are taken. A block's place is uniform over all that overlap the grid, so that a patch at the
    edge is context as often as one in the middle. Every clip has the same number of context
    patches: rows are not ragged. For `masks_per_clip` above 1, with which the papers use it
    (https://arxiv.org/abs/2212.07525, section 3.3; https://arxiv.org/abs/2401.03497, section 3.1).

    Arguments
    ---------
    grid : PatchGrid
    target_share : float
        Share of the patches that are targets. Default 0.8, as in EAT.
    block : (int, int)
        Frequency and time patches of a block. Default (3, 3); EAT has 5 x 5 of 8 x 64 patches.

    Raises
    ------
    ValueError
        If the share leaves no context or no target patch, or a block does not fit into the grid.

    Example
    -------
    >>> masks = InverseBlockMasking(PatchGrid(frames=208))(batch_size=4)
    >>> masks.context_index.shape, masks.target_index.shape
    (torch.Size([4, 13]), torch.Size([4, 52]))
    """

    def __init__(self, grid: PatchGrid, target_share: float = 0.8, block: tuple[int, int] = (3, 3)):
        self.unstructured = UnstructuredMasking(grid, target_share)  # checks the share
        size = (grid.frequency_patches, grid.time_patches)
        if len(block) != 2 or not all(1 <= side <= most for side, most in zip(block, size)):
            raise ValueError(
                f"block={tuple(block)}: needs 1 to {size[0]} frequency and 1 to {size[1]} time "
                "patches"
            )
        self.grid, self.target_share, self.block = grid, target_share, tuple(block)
        self.num_context = self.unstructured.num_context
        # a block overlaps the grid by a patch or more: so many are enough but for rare draws
        self.num_blocks = 4 + 2 * self.num_context

    def __call__(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> PatchMasks:
        """Draw the masks of `batch_size` clips; `generator` must live on `device`."""

        def uniform(*shape):
            return torch.rand(batch_size, *shape, device=device, generator=generator)

        covered = []
        for side, length in zip(self.block, (self.grid.frequency_patches, self.grid.time_patches)):
            places = length + side - 1  # from side - 1 before the grid to its last patch
            first = (uniform(self.num_blocks) * places).long().clamp(max=places - 1) - side + 1
            position = torch.arange(length, device=device)
            covered.append((position >= first[..., None]) & (position < first[..., None] + side))
        blocks = (covered[0][..., :, None] & covered[1][..., None, :]).flatten(2)
        # the number of the first block that covers a patch; after all of them, the patches of none
        first = blocks.byte().argmax(1).masked_fill(~blocks.any(1), self.num_blocks)
        order = (first + uniform(self.grid.num_patches)).argsort(1)
        context, target = order.split([self.num_context, order.shape[1] - self.num_context], 1)
        return PatchMasks(context.sort(1).values, target.sort(1).values)
