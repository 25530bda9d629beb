"""Linear probes of frozen features, many trained together.

A trial is one training: a layer, a division of the clips (fold and seed). Its variants are learning
rates and weight decays. Trials and variants are the batch axes of one linear model: what they share
(rows, products, Python) is paid once, and each comes out as if it had been trained alone.

Shapes: R trials, V variants, B rows of a batch, K classes, C dims, n clips.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from speechbrain_jepa.evaluation.labelled import LabelledClips, Rows
from speechbrain_jepa.evaluation.store import Features

PROBES = ("paper", "sweep", "logistic")
BLOCK_ROWS = 8192  # of the features that are standardised at once
DEVIATION_FLOOR = 1e-6  # a feature that varies less is taken for constant, and ignored
CACHE_BYTES = 16e6  # of weights and moments that a thread keeps at hand
HISTORY = 10  # of L-BFGS
INIT, ORDER = 0, 1  # what random numbers are for


@dataclass(frozen=True)
class Protocol:
    """How a probe is trained. The defaults are the paper's (EVAR's).

    Arguments
    ---------
    probe : str
        "paper" (default): Adam with the one learning rate. "sweep": every pair of `learning_rates`
        and `weight_decays`; the best on validation is taken, of equals the one with the smaller
        loss. "logistic": logistic regression by
        L-BFGS, the best of `inverse_penalties` on validation.
    learning_rate : float
        Default 3e-5.
    batch_size : int
        Or all training clips, where there are fewer. Default 200.
    epochs : int
        At most. Default 200.
    patience : int
        Epochs without a better validation score that end a training. Default 20.
    learning_rates, weight_decays : sequence of float
        Of "sweep". The decay is AdamW's.
    inverse_penalties : sequence of float
        Of "logistic": scikit-learn's C, on standardised features.
    max_iterations : int
        Of "logistic". Default 300.
    neighbours : int
        k of the nearest-neighbour classifier; 0: none. Default 10.
    precision : str
        Of the products in training, "bf16" or "fp32"; "auto" (default): bf16 where the machine
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
    precision: str = "auto"
    memory_gb: float | None = None

    def __post_init__(self):
        if self.probe not in PROBES:
            raise ValueError(f"probe={self.probe!r}: choose one of {', '.join(PROBES)}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"probe_precision={self.precision!r}: choose auto, bf16 or fp32")
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
    """What became of a trial.

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


def probe(
    features: Features,
    clips: LabelledClips,
    seeds: Sequence[int] = (0,),
    protocol: Protocol = Protocol(),
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
    bank = _Bank(features.array, clips.targets, protocol, torch.device(device))
    train = _logistic if protocol.probe == "logistic" else _adam
    outcomes = train(bank, trials, protocol)
    if protocol.neighbours and not clips.multilabel:
        _add_neighbours(bank, outcomes, protocol.neighbours)
    return outcomes


# Features


@dataclass(frozen=True)
class _Scale:
    """Standardisation by the statistics of some rows of a layer."""

    layer: int
    rows: np.ndarray
    mean: Tensor  # [C]
    scale: Tensor  # [C], one over the deviation; 0 for constant features


class _Bank:
    """The features and labels that trials read from."""

    def __init__(self, array, targets: Tensor, protocol, device):
        self.array, self.device = array, device
        self.targets = targets.to(device)
        self.num_classes = int(targets.max()) + 1 if targets.dim() == 1 else targets.shape[1]
        self.multilabel = targets.dim() == 2
        self.dims = array.shape[-1]
        self.dtype = _product_dtype(protocol.precision, device)
        self.memory = _memory(device) if protocol.memory_gb is None else protocol.memory_gb * 1e9
        self._scales: dict[tuple, _Scale] = {}
        self._matrices: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()
        self._lock = Lock()

    def scale(self, layer: int, rows: np.ndarray) -> _Scale:
        """The standardisation by these rows, measured once."""
        key = (layer, rows.tobytes())
        if key not in self._scales:
            self._scales[key] = _Scale(layer, rows, *self._statistics(layer, rows))
        return self._scales[key]

    def scale_of(self, trial: Trial) -> _Scale:
        """The trial's own standardisation: by its training clips."""
        return self.scale(trial.layer, trial.rows.train)

    def _read(self, layer: int, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.array[layer][rows]).to(self.device).float()

    def _statistics(self, layer: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and one over the deviation of each feature, merged over blocks of rows."""
        count, mean, squares = 0, 0.0, 0.0
        for start in range(0, len(rows), BLOCK_ROWS):
            block = self._read(layer, rows[start : start + BLOCK_ROWS])
            block_mean = block.mean(0)
            total = count + len(block)
            difference = block_mean.double() - mean
            squares = squares + block.sub_(block_mean).square_().sum(0).double()
            squares = squares + difference.square() * (count * len(block) / total)
            mean = mean + difference * (len(block) / total)
            count = total
        deviation = (squares / count).sqrt()
        constant = deviation <= DEVIATION_FLOOR * (1 + mean.abs())
        scale = torch.where(constant, 0.0, 1 / deviation.clamp(min=1e-30))
        return mean.float(), scale.float()

    def standardised(self, scale: _Scale, rows: np.ndarray) -> Tensor:
        """Features [rows, C], float32."""
        return self._read(scale.layer, rows).sub_(scale.mean).mul_(scale.scale)

    def blocks(self, scale: _Scale, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [b, C], float32, and targets of rows, some at a time."""
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            yield self.standardised(scale, part), self.targets[part]

    def kept_blocks(self, scale: _Scale, rows: np.ndarray, memory: float):
        """`blocks`, to be gone through many times: kept if they fit, else read again."""
        if len(rows) * self.dims * 4 <= memory:
            return list(self.blocks(scale, rows))
        return _Again(self, scale, rows)

    def train_matrix(self, trial: Trial) -> Tensor:
        """The trial's training clips [rows, C], standardised, in the dtype of products.

        Trials of the same clips get the same tensor. It lasts as long as one of them keeps it.
        """
        scale = self.scale_of(trial)
        key = (scale.layer, scale.rows.tobytes())
        with self._lock:
            if (matrix := self._matrices.get(key)) is None:
                shape = (len(scale.rows), self.dims)
                matrix = torch.empty(shape, dtype=self.dtype, device=self.device)
                for part, (block, _) in zip(
                    matrix.split(BLOCK_ROWS), self.blocks(scale, scale.rows)
                ):
                    part.copy_(block)
                self._matrices[key] = matrix
        return matrix

    def train_bytes(self, trials: Sequence[Trial]) -> int:
        """Of the different matrices of these trials."""
        rows = {(trial.layer, trial.rows.train.tobytes()): trial.rows.train for trial in trials}
        return sum(map(len, rows.values())) * self.dims * self.dtype.itemsize

    def logits(self, blocks, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [b, V, K] and targets, with weights [V, K, C] and biases [V, K]."""
        for x, y in blocks:
            yield (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]) + bias, y

    def losses(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of each variant [V], summed over clips; its gradient, as the logits."""
        if self.multilabel:
            y = y[:, None].expand_as(logits)
            losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
            return losses.sum((0, 2)).double(), logits.sigmoid() - y
        log_probability = logits.log_softmax(-1)
        index = y[:, None, None].expand(*logits.shape[:2], 1)
        losses = -log_probability.gather(-1, index).sum((0, 2))
        gradient = log_probability.exp_()
        gradient.scatter_add_(-1, index, gradient.new_full((), -1.0).expand(index.shape))
        return losses.double(), gradient

    def scores(self, blocks, weight: Tensor, bias: Tensor) -> Tensor:
        """Accuracy or mean average precision of each variant [V]."""
        if self.multilabel:
            logits, targets = map(torch.cat, zip(*self.logits(blocks, weight, bias)))
            precisions = average_precision(logits, targets[:, None].expand_as(logits))
            return precisions.nanmean(-1)
        hits = count = 0
        for logits, y in self.logits(blocks, weight, bias):
            hits = hits + (logits.argmax(-1) == y[:, None]).sum(0)
            count += len(y)
        return hits / count

    def total_losses(self, blocks, weight: Tensor, bias: Tensor) -> Tensor:
        """Cross entropy of each variant [V], summed over clips."""
        return sum(self.losses(*pair)[0] for pair in self.logits(blocks, weight, bias))

    def outcome(self, trial: Trial, valid_score, variant: dict, epochs, weight, bias) -> Outcome:
        """Test the chosen variant, of weight [K, C] and bias [K]."""
        blocks = self.blocks(self.scale_of(trial), trial.rows.test)
        logits, targets = map(
            torch.cat,
            zip(*((out[:, 0], y) for out, y in self.logits(blocks, weight[None], bias[None]))),
        )
        predictions = np.empty(0, np.int64)
        if self.multilabel:
            class_scores = average_precision(logits, targets)
            score = class_scores.nanmean()
        else:
            found = logits.argmax(-1)
            hit = (found == targets).double()
            per_class = [torch.bincount(targets, w, self.num_classes) for w in (hit, None)]
            class_scores = per_class[0] / per_class[1]
            score = hit.mean()
            predictions = found.cpu().numpy()
        return Outcome(
            trial,
            float(score),
            float(valid_score),
            variant,
            int(epochs),
            predictions,
            class_scores.cpu().numpy(),
            weight=weight.cpu(),
            bias=bias.cpu(),
        )


@dataclass(frozen=True)
class _Again:
    bank: _Bank
    scale: _Scale
    rows: np.ndarray

    def __iter__(self):
        return self.bank.blocks(self.scale, self.rows)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class.

    Arguments
    ---------
    scores, targets : Tensor [n, ..., K]
        Targets are 0 or 1.

    Returns
    -------
    Tensor [..., K]
        NaN for classes without a clip.

    Example
    -------
    >>> scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    >>> average_precision(scores, torch.tensor([[1.0], [0.0], [1.0], [0.0]]))  # (1 + 2/3) / 2
    tensor([0.8333])
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order)
    rank = torch.arange(1, len(hits) + 1, device=hits.device).view(-1, *[1] * (hits.dim() - 1))
    return (hits.cumsum(0) / rank * hits).sum(0) / hits.sum(0)


def _product_dtype(precision: str, device: torch.device) -> torch.dtype:
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return (
        torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32
    )


def _memory(device: torch.device) -> float:
    """Bytes that features may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


# Adam, many trials and variants together


def _adam(bank: _Bank, trials: list[Trial], protocol: Protocol) -> list[Outcome]:
    """Train all trials in groups that fit; groups run beside each other on a CPU."""
    groups = _groups(bank, trials, protocol)
    threads = min(torch.get_num_threads(), len(groups)) if bank.device.type == "cpu" else 1
    outcomes = {}
    with _workers(threads) as run:
        train = partial(_train_group, bank, protocol, bank.memory / 2 / threads)
        for finished in run(train, groups):
            outcomes.update((id(outcome.trial), outcome) for outcome in finished)
    return [outcomes[id(trial)] for trial in trials]


@contextmanager
def _workers(threads: int):
    """A map over threads, each with one thread of its own for the products."""
    if threads < 2:
        yield map
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)


def _groups(bank: _Bank, trials: list[Trial], protocol: Protocol) -> list[list[Trial]]:
    """Cut the trials into groups: small enough for the caches of a CPU or the memory of a GPU."""
    weights = len(protocol.variants) * bank.num_classes * bank.dims * 4
    on_cpu = bank.device.type == "cpu"
    rows = 2 * protocol.batch_size * bank.dims * 4 + bank.train_bytes(trials[:1])
    size = CACHE_BYTES // (3 * weights) if on_cpu else bank.memory // (8 * weights + rows)
    count = -(-len(trials) // max(int(size), 1))
    if on_cpu:  # as many for each thread
        threads = torch.get_num_threads()
        count = min(-(-count // threads) * threads, len(trials))
    bounds = [len(trials) * number // count for number in range(count + 1)]
    return [trials[start:stop] for start, stop in pairwise(bounds)]


def _random(trial: Trial, stream: int, epoch: int = 0) -> np.random.Generator:
    """Random numbers that belong to a seed, fold and epoch, whatever is trained beside."""
    place = [0, trial.rows.fold or 0, epoch, 0]
    return np.random.Generator(np.random.Philox(key=[trial.seed % 2**64, stream], counter=place))


def _train_group(*arguments) -> list[Outcome]:
    return _Group(*arguments).train()


class _Group:
    """Trials that are trained together; those with the most batches an epoch come first."""

    def __init__(
        self,
        bank: _Bank,
        protocol: Protocol,
        memory: float,
        trials: list[Trial],
    ):
        self.bank, self.protocol = bank, protocol
        self.trials = sorted(trials, key=lambda trial: -self._batches(trial))
        self.valid = {
            id(trial): bank.kept_blocks(
                bank.scale_of(trial), trial.rows.valid, memory / 2 / len(self.trials)
            )
            for trial in self.trials
        }
        self.train_rows = None  # or, where they fit, the training clips of each trial
        if bank.train_bytes(self.trials) <= memory / 2:
            self.train_rows = {id(trial): bank.train_matrix(trial) for trial in self.trials}
        self.buffers: dict[str, Tensor] = {}
        variants = len(protocol.variants)
        bound = 1 / math.sqrt(bank.dims)  # as torch.nn.Linear begins
        shape = (bank.num_classes, bank.dims + 1)
        start = [_random(trial, INIT).uniform(-bound, bound, shape) for trial in self.trials]
        start = torch.from_numpy(np.stack(start)).float().to(bank.device)[:, None]
        weight, bias = start[..., :-1], start[..., -1]
        # [R, V, K, C] and [R, V, K], each followed by Adam's two moments
        self.weight = [weight.repeat(1, variants, 1, 1)]
        self.bias = [bias.repeat(1, variants, 1)]
        for values in (self.weight, self.bias):
            values += [torch.zeros_like(values[0]) for _ in range(2)]
            values += [torch.zeros(values[0].shape[:2], device=bank.device)]  # steps
        self.best_weight, self.best_bias = self.weight[0].clone(), self.bias[0].clone()
        self.best = torch.full((len(self.trials), variants), -1.0, device=bank.device)
        self.best_loss = torch.full_like(self.best, math.inf)
        self.waited = torch.zeros_like(self.best)
        self.epochs = torch.zeros_like(self.best)
        self._list_parameters()

    def _batch_size(self, trial: Trial) -> int:
        return min(self.protocol.batch_size, len(trial.rows.train))

    def _batches(self, trial: Trial) -> int:
        return -(-len(trial.rows.train) // self._batch_size(trial))

    def _list_parameters(self) -> None:
        """For each variant, what its optimiser sees: weights, biases and their states by trial."""
        self.parameters = [
            [
                [tensor.unbind(0) for tensor in (x[:, v] for x in values)]
                for v in range(self.best.shape[1])
            ]
            for values in (self.weight, self.bias)
        ]

    def _buffer(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory to write into: fresh memory at every step costs more than some of the products."""
        size = math.prod(shape)
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.bank.device)
        return self.buffers[name][:size].view(shape)

    def train(self) -> list[Outcome]:
        """All epochs; a trial whose variants have all stopped leaves the group."""
        outcomes = []
        for epoch in range(self.protocol.epochs):
            self._epoch(epoch)
            self._validate()
            stopped = (self.waited >= self.protocol.patience).all(1).tolist()
            if epoch + 1 == self.protocol.epochs:
                stopped = [True] * len(stopped)
            outcomes += [self._outcome(row) for row, done in enumerate(stopped) if done]
            self._keep([row for row, done in enumerate(stopped) if not done])
            if not self.trials:
                break
        return outcomes

    def _epoch(self, epoch: int) -> None:
        """One pass over each trial's training clips, in its own order."""
        sizes = [self._batch_size(trial) for trial in self.trials]
        orders = [
            torch.from_numpy(_random(trial, ORDER, epoch).permutation(len(trial.rows.train)))
            for trial in self.trials
        ]
        parts = [order.split(size) for order, size in zip(orders, sizes)]
        steps = (
            [part[step] for part in parts if step < len(part)] for step in range(len(parts[0]))
        )
        for x, y, counts in _ahead(map(self._batch, steps), self.train_rows is None):
            self._step(x, y, counts)

    def _batch(self, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [R, B, C], targets [R, B(, K)] and counts [R] of the first R trials."""
        counts = torch.tensor([len(part) for part in rows])
        trials = self.trials[: len(rows)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        places = [trial.rows.train[part] for trial, part in zip(trials, padded.numpy())]
        y = self.bank.targets[torch.from_numpy(np.stack(places)).to(self.bank.device)]
        if self.train_rows is None:
            x = torch.stack([self._from_disk(*pair) for pair in zip(trials, places)])
        else:
            x = self._buffer("rows", self.bank.dtype, *padded.shape, self.bank.dims)
            for out, trial, part in zip(x, trials, padded.to(self.bank.device)):
                torch.index_select(self.train_rows[id(trial)], 0, part, out=out)
        return x, y, counts.to(self.bank.device)

    def _from_disk(self, trial: Trial, rows: np.ndarray) -> Tensor:
        """Rows in the order of the disk, then in their own."""
        distinct, place = np.unique(rows, return_inverse=True)
        x = self.bank.standardised(self.bank.scale_of(trial), distinct).to(self.bank.dtype)
        return x[torch.from_numpy(place).to(x.device)]

    def _step(self, x: Tensor, y: Tensor, counts: Tensor) -> None:
        """One step of Adam for the first R trials."""
        count, size = x.shape[:2]
        weight, bias = self.weight[0][:count], self.bias[0][:count, ..., None]
        used = self._buffer("used", x.dtype, count, *weight.flatten(1, 2).shape[1:])
        used.copy_(weight.flatten(1, 2))  # [R, VK, C]
        product = torch.bmm(used, x.transpose(1, 2))
        logits = product.view(*weight.shape[:3], size).float() + bias  # [R, V, K, B]
        if self.bank.multilabel:
            gradient = (logits.sigmoid() - y.transpose(1, 2)[:, None]) / logits.shape[2]
        else:
            gradient = logits.softmax(2)
            index = y[:, None, None].expand(-1, logits.shape[1], 1, -1)
            gradient.scatter_add_(2, index, gradient.new_full((), -1.0).expand(index.shape))
        present = torch.arange(size, device=x.device) < counts[:, None]
        gradient *= (present / counts[:, None])[:, None, None]
        flat = gradient.flatten(1, 2)
        total = flat.sum(-1, keepdim=True)
        change = torch.bmm(flat.to(x.dtype), x, out=used)  # the weights are done with
        change = self._buffer("change", torch.float32, *change.shape).copy_(change)
        pairs = (change.view_as(weight), total.view(weight.shape[:3]))
        for v, variant in enumerate(self.protocol.variants):
            decays = (variant["weight_decay"], 0.0)
            for lists, gradients, decay in zip(self.parameters, pairs, decays):
                values, first, second, steps = (list(tensors[:count]) for tensors in lists[v])
                adamw(
                    values,
                    list(gradients[:, v].unbind(0)),
                    first,
                    second,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=variant["learning_rate"],
                    weight_decay=decay,
                    eps=1e-8,
                    maximize=False,
                )

    def _validate(self) -> None:
        """Score every variant, keep the best weights, count epochs without a better score."""
        scores = self._on_valid(self.bank.scores)
        running = self.waited < self.protocol.patience
        better = scores > self.best
        if self.protocol.probe == "sweep":  # of equals, the one with the smaller loss
            losses = self._on_valid(self.bank.total_losses)
            better |= (scores == self.best) & (losses < self.best_loss)
            self.best_loss = torch.where(better & running, losses, self.best_loss)
        better &= running
        self.best = torch.where(better, scores, self.best)
        self.waited = torch.where(better, 0.0, self.waited + running)
        self.epochs += running
        for row, variant in better.nonzero().tolist():
            self.best_weight[row, variant] = self.weight[0][row, variant]
            self.best_bias[row, variant] = self.bias[0][row, variant]

    def _on_valid(self, measure) -> Tensor:
        """Scores or losses of all variants on validation, [R, V]."""
        values = [
            measure(self.valid[id(trial)], weight, bias)
            for trial, weight, bias in zip(self.trials, self.weight[0], self.bias[0])
        ]
        return torch.stack(values).float()

    def _outcome(self, row: int) -> Outcome:
        pairs = zip(self.best[row].tolist(), (-self.best_loss[row]).tolist())
        chosen = max(enumerate(pairs), key=lambda pair: pair[1])[0]
        return self.bank.outcome(
            self.trials[row],
            self.best[row, chosen],
            self.protocol.variants[chosen],
            self.epochs[row, chosen],
            self.best_weight[row, chosen],
            self.best_bias[row, chosen],
        )

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.trials):
            return
        self.trials = [self.trials[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.bank.device)
        self.weight = [values[index] for values in self.weight]
        self.bias = [values[index] for values in self.bias]
        for name in (
            *("best_weight", "best_bias", "best", "best_loss"),
            *("waited", "epochs"),
        ):
            setattr(self, name, getattr(self, name)[index])
        self._list_parameters()


def _ahead(items: Iterable, in_background: bool) -> Iterator:
    """The items, the next of which is being made in a thread while one is used."""
    if not in_background:
        yield from items
        return
    items = iter(items)
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, items, None)
            yield item


# Logistic regression


def _logistic(bank: _Bank, trials: list[Trial], protocol: Protocol) -> list[Outcome]:
    """All penalties of a trial together; trials of the same clips once."""
    same: dict[tuple, list[Trial]] = {}
    for trial in trials:
        key = (trial.layer, trial.rows.train.tobytes(), trial.rows.valid.tobytes())
        same.setdefault(key, []).append(trial)
    threads = min(torch.get_num_threads() if bank.device.type == "cpu" else 1, len(same))
    outcomes = {}
    with _workers(threads) as run:
        fit = partial(_fit_logistic, bank, protocol, bank.memory / threads)
        for group, outcome in zip(same.values(), run(fit, [group[0] for group in same.values()])):
            outcomes.update((id(trial), replace(outcome, trial=trial)) for trial in group)
    return [outcomes[id(trial)] for trial in trials]


def _fit_logistic(bank: _Bank, protocol: Protocol, memory: float, trial: Trial) -> Outcome:
    """Minimise mean cross entropy + |weight|^2 / (2 C n) for each C, from zero."""
    scale = bank.scale_of(trial)
    count = len(scale.rows)
    blocks = bank.kept_blocks(scale, scale.rows, memory / 2)
    basis = None
    if count < bank.dims and isinstance(blocks, list):
        # the optimum is spanned by the rows: the same problem in fewer dims
        basis = torch.linalg.qr(torch.cat([x for x, _ in blocks]).T)[0]  # [C, n]
        blocks = [(x @ basis, y) for x, y in blocks]
    dims = bank.dims if basis is None else count
    penalties = [1 / (variant["inverse_penalty"] * count) for variant in protocol.variants]
    penalties = torch.tensor(penalties, device=bank.device)
    shape = (len(penalties), bank.num_classes, dims + 1)

    def loss_and_gradient(flat: Tensor) -> tuple[Tensor, Tensor]:
        values = flat.view(shape)
        weight, bias = values[..., :-1], values[..., -1]
        loss = (weight.square().sum((1, 2)) * penalties / 2).double()
        gradient = torch.zeros_like(values)
        gradient[..., :-1] = weight * penalties[:, None, None]
        for (logits, y), (x, _) in zip(bank.logits(blocks, weight, bias), blocks):
            losses, error = bank.losses(logits, y)
            loss += losses / count
            error /= count
            gradient[..., :-1] += (error.flatten(1).T @ x).view_as(weight)
            gradient[..., -1] += error.sum(0)
        return loss, gradient.flatten(1)

    start = torch.zeros(shape, device=bank.device).flatten(1)
    values, iterations = minimise(loss_and_gradient, start, protocol.max_iterations)
    weight, bias = values.view(shape)[..., :-1], values.view(shape)[..., -1]
    if basis is not None:
        weight = weight @ basis.T
    valid = list(bank.blocks(scale, trial.rows.valid))
    scores = bank.scores(valid, weight, bias).tolist()
    losses = bank.total_losses(valid, weight, bias).tolist()
    chosen = max(range(len(scores)), key=lambda v: (scores[v], -losses[v]))
    variant = protocol.variants[chosen]
    return bank.outcome(
        trial, scores[chosen], variant, iterations[chosen], weight[chosen], bias[chosen]
    )


@torch.no_grad()
def minimise(
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Several independent smooth convex problems by L-BFGS, side by side.

    Arguments
    ---------
    loss_and_gradient : callable
        Points [V, P] to losses [V] and gradients [V, P].
    start : Tensor [V, P]
    max_iterations : int
        Default 300.
    tolerance : float
        A problem is solved when no entry of its gradient is larger. Default 1e-4, scikit-learn's.

    Returns
    -------
    points : Tensor [V, P]
    iterations : Tensor [V]

    Example
    -------
    >>> target = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    >>> scale = torch.tensor([[1.0, 9.0], [5.0, 0.3]])
    >>> def quadratic(x):
    ...     return (scale * (x - target) ** 2).sum(1) / 2, scale * (x - target)
    >>> points, iterations = minimise(quadratic, torch.zeros(2, 2))
    >>> bool((points - target).abs().max() < 1e-3)
    True
    """
    point = start.clone()
    loss, gradient = loss_and_gradient(point)
    memory: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
    iterations = torch.zeros(len(start), dtype=torch.long)
    for number in range(max_iterations):
        active = gradient.abs().amax(1) > tolerance
        if not active.any():
            break
        iterations += active.cpu()
        direction = -_inverse_hessian(memory, gradient) * active[:, None]
        slope = (direction * gradient).sum(1)
        step = torch.ones_like(slope)
        if number == 0:
            step = (1 / gradient.abs().sum(1)).clamp(max=1.0)
        for _ in range(20):  # halve the steps that do not descend
            moved = point + step[:, None] * direction
            new_loss, new_gradient = loss_and_gradient(moved)
            slack = 1e-7 * (1 + loss.abs())  # of float32 sums
            enough = new_loss <= loss + 1e-4 * step * slope + slack
            if enough.all():
                break
            step = torch.where(enough, step, step / 2)
        difference, change = moved - point, new_gradient - gradient
        curvature = (difference * change).sum(1)
        weight = torch.where(curvature > 1e-12, 1 / curvature, 0.0)
        memory.append((difference, change, weight))
        point, loss, gradient = moved, new_loss, new_gradient
    return point, iterations


def _inverse_hessian(memory, gradient: Tensor) -> Tensor:
    """The two loops of L-BFGS, for each problem on its own."""
    value = gradient.clone()
    shares = []
    for difference, change, weight in reversed(memory):
        share = weight * (difference * value).sum(1)
        value -= share[:, None] * change
        shares.append(share)
    if memory:
        difference, change, weight = memory[-1]
        squares = change.square().sum(1)
        size = torch.where(weight > 0, (difference * change).sum(1) / squares, 1.0)
        value *= size[:, None]
    for (difference, change, weight), share in zip(memory, reversed(shares)):
        back = weight * (change * value).sum(1)
        value += (share - back)[:, None] * difference
    return value


# Nearest neighbours


def _add_neighbours(bank: _Bank, outcomes: list[Outcome], neighbours: int) -> None:
    """Accuracy of the majority among the nearest training clips by cosine."""
    known: dict[tuple, float] = {}
    for outcome in outcomes:
        trial = outcome.trial
        scale = bank.scale_of(trial)
        key = (trial.layer, trial.rows.train.tobytes(), trial.rows.test.tobytes())
        if key not in known:
            known[key] = _neighbours_score(bank, scale, trial.rows.test, neighbours)
        outcome.neighbours_score = known[key]


def _neighbours_score(bank: _Bank, scale: _Scale, test: np.ndarray, neighbours: int) -> float:
    tests = list(bank.blocks(scale, test))
    nearest: list = [None] * len(tests)
    for train, labels in bank.blocks(scale, scale.rows):
        train = F.normalize(train).T
        for number, (x, _) in enumerate(tests):
            similarity = F.normalize(x) @ train
            best = similarity.topk(min(neighbours, similarity.shape[1]))
            found = best.values, labels[best.indices]
            if nearest[number] is not None:
                found = [torch.cat(pair, 1) for pair in zip(nearest[number], found)]
                best = found[0].topk(min(neighbours, found[0].shape[1]))
                found = best.values, found[1].gather(1, best.indices)
            nearest[number] = found
    hits = 0
    for (similarity, labels), (_, y) in zip(nearest, tests):
        votes = torch.zeros(len(y), bank.num_classes, device=bank.device)
        votes.scatter_add_(1, labels, 1 + 1e-3 * similarity)  # of equals, the nearest
        hits += (votes.argmax(1) == y).sum().item()
    return hits / len(test)
