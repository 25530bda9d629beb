"""Nearest neighbours: what the features say without any training."""

import numpy as np
import torch
from torch.nn import functional as F

from speechbrain_jepa.evaluation.linear_probe.bank import Bank, Scale
from speechbrain_jepa.evaluation.linear_probe.protocol import Outcome


def add_neighbours(bank: Bank, outcomes: list[Outcome], neighbours: int) -> None:
    """Accuracy of the majority among the nearest training clips by cosine."""
    known: dict[tuple, float] = {}
    for outcome in outcomes:
        trial = outcome.trial
        key = (trial.layer, trial.rows.train.tobytes(), trial.rows.test.tobytes())
        if key not in known:
            known[key] = _score(bank, bank.scale_of(trial), trial.rows.test, neighbours)
        outcome.neighbours_score = known[key]


def _score(bank: Bank, scale: Scale, test: np.ndarray, neighbours: int) -> float:
    tests = list(bank.blocks(scale, test))
    nearest: list = [None] * len(tests)
    for train, labels in bank.blocks(scale, scale.rows):
        train = F.normalize(train).T
        for number, (x, _) in enumerate(tests):
            similarity = F.normalize(x) @ train
            best = similarity.topk(min(neighbours, similarity.shape[1]))
            values, votes = best.values, labels[best.indices]
            if nearest[number] is not None:
                pairs = zip(nearest[number], (values, votes))
                values, votes = (torch.cat(pair, 1) for pair in pairs)
                best = values.topk(min(neighbours, values.shape[1]))
                values, votes = best.values, votes.gather(1, best.indices)
            nearest[number] = values, votes
    hits = 0
    for (similarity, labels), (_, y) in zip(nearest, tests):
        votes = torch.zeros(len(y), bank.num_classes, device=bank.device)
        votes.scatter_add_(1, labels, 1 + 1e-3 * similarity)  # of equals, the nearest
        hits += int((votes.argmax(1) == y).sum())
    return hits / len(test)
