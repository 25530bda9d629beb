"""Distances between predicted and target representations (paper, section 3.1).

Every loss takes predictions and targets [B, K, D] and the validity [B, K] of ragged rows. A patch's
distance is averaged over a clip's own targets, then over clips, so that a clip weighs the same
whatever its number of targets and whoever shares its batch. Computed in float32.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchLoss(nn.Module):
    """Mean of a distance between patches; subclasses define `distance`."""

    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Distance of each pair of vectors: [B, K, D], [B, K, D] -> [B, K]."""
        raise NotImplementedError

    def forward(self, predictions: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Arguments
        ---------
        predictions, targets : Tensor [B, K, D]
        valid : Tensor [B, K], bool, or None
            False marks padding, which counts for nothing.

        Returns
        -------
        Tensor, scalar, float32
        """
        distance = self.distance(predictions.float(), targets.float())
        if valid is None:
            return distance.mean()
        own = distance.masked_fill(~valid, 0.0).sum(1) / valid.sum(1)
        return own.mean()


class SmoothL1(PatchLoss):
    """Smooth L1 element by element, averaged over the features: the released code, our default.

    Where the paper's equation 3 takes norms of the whole vector, this compares every feature with
    1 on its own: small differences are squared, large ones absolute, feature by feature.

    Arguments
    ---------
    beta : float
        Where the quadratic part ends. Default 1.

    Example
    -------
    >>> import torch
    >>> SmoothL1()(torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[0.5, 1.0]]]))  # (.125 + 1.5) / 2
    tensor(0.8125)
    """

    def __init__(self, beta: float = 1.0):
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta={beta}: must be positive")
        self.beta = beta

    def distance(self, predictions, targets):
        return F.smooth_l1_loss(predictions, targets, reduction="none", beta=self.beta).mean(-1)


class SmoothL1Norms(PatchLoss):
    """Equation 3 to the letter, with the norms of the whole difference vector.

    d = ||z - z'||_2^2 / 2 where ||z - z'||_1 < 1, else ||z - z'||_1 - 1/2. With 768 standardised
    features the L1 norm is hundreds at the start, so this acts as a plain L1 loss whose gradient
    is D times larger than that of `SmoothL1`; it jumps where the L1 norm crosses 1, since there
    the L2 norm can be smaller than the L1 norm.

    Example
    -------
    >>> import torch
    >>> SmoothL1Norms()(torch.tensor([[[0.5, 3.0]]]), torch.tensor([[[0.0, 1.0]]]))  # 2.5 - 0.5
    tensor(2.)
    """

    def distance(self, predictions, targets):
        difference = predictions - targets
        l1 = difference.abs().sum(-1)
        return (difference.square().sum(-1) / 2).where(l1 < 1, l1 - 0.5)


class NormalizedL2(PatchLoss):
    """2 - 2 cos(z, z'): the squared L2 distance of unit vectors, as in BYOL and M2D.

    Blind to the length of both vectors, which the other two are not.

    Example
    -------
    >>> import torch
    >>> NormalizedL2()(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]]))
    tensor(2.)
    """

    def distance(self, predictions, targets):
        return 2 - 2 * F.cosine_similarity(predictions, targets, dim=-1, eps=1e-8)
