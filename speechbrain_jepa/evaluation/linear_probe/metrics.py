"""Scores of logits."""

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor


def recalls(predictions: Tensor, targets: Tensor, num_classes: int) -> np.ndarray:
    """Share of each class' clips that are found [K]; NaN for classes without a clip."""
    found = torch.bincount(targets, (predictions == targets).double(), num_classes)
    return (found / torch.bincount(targets, minlength=num_classes)).cpu().numpy()


def average_precisions(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Average precision of each class.

    Arguments
    ---------
    logits, targets : Tensor [n, K]
        Targets are 0 or 1.

    Returns
    -------
    array [K]
        NaN for classes without a clip.

    Example
    -------
    >>> logits = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    >>> average_precisions(logits, torch.tensor([[1], [0], [1], [0]])).round(4)  # (1 + 2/3) / 2
    array([0.8333])
    """
    scores, hits = logits.cpu().numpy(), targets.cpu().numpy()
    found = np.full(hits.shape[1], np.nan)
    present = hits.any(0)
    if present.any():
        found[present] = average_precision_score(hits[:, present], scores[:, present], average=None)
    return found
