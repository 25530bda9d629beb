"""Monitors of a pretraining run: effective rank, deviations, the collapse alarm, metrics.csv."""

import csv
import math
import os
import resource
import sys
import time
from pathlib import Path

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
    singular = torch.linalg.svdvals(embeddings.float())
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(shares).sum().exp().item()


class PatchStatistics:
    """Mean and deviation over clips, for each patch of the grid apart, added up batch by batch.

    Fixed positions enter every token, so representations that tell patches apart and nothing else
    would still differ from each other: only what is compared at the same patch shows a collapse.

    Arguments
    ---------
    num_patches : int

    Example
    -------
    >>> statistics = PatchStatistics(num_patches=2)
    >>> rows = torch.tensor([[[0.0, 7.0], [5.0, 5.0]], [[2.0, 7.0], [5.0, 5.0]]])  # 2 clips
    >>> statistics.add(rows, torch.tensor([[0, 1], [0, 1]]))
    >>> statistics.deviation()  # (1 + 0 + 0 + 0) / 4
    0.25
    """

    def __init__(self, num_patches: int):
        self.count = torch.zeros(num_patches, 1, dtype=torch.float64)
        self.total = self.squares = torch.zeros(num_patches, 0)  # D is known from the first rows

    def add(self, rows: Tensor, index: Tensor) -> None:
        """Representations [..., D] of the patches `index` [...]."""
        rows, index = rows.flatten(0, -2).double().cpu(), index.flatten().cpu()
        if not self.total.numel():
            self.total, self.squares = torch.zeros(2, len(self.count), rows.shape[1]).double()
        self.count.index_add_(0, index, torch.ones(len(index), 1, dtype=torch.float64))
        self.total.index_add_(0, index, rows)
        self.squares.index_add_(0, index, rows.square())

    def mean(self) -> Tensor:
        """Over clips, [N, D]; zero where a patch was never seen."""
        return self.total / self.count.clamp(min=1)

    def deviation(self) -> float:
        """Standard deviation over clips, averaged over features and the patches seen."""
        variance = self.squares / self.count.clamp(min=1) - self.mean().square()
        return variance.clamp(min=0).sqrt()[self.count[:, 0] > 0].mean().item()


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
    """Sums since the last row of metrics.csv."""

    SUMS = ("clips", "steps", "finite", "losses", "waited", "latest")

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Begin with empty sums."""
        self.clips = self.steps = self.finite = 0
        self.waited = self.elapsed = 0.0
        self.losses: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.resume()

    def resume(self) -> None:
        """Go on with the sums as they are: the time since they were saved does not count."""
        self.idle_since = time.perf_counter()
        self.began = self.idle_since - self.elapsed

    def batch_arrived(self) -> None:
        """The next batch is there: the time since the last one was done was spent waiting."""
        self.waited += time.perf_counter() - self.idle_since

    def batch_done(self, clips: int, **losses: float) -> None:
        """A batch of so many clips with its `loss` and that one's parts, if it is finite."""
        self.clips += clips
        if math.isfinite(losses["loss"]):
            self.finite += 1
            for name, value in losses.items():
                self.losses[name] = self.losses.get(name, 0.0) + value
        self.idle_since = time.perf_counter()

    def stepped(self, **latest: float) -> None:
        """An optimiser step, with what is reported of the last one alone."""
        self.steps += 1
        self.latest = latest

    def close(self, world_size: int) -> dict[str, float]:
        """Averages of this interval; the next one begins."""
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
