"""The features and labels that trials read from, standardised by each trial's training clips."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from speechbrain_jepa.evaluation.linear_probe import metrics
from speechbrain_jepa.evaluation.linear_probe.protocol import Outcome, Protocol, Trial

BLOCK_ROWS = 8192  # of the features that are standardised at once
DEVIATION_FLOOR = 1e-6  # a feature that varies less is taken for constant, and ignored

Block = tuple[Tensor, Tensor]  # features [b, C], float32, and targets [b] or [b, K]


@dataclass(frozen=True)
class Scale:
    """Standardisation by the statistics of some rows of a layer."""

    layer: int
    rows: np.ndarray
    mean: Tensor  # [C]
    scale: Tensor  # [C], one over the deviation; 0 for constant features


class Bank:
    """Features [L, n, C] in memory or on the disk, and targets [n] or [n, K]."""

    def __init__(self, array, targets: Tensor, protocol: Protocol, device: torch.device):
        self.array, self.device = array, device
        self.targets = targets.to(device)
        self.multilabel = targets.dim() == 2
        self.num_classes = targets.shape[1] if self.multilabel else int(targets.max()) + 1
        self.dims = array.shape[-1]
        self.dtype = _product_dtype(protocol.precision, device)
        self.memory = _memory(device) if protocol.memory_gb is None else protocol.memory_gb * 1e9
        self._scales: dict[tuple, Scale] = {}
        self._matrices: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()
        self._lock = Lock()

    # Reading

    def scale_of(self, trial: Trial) -> Scale:
        """The standardisation by the trial's training clips, measured once."""
        key = (trial.layer, trial.rows.train.tobytes())
        if key not in self._scales:
            statistics = self._statistics(trial.layer, trial.rows.train)
            self._scales[key] = Scale(trial.layer, trial.rows.train, *statistics)
        return self._scales[key]

    def _read(self, layer: int, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.array[layer][rows]).to(self.device).float()

    def _statistics(self, layer: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and one over the deviation of each feature, merged over blocks of rows."""
        count = 0
        mean = squares = torch.zeros(self.dims, dtype=torch.float64, device=self.device)
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

    def standardised(self, scale: Scale, rows: np.ndarray) -> Tensor:
        """Features [rows, C], float32."""
        return self._read(scale.layer, rows).sub_(scale.mean).mul_(scale.scale)

    def blocks(self, scale: Scale, rows: np.ndarray) -> Iterator[Block]:
        """Features and targets of rows, some at a time."""
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            yield self.standardised(scale, part), self.targets[part]

    def kept_blocks(self, scale: Scale, rows: np.ndarray, memory: float) -> Iterable[Block]:
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

    # Testing

    def losses(self, blocks: Iterable[Block], weight: Tensor, bias: Tensor) -> Tensor:
        """Cross entropy of each variant [V], summed over clips."""
        total = weight.new_zeros(len(weight), dtype=torch.float64)
        for logits, y in _logits(blocks, weight, bias):
            if self.multilabel:
                y = y[:, None].expand_as(logits)
                losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum((0, 2))
            else:
                index = y[:, None, None].expand(*logits.shape[:2], 1)
                losses = -logits.log_softmax(-1).gather(-1, index).sum((0, 2))
            total = total + losses.double()
        return total

    def scores(self, blocks: Iterable[Block], weight: Tensor, bias: Tensor) -> Tensor:
        """Accuracy or mean average precision of each variant [V]."""
        if self.multilabel:
            logits, targets = map(torch.cat, zip(*_logits(blocks, weight, bias)))
            precisions = [metrics.average_precisions(x, targets) for x in logits.unbind(1)]
            return torch.tensor(np.nanmean(precisions, 1), device=self.device)
        hits, count = weight.new_zeros(len(weight), dtype=torch.int64), 0
        for logits, y in _logits(blocks, weight, bias):
            hits = hits + (logits.argmax(-1) == y[:, None]).sum(0)
            count += len(y)
        return hits / count

    def outcome(self, trial: Trial, valid_score, variant: dict, epochs, weight, bias) -> Outcome:
        """Test the chosen variant, of weight [K, C] and bias [K]."""
        blocks = self.blocks(self.scale_of(trial), trial.rows.test)
        logits, targets = map(torch.cat, zip(*_logits(blocks, weight[None], bias[None])))
        logits = logits[:, 0]
        if self.multilabel:
            predictions = np.empty(0, np.int64)
            class_scores = metrics.average_precisions(logits, targets)
            score = np.nanmean(class_scores)
        else:
            found = logits.argmax(-1)
            predictions = found.cpu().numpy()
            class_scores = metrics.recalls(found, targets, self.num_classes)
            score = (found == targets).double().mean()
        return Outcome(
            trial,
            float(score),
            float(valid_score),
            variant,
            int(epochs),
            predictions,
            class_scores,
            weight=weight.cpu(),
            bias=bias.cpu(),
        )


@dataclass(frozen=True)
class _Again:
    bank: Bank
    scale: Scale
    rows: np.ndarray

    def __iter__(self):
        return self.bank.blocks(self.scale, self.rows)


def _logits(blocks: Iterable[Block], weight: Tensor, bias: Tensor) -> Iterator[Block]:
    """Logits [b, V, K] and targets, with weights [V, K, C] and biases [V, K]."""
    for x, y in blocks:
        yield (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]) + bias, y


def _product_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        precision = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _memory(device: torch.device) -> float:
    """Bytes that features may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
