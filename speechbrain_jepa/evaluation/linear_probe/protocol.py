"""Settings of a probe, its trials and their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from speechbrain_jepa.evaluation.labelled import Rows

VERSION = 2  # grows when the same protocol gives other scores; 2: ties reset the patience
PROBES = ("paper", "sweep", "logistic")
PRECISIONS = ("fp32", "bf16", "auto")


@dataclass(frozen=True)
class Protocol:
    """How a probe is trained. The defaults are the paper's (EVAR's).

    Arguments
    ---------
    probe : str
        "paper" (default): Adam with the one learning rate. "sweep": every pair of `learning_rates`
        and `weight_decays`; the best on validation is taken, of equals the one with the smaller
        loss. "logistic": logistic regression by L-BFGS, the best of `inverse_penalties` on
        validation, of equals likewise.
    learning_rate : float
        Default 3e-5.
    batch_size : int
        Or all training clips, where there are fewer. Default 200.
    epochs : int
        At most. Default 200.
    patience : int
        Epochs in a row below the best validation score that end a training. Default 20.
    learning_rates, weight_decays : sequence of float
        Of "sweep". The decay is AdamW's.
    inverse_penalties : sequence of float
        Of "logistic": scikit-learn's C, on standardised features.
    max_iterations : int
        Of "logistic". Default 300.
    neighbours : int
        k of the nearest-neighbour classifier; 0: none. Default 10.
    precision : str
        Of the products in training, "fp32" (default), "bf16", or "auto": bf16 where the machine
        multiplies it natively. Weights, optimiser, sums and evaluation are float32 always.
    memory_gb : float or None
        For features in memory; what does not fit is read from the disk batch by batch. None: half
        of what is free.
    """

    probe: str = "paper"
    learning_rate: float = 3e-5
    batch_size: int = 200
    epochs: int = 200
    patience: int = 20
    learning_rates: Sequence[float] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    weight_decays: Sequence[float] = (0.0, 1e-1)
    inverse_penalties: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    max_iterations: int = 300
    neighbours: int = 10
    precision: str = "fp32"
    memory_gb: float | None = None

    def __post_init__(self):
        if self.probe not in PROBES:
            raise ValueError(f"probe={self.probe!r}: choose one of {', '.join(PROBES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"probe_precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}"
            )
        for name in ("batch_size", "epochs", "patience", "max_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def variants(self) -> list[dict]:
        """What is tried and chosen from, by name."""
        if self.probe == "paper":
            return [{"learning_rate": self.learning_rate, "weight_decay": 0.0}]
        if self.probe == "logistic":
            return [{"inverse_penalty": value} for value in self.inverse_penalties]
        return [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in self.learning_rates
            for decay in self.weight_decays
        ]


PAPER = Protocol()


@dataclass(frozen=True)
class Trial:
    """One training.

    Arguments
    ---------
    layer : int
        Index into the features.
    seed : int
    rows : Rows
    """

    layer: int
    seed: int
    rows: Rows


@dataclass
class Outcome:
    """The result of a trial.

    Arguments
    ---------
    trial : Trial
    score : float
        On test, from 0 to 1: accuracy, or mean average precision of multi-label clips.
    valid_score : float
        Of the chosen variant.
    variant : dict
        The chosen one.
    epochs : int
        That it was trained, or iterations.
    predictions : array [test clips], int64
        Class numbers; empty for multi-label.
    class_scores : array [K]
        Recall of each class, or average precision; NaN for classes that test lacks.
    neighbours_score : float or None
        Of the nearest neighbours.
    weight, bias : Tensor [K, C], [K]
        Of the chosen variant, for standardised features.
    """

    trial: Trial
    score: float
    valid_score: float
    variant: dict
    epochs: int
    predictions: np.ndarray
    class_scores: np.ndarray
    neighbours_score: float | None = None
    weight: Tensor | None = field(default=None, repr=False)
    bias: Tensor | None = field(default=None, repr=False)
