"""Monitors of a pretraining run: effective rank, deviations, the collapse alarm, metrics.csv."""

import csv
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechbrain_jepa.files import full_disk_named, whole_file


def effective_rank(embeddings: Tensor) -> float:
    """RankMe: exp of the entropy of the normalised singular values (Garrido et al., 2023, eq. 1).

    Arguments
    ---------
    embeddings : Tensor [n, D]

    Returns
    -------
    float
        Between 1 (all rows on a line) and min(n, D).

    Example
    -------
    >>> round(effective_rank(torch.eye(8)), 3), round(effective_rank(torch.ones(8, 4)), 3)
    (8.0, 1.0)
    """
    return effective_rank_of_gram(gram_matrix(embeddings))


def gram_matrix(rows: Tensor) -> Tensor:
    """[n, D] to [D, D], float64: those of parts of the rows add up to that of all."""
    rows = rows.double()
    return rows.T @ rows


def effective_rank_of_gram(gram: Tensor) -> float:
    """`effective_rank` of the rows whose Gram matrix [D, D] is given, in float64.

    Singular values are the roots of its eigenvalues: a product, which processes can add up, and a
    D x D problem, where an SVD needs all n x D rows in one place.
    """
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


class PatchStatistics:
    """Mean and deviation over clips, for each patch of the grid apart, added up batch by batch.

    Fixed positions enter every token, so representations that tell patches apart and nothing else
    would still differ from each other: only what is compared at the same patch shows a collapse.

    Arguments
    ---------
    num_patches, dim : int
    device : torch.device or str
        Where it adds up, in float64. Default "cpu".

    Example
    -------
    >>> statistics = PatchStatistics(num_patches=2, dim=2)
    >>> rows = torch.tensor([[[0.0, 7.0], [5.0, 5.0]], [[2.0, 7.0], [5.0, 5.0]]])  # 2 clips
    >>> statistics.add(rows, torch.tensor([[0, 1], [0, 1]]))
    >>> statistics.deviation()  # (1 + 0 + 0 + 0) / 4
    0.25
    """

    def __init__(self, num_patches: int, dim: int, device: torch.device | str = "cpu"):
        options: dict[str, Any] = dict(dtype=torch.float64, device=device)
        self.count = torch.zeros(num_patches, 1, **options)
        self.total, self.squares = torch.zeros(2, num_patches, dim, **options)

    def add(self, rows: Tensor, index: Tensor, valid: Tensor | None = None) -> None:
        """Representations [..., D] of the patches `index` [...]; those not `valid` are left out."""
        rows, index = rows.flatten(0, -2).double(), index.flatten()
        counted = torch.ones_like(rows[:, :1])
        if valid is not None:
            counted = valid.flatten()[:, None].to(rows.dtype)
            rows = rows.masked_fill(counted == 0, 0.0)
        self.count.index_add_(0, index, counted)
        self.total.index_add_(0, index, rows)
        self.squares.index_add_(0, index, rows.square())

    def mean(self) -> Tensor:
        """Over clips, [N, D]; zero where a patch was never seen."""
        return self.total / self.count.clamp(min=1)

    def deviation(self) -> float:
        """Standard deviation over clips, averaged over features and the patches seen."""
        variance = self.squares / self.count.clamp(min=1) - self.mean().square()
        seen = self.count > 0
        deviations = torch.where(seen, variance.clamp(min=0).sqrt(), 0.0)
        return (deviations.mean(1).sum() / seen.sum()).item()


class CollapseAlarm:
    """Notices a rank or deviation that falls under a share of its first value.

    A rank is at least 1 and a deviation at least 0, so a value that starts there cannot fall: both
    do with a single validation clip.

    Arguments
    ---------
    share : float
        Default 0.1.

    Example
    -------
    >>> alarm = CollapseAlarm(share=0.1)
    >>> alarm.check({"embedding_rank": 50.0}), alarm.check({"embedding_rank": 40.0})
    ([], [])
    >>> alarm.check({"embedding_rank": 2.0})
    ['embedding_rank fell from 50 to 2']
    >>> alarm = CollapseAlarm(share=0.1)
    >>> alarm.check({"embedding_rank": 8.0}), alarm.blind()
    ([], ['embedding_rank started at 8'])
    """

    def __init__(self, share: float = 0.1):
        if not 0 <= share < 1:
            raise ValueError(f"collapse_share={share}: must be at least 0 (never) and below 1")
        self.share = share
        self.start: dict[str, float] = {}

    def check(self, values: dict[str, float]) -> list[str]:
        """One sentence for each value that has collapsed."""
        fallen = []
        for name, value in values.items():
            start = self.start.setdefault(name, value)
            if not value >= self.share * start:  # NaN counts as fallen
                fallen.append(f"{name} fell from {start:.4g} to {value:.4g}")
        return fallen

    def blind(self) -> list[str]:
        """One clause for each value that started so low that no fall can be noticed."""
        return [
            f"{name} started at {start:.4g}"
            for name, start in self.start.items()
            if self.share * start <= (1.0 if name.endswith("rank") else 0.0)
        ]


