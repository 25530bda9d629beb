"""Learning rate and EMA rate as functions of the optimiser step. They hold no state."""

import math


class WarmupCosine:
    """Linear warm-up from near 0, then a cosine down to `final_rate`.

    Arguments
    ---------
    peak_rate : float
        The learning rate at the end of the warm-up.
    warmup_share : float
        Share of all steps spent warming up. Default 20 / 300, the published epochs.
    final_rate : float
        Default 0.

    Example
    -------
    >>> rate = WarmupCosine(peak_rate=1.0, warmup_share=0.1)
    >>> [round(rate(step, total_steps=100), 3) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, peak_rate: float, warmup_share: float = 20 / 300, final_rate: float = 0.0):
        if not 0 <= warmup_share < 1:
            raise ValueError(f"warmup_share={warmup_share}: must be at least 0 and below 1")
        if not 0 <= final_rate <= peak_rate:
            raise ValueError(f"final_rate={final_rate} must lie between 0 and {peak_rate}")
        self.peak_rate = peak_rate
        self.warmup_share = warmup_share
        self.final_rate = final_rate

    def __call__(self, step: int, total_steps: int) -> float:
        """The rate of optimiser step `step`, counted from 0, of `total_steps`."""
        warmup = round(self.warmup_share * total_steps)
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_rate + (self.peak_rate - self.final_rate) * cosine


def warmup_share(warmup_epochs: float, number_of_epochs: float) -> float:
    """The share of a run that `warmup_epochs` of its `number_of_epochs` are, for `WarmupCosine`.

    Raises
    ------
    ValueError
        If the warm-up is not shorter than the run.

    Example
    -------
    >>> warmup_share(warmup_epochs=30, number_of_epochs=300)
    0.1
    """
    if not 0 <= warmup_epochs < number_of_epochs:
        raise ValueError(
            f"warmup_epochs={warmup_epochs} must be at least 0 and below "
            f"number_of_epochs={number_of_epochs}: --warmup_epochs {number_of_epochs / 15:.2g} "
            "keeps the published 20 of 300"
        )
    return warmup_epochs / number_of_epochs


class LinearRamp:
    """From `start` at the first step to `end` at the last: the EMA rate tau of equation 1.

    The released code's 0.99995 to 0.99999 suits a 300-epoch AudioSet run. A run of a few thousand
    steps needs far less (0.99 to 0.9999, say), or the target encoder never leaves its
    initialisation.

    Arguments
    ---------
    start, end : float
        EMA rates, each in [0, 1].

    Example
    -------
    >>> rate = LinearRamp(start=0.9, end=1.0)
    >>> [round(rate(step, total_steps=11), 3) for step in (0, 5, 10)]
    [0.9, 0.95, 1.0]
    """

    def __init__(self, start: float, end: float):
        for name, value in {"start": start, "end": end}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"EMA rate {name}={value}: must lie in [0, 1]")
        self.start = start
        self.end = end

    def __call__(self, step: int, total_steps: int) -> float:
        """The rate of optimiser step `step`, counted from 0, of `total_steps`."""
        progress = min(step / max(total_steps - 1, 1), 1.0)
        return self.start + (self.end - self.start) * progress
