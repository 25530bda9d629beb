"""Validation during pretraining: batches kept in memory, statistics summed over all processes."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader

from speechbrain_jepa.data.crops import CropBatch
from speechbrain_jepa.jepa import JEPAOutput
from speechbrain_jepa.masking import PatchMasks
from speechbrain_jepa.monitors import PatchStatistics, effective_rank_of_gram, gram_matrix
from speechbrain_jepa.vit import Encoder

MONITORED_PATCHES = 4096  # of the validation set, about: their embeddings give the effective rank


class KeptBatches:
    """The batches of a loader, read and decoded once; later rounds take them from memory.

    A crop of 2.1 s takes 134 kB: 1024 of them 137 MB, over all processes.

    Arguments
    ---------
    loader : DataLoader
        Of `CropBatch`es that are the same in every round. It is let go after the first.
    """

    def __init__(self, loader: DataLoader):
        self.loader: DataLoader | None = loader
        self.batches: list[CropBatch] = []
        self.length = len(loader)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[CropBatch]:
        if self.loader is None:
            yield from self.batches
            return
        batches = []
        for batch in self.loader:
            batches.append(replace(batch, failures=[]))  # reported once
            yield batch
        self.batches, self.loader = batches, None


class Validation:
    """One round's sums, on the device of the encoder, until `results` reduces them.

    The effective rank is that of the context encoder's view of the first `MONITORED_PATCHES` or so
    of the set, about the mean that each patch has over all clips.

    Arguments
    ---------
    encoder : Encoder
        The context encoder.
    parts : sequence of str
        Names of the loss's parts (`JEPAOutput.parts`).
    """

    def __init__(self, encoder: Encoder, parts: tuple[str, ...] = ()):
        self.encoder = encoder
        self.names = ("loss", *parts)
        self.device = encoder.positions.device
        sizes = (encoder.grid.num_patches, encoder.dim, self.device)
        self.targets, self.embeddings = PatchStatistics(*sizes), PatchStatistics(*sizes)
        self.monitored: list[Tensor] = []
        self.losses: list[Tensor] = []

    def add(
        self, spectrogram: Tensor, masks: PatchMasks, output: JEPAOutput, first_clip: int
    ) -> None:
        """A batch, whose first clip is the validation set's clip `first_clip`."""
        losses = {"loss": output.loss, **output.parts}
        self.losses.append(torch.stack([losses[name].detach().double() for name in self.names]))
        self.targets.add(output.targets, masks.predicted_index, output.target_valid)
        embeddings = self.encoder(spectrogram).float()
        num_patches = embeddings.shape[1]
        index = torch.arange(num_patches, device=self.device).expand(len(embeddings), -1)
        self.embeddings.add(embeddings, index)
        wanted = math.ceil(MONITORED_PATCHES / num_patches) - first_clip
        if wanted > 0:
            self.monitored.append(embeddings[:wanted])

    def results(self) -> tuple[dict[str, float], dict[str, float]]:
        """The loss and its parts, means over finite batches; and the monitors.

        The same on every process: all of them call it, whether they had batches or not.
        """
        empty = torch.zeros(0, len(self.names), dtype=torch.float64, device=self.device)
        losses = torch.stack(self.losses) if self.losses else empty
        finite = losses[:, :1].isfinite()
        total = torch.where(finite, losses, 0.0).sum(0)
        count = finite.sum().double()
        for statistics in (self.targets, self.embeddings):
            for tensor in (statistics.count, statistics.total, statistics.squares):
                _sum_over_processes(tensor)
        mean = self.embeddings.mean()
        gram = torch.zeros(len(mean.T), len(mean.T), dtype=mean.dtype, device=self.device)
        for embeddings in self.monitored:
            gram += gram_matrix((embeddings - mean).flatten(0, 1))
        for tensor in (total, count, gram):
            _sum_over_processes(tensor)
        monitors = {
            "target_deviation": self.targets.deviation(),
            "embedding_deviation": self.embeddings.deviation(),
            "embedding_rank": effective_rank_of_gram(gram),
        }
        return dict(zip(self.names, (total / count).tolist())), monitors


def _sum_over_processes(tensor: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