class Interval:
    """Sums since the last row of metrics.csv.

    Losses and gradient norms stay on their device, as tensors, until `look` fetches them all: a
    host that waits for each cannot prepare the next step meanwhile.

    Arguments
    ---------
    device : torch.device or str
        Where the steps are computed. What is waited for data is what this device waits: on a CUDA
        device the time between the last kernel of a step and the first of the next. Default "cpu".
    """

    SUMS = ("clips", "steps", "finite", "losses", "waited", "latest")

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.restart()

    def restart(self) -> None:
        """Begin with empty sums."""
        self.clips = self.steps = self.finite = 0
        self.waited = self.elapsed = 0.0
        self.losses: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self._batches: list[dict[str, Tensor]] = []  # not looked at yet: losses by name,
        self._norms: list[Tensor] = []  # gradient norms of the optimiser steps,
        self._gaps: list[tuple] = []  # and when a batch was done and the next one there
        self.resume()

    def pause(self) -> None:
        """What comes until `resume` does not count as time of the interval."""
        self.elapsed = time.perf_counter() - self.began

    def resume(self) -> None:
        """Go on with the sums as they are: the time since `pause`, or a checkpoint, is left out."""
        self.idle_since = _now(self.device)
        self.began = time.perf_counter() - self.elapsed

    def batch_arrived(self) -> None:
        """The next batch is there: the time since the last one was done was spent waiting."""
        self._gaps.append((self.idle_since, _now(self.device)))

    def add(self, clips: int, **losses: Tensor) -> None:
        """A batch of so many clips with its `loss` and that one's parts, which count if finite."""
        self.clips += clips
        self._batches.append({name: loss.detach().float() for name, loss in losses.items()})

    def batch_done(self) -> None:
        """From here on the next batch is waited for."""
        self.idle_since = _now(self.device)

    def stepped(self, gradient_norm: Tensor, **latest: float) -> None:
        """An optimiser step, with what is reported of the last one alone."""
        self.steps += 1
        self.latest = latest
        self._norms.append(gradient_norm.detach().float())

    def look(self) -> list[float]:
        """Wait for the device once, and take what was noted into the sums.

        Returns
        -------
        list of float
            The gradient norm of each optimiser step since the last look.
        """
        noted = [*(loss for batch in self._batches for loss in batch.values()), *self._norms]
        values = iter(torch.stack(noted).tolist() if noted else [])
        for batch in self._batches:
            losses = {name: next(values) for name in batch}
            if math.isfinite(losses["loss"]):
                self.finite += 1
                for name, value in losses.items():
                    self.losses[name] = self.losses.get(name, 0.0) + value
        norms = list(values)
        if norms:
            self.latest["gradient_norm"] = norms[-1]
        self.waited += sum(_seconds(done, arrived) for done, arrived in self._gaps)
        self._batches, self._norms, self._gaps = [], [], []
        return norms

    def close(self, world_size: int) -> dict[str, float]:
        """Averages of this interval, as of the last look; the next one begins."""
        elapsed = time.perf_counter() - self.began
        finite = self.finite or float("nan")
        stats = {
            "loss": float("nan"),
            **{name: value / finite for name, value in self.losses.items()},
            "clips_per_second": self.clips * world_size / elapsed,
            "data_wait": self.waited / elapsed,
            **self.latest,
        }
        self.restart()
        return stats

    def state(self) -> dict:
        """What a checkpoint keeps, so that the next row is that of a run never stopped."""
        elapsed = time.perf_counter() - self.began
        return {name: getattr(self, name) for name in self.SUMS} | {"elapsed": elapsed}

    def load(self, state: dict) -> None:
        """The sums of a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)
        self.resume()


def _now(device: torch.device):
    """A mark on the device's own line of time, which the host does not wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(earlier, later) -> float:
    """Between two marks that the device has passed."""
    if isinstance(earlier, float):
        return later - earlier
    return earlier.elapsed_time(later) / 1000  # in ms


class MetricsTable:
    """A csv of everything logged, one row a report, that a resumed run continues exactly.

    Arguments
    ---------
    path : str or Path
    columns : sequence of str
        "step" first. A row may leave any other column empty.

    Example
    -------
    >>> table = MetricsTable(getfixture("tmp_path") / "metrics.csv", ["step", "loss"])
    >>> for step in (10, 20, 30):
    ...     table.append(step=step, loss=1 / step)
    >>> table.drop_after(20)
    >>> table.append(step=25, loss=0.04)
    >>> [row["step"] for row in table.read()]
    ['10', '20', '25']
    """

    def __init__(self, path: str | os.PathLike, columns):
        self.path = Path(path)
        self.columns = list(columns)

    def read(self) -> list[dict[str, str]]:
        """The whole rows so far, as text: not one that a full disk cut off."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def append(self, **values) -> None:
        """Add a row; unknown names are an error."""
        if not self.path.exists():
            self._rewrite([])
        with (
            full_disk_named(self.path.parent),
            open(self.path, "a", newline="", encoding="utf-8") as file,
        ):
            csv.DictWriter(file, self.columns).writerow(values)

    def drop_after(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again."""
        rows = self.read()
        # columns that this run lacks (the online probe's, say) stay
        self.columns += [name for name in (rows[0] if rows else ()) if name not in self.columns]
        self._rewrite([row for row in rows if int(row["step"]) <= step])

    def _rewrite(self, rows) -> None:
        """All or nothing: what was there stays until the new file is complete."""
        with (
            whole_file(self.path) as partial,
            open(partial, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def peak_memory_gib(device: torch.device | str) -> float:
    """Highest memory so far: allocated on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
