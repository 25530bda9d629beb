"""Linear probes of frozen features, many trained together.

A trial is one training: a layer, a division of the clips (fold and seed). Its variants are learning
rates and weight decays, or penalties, of which validation chooses one.

protocol    settings of a probe, its trials and their results
bank        features and labels that trials read from, standardised
adam        the paper's probe and the sweep: trials and variants are batch axes of one linear model
logistic    logistic regression by L-BFGS
neighbours  nearest neighbours
metrics     accuracy, average precision, recall of each class
workers     threads

Shapes: R trials, V variants, B rows of a batch, K classes, C dims, n clips.
"""

from collections.abc import Sequence

import torch

from speechbrain_jepa.evaluation.labelled import Features, LabelledClips
from speechbrain_jepa.evaluation.linear_probe.adam import train_adam
from speechbrain_jepa.evaluation.linear_probe.bank import Bank
from speechbrain_jepa.evaluation.linear_probe.logistic import train_logistic
from speechbrain_jepa.evaluation.linear_probe.neighbours import add_neighbours
from speechbrain_jepa.evaluation.linear_probe.protocol import (
    PAPER,
    VERSION,
    Outcome,
    Protocol,
    Trial,
)

__all__ = ["VERSION", "Outcome", "Protocol", "Trial", "probe"]


def probe(
    features: Features,
    clips: LabelledClips,
    seeds: Sequence[int] = (0,),
    protocol: Protocol = PAPER,
    device: str | torch.device = "cpu",
) -> list[Outcome]:
    """Probe every layer, fold and seed.

    Arguments
    ---------
    features : Features
    clips : LabelledClips
    seeds : sequence of int
        Of initial weights, order of batches, and where the data set names no validation clips,
        of their choice.
    protocol : Protocol
    device : str or torch.device

    Returns
    -------
    list of Outcome
        By layer, seed, fold.

    Raises
    ------
    ValueError
        If there is one class only.

    Example
    -------
    >>> import numpy as np
    >>> number = np.arange(90)
    >>> x = np.random.default_rng(0).normal(size=(1, 90, 8)) + 9 * np.eye(3, 8)[number % 3]
    >>> features = Features(x.astype(np.float32), np.ones(90, bool), [-1], folder=None)
    >>> names, labels = number.astype(str).tolist(), (number % 3).astype(str).tolist()
    >>> clips = LabelledClips(names, names, labels, [""] * 90, (number % 5).tolist())
    >>> [outcome.score for outcome in probe(features, clips, protocol=Protocol("logistic"))]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if len(clips.classes) < 2:
        raise ValueError(f"all clips are of class {clips.classes}: a probe needs two or more")
    trials = [
        Trial(layer, seed, rows)
        for layer in range(len(features.array))
        for seed in seeds
        for rows in clips.divide(seed, features.usable)
    ]
    bank = Bank(features.array, clips.targets, protocol, torch.device(device))
    train = train_logistic if protocol.probe == "logistic" else train_adam
    outcomes = train(bank, trials, protocol)
    if protocol.neighbours and not clips.multilabel:
        add_neighbours(bank, outcomes, protocol.neighbours)
    return outcomes
