"""Adam, many trials and variants together: they are the batch axes of one linear model.

What they share (rows, products, Python) is paid once, and each comes out as if it had been
trained alone. 5 folds of 2000 x 3840 (benchmarks/probe.py, one thread), in CPU seconds against a
loop of plain trainings: the paper's probe 1.9 times as fast, a sweep of 12 variants 6.7 times; with
bfloat16 products 3.5 and 11.6 times.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from speechbrain_jepa.data.crops import random_at
from speechbrain_jepa.evaluation.linear_probe.bank import Bank
from speechbrain_jepa.evaluation.linear_probe.protocol import Outcome, Protocol, Trial
from speechbrain_jepa.evaluation.linear_probe.workers import ahead, beside_each_other

CACHE_BYTES = 16e6  # of weights and moments that a thread keeps at hand
INIT, ORDER = 0, 1  # streams: independent random numbers of one seed


def train_adam(bank: Bank, trials: list[Trial], protocol: Protocol) -> list[Outcome]:
    """Train all trials in groups that fit; groups run beside each other on a CPU."""
    groups = _groups(bank, trials, protocol)
    threads = min(torch.get_num_threads(), len(groups)) if bank.device.type == "cpu" else 1
    memory = bank.memory / 2 / threads

    def train(group: list[Trial]) -> list[Outcome]:
        return _Group(bank, protocol, memory, group).train()

    outcomes = {
        id(outcome.trial): outcome
        for finished in beside_each_other(train, groups, threads)
        for outcome in finished
    }
    return [outcomes[id(trial)] for trial in trials]


def _groups(bank: Bank, trials: list[Trial], protocol: Protocol) -> list[list[Trial]]:
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
    """Random numbers that depend on seed, fold and epoch, and not on the trials of the group."""
    return random_at(trial.seed, stream, trial.rows.fold or 0, epoch)


class _Group:
    """Trials that are trained together; those with the most batches an epoch come first."""

    def __init__(self, bank: Bank, protocol: Protocol, memory: float, trials: list[Trial]):
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
        drawn = [_random(trial, INIT).uniform(-bound, bound, shape) for trial in self.trials]
        start = torch.from_numpy(np.stack(drawn)).float().to(bank.device)[:, None]
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
        batches = map(self._batch, steps)
        for x, y, counts in batches if self.train_rows else ahead(batches):
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
        change = torch.bmm(
            flat.to(x.dtype), x, out=used
        )  # the copy of the weights is not needed again
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
        """Score every variant, keep the best weights, count the epochs since."""
        scores = self._on_valid(self.bank.scores)
        running = self.waited < self.protocol.patience
        if self.protocol.probe == "sweep":  # of equals, the one with the smaller loss
            losses = self._on_valid(self.bank.losses)
            better = (scores > self.best) | ((scores == self.best) & (losses < self.best_loss))
            self.best_loss = torch.where(better & running, losses, self.best_loss)
        else:  # EVAR's rule: of equals, the last
            better = scores >= self.best
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
        for name in ("best_weight", "best_bias", "best", "best_loss", "waited", "epochs"):
            setattr(self, name, getattr(self, name)[index])
        self._list_parameters()
