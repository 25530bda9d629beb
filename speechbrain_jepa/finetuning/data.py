"""Labelled clips in batches: the same ones in every run of a seed, and after a resume."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.data.crops import CROPS, ORDER, Key, random_at
from speechbrain_jepa.data.sampler import CropSampler, crop_loader
from speechbrain_jepa.features import N_FFT, SAMPLE_RATE

# Targets of a clip, told its row and where the crop begins and ends, in seconds
TargetOf = Callable[[int, float, float], Tensor]


@dataclass
class LabelledBatch:
    """Clips with their targets.

    Arguments
    ---------
    rows : list of int
        Which of the data set's clips they are.
    wav : Tensor [B, samples], float32
        16 kHz, padded with zeros.
    wav_lens : Tensor [B], float64
        Lengths over that of the longest.
    targets : Tensor [B, ...]
        Those of time steps [B, T, K] are padded with zeros.
    failures : list of (str, str)
        Files that could not be read, and why.
    """

    rows: list[int]
    wav: Tensor
    wav_lens: Tensor
    targets: Tensor
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device) -> "LabelledBatch":
        """Waveforms and targets on a device; the lengths stay on the CPU."""
        wav = self.wav.to(device, non_blocking=True)
        return replace(self, wav=wav, targets=self.targets.to(device, non_blocking=True))

    def pin_memory(self) -> "LabelledBatch":
        return replace(self, wav=self.wav.pin_memory(), targets=self.targets.pin_memory())


class ClipTargets:
    """Targets [n, ...] of whole clips, whatever part of them is heard."""

    def __init__(self, targets: Tensor):
        self.targets = targets

    def __call__(self, row: int, start: float, stop: float) -> Tensor:
        return self.targets[row]


class LabelledDataset(Dataset):
    """Audio files with targets, read in whole or cropped.

    Arguments
    ---------
    files : sequence of str
    target_of : callable
        (row, start, stop), of the crop in seconds, to its targets: a tensor.
    crop_seconds : float or None
        Longer clips are cropped at random. None: clips are whole.
    seed : int
        Of the crops. Default 0.
    keep_in_memory : bool
        Decode each file once: for small sets. Loader processes keep one copy each. Default False.

    Raises
    ------
    UnreadableAudio
        By a batch of which no file can be read.

    Example
    -------
    >>> import soundfile
    >>> file = str(getfixture("tmp_path") / "noise.wav")
    >>> soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    >>> dataset = LabelledDataset([file], lambda row, start, stop: torch.tensor(7), 0.5)
    >>> batch = dataset.__getitems__([(1, 0), (2, 0)])
    >>> batch.wav.shape, batch.targets
    (torch.Size([2, 8000]), tensor([7, 7]))
    """

    def __init__(
        self,
        files: Sequence[str],
        target_of: TargetOf,
        crop_seconds: float | None = None,
        seed: int = 0,
        keep_in_memory: bool = False,
    ):
        if crop_seconds is not None and crop_seconds * SAMPLE_RATE < N_FFT:
            raise ValueError(f"clip_seconds={crop_seconds}: shorter than one window of 25 ms")
        self.files = list(files)
        self.target_of = target_of
        self.crop_samples = None if crop_seconds is None else round(crop_seconds * SAMPLE_RATE)
        self.seed = seed
        self.decoded: dict[int, Tensor] | None = {} if keep_in_memory else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: list[Key]) -> LabelledBatch:
        rows, wavs, targets, failures = [], [], [], []
        for draw, row, *_ in keys:
            try:
                wav = self._read(row)
            except UnreadableAudio as error:
                failures.append((error.path, error.reason))
                continue
            start = self._start(draw, row, len(wav))
            wav = wav[start : None if self.crop_samples is None else start + self.crop_samples]
            rows.append(row)
            wavs.append(wav)
            seconds = start / SAMPLE_RATE, (start + len(wav)) / SAMPLE_RATE
            targets.append(self.target_of(row, *seconds))
        if not wavs:
            raise UnreadableAudio(*failures[0])
        lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
        return LabelledBatch(
            rows=rows,
            wav=pad_sequence(wavs, batch_first=True),
            wav_lens=lengths / lengths.max(),
            targets=pad_sequence(targets, batch_first=True)
            if targets[0].dim() == 2
            else torch.stack(targets),
            failures=failures,
        )

    def _read(self, row: int) -> Tensor:
        if self.decoded is not None and row in self.decoded:
            return self.decoded[row]
        wav = read_audio(self.files[row])
        if self.decoded is not None:
            self.decoded[row] = wav
        return wav

    def _start(self, draw: int, row: int, samples: int) -> int:
        if self.crop_samples is None or samples <= self.crop_samples:
            return 0
        random = random_at(self.seed, CROPS, draw, row)
        return int(random.integers(samples - self.crop_samples + 1))


class BalancedSampler(CropSampler):
    """Batches of clips drawn with replacement, each with a probability of its own.

    Arguments
    ---------
    weights : array [n]
        See `balanced_weights`.
    batch_size, seed, rank, world_size, passes
        As in `CropSampler`: an epoch draws `passes` * n clips.

    Example
    -------
    >>> sampler = BalancedSampler(np.array([1.0, 0.0, 1.0]), batch_size=4, passes=3)
    >>> sorted({item for batch in sampler for _, item in batch})
    [0, 2]
    """

    def __init__(self, weights: np.ndarray, batch_size: int, seed: int = 0, **options):
        super().__init__(len(weights), batch_size, seed, **options)
        self.probabilities = np.asarray(weights, np.float64) / np.sum(weights)

    def _order(self) -> np.ndarray:
        random = random_at(self.seed, ORDER, self.epoch)
        return random.choice(self.num_items, self.num_items * self.passes, p=self.probabilities)

    def __iter__(self) -> Iterator[list[Key]]:
        place = self.epoch * self.num_items * self.passes  # every draw has crops of its own
        for batch, keys in enumerate(super().__iter__(), self.batches_done):
            first = place + batch * self.batch_size * self.world_size + self.rank
            yield [(first + n * self.world_size, item) for n, (_, item, *_) in enumerate(keys)]


def balanced_weights(targets: Tensor) -> np.ndarray:
    """Weights of clips that bring rare labels as often as frequent ones.

    Arguments
    ---------
    targets : Tensor [n], int64, or [n, K], of 0 and 1
        Classes, or any number of labels: then the sum over a clip's labels, as for AudioSet
        (Kong et al., "PANNs", 2020; Gong et al., "PSLA", 2021). A clip without a label gets the
        least weight of the others.

    Returns
    -------
    array [n], float64

    Example
    -------
    >>> balanced_weights(torch.tensor([0, 0, 0, 1]))
    array([0.33333333, 0.33333333, 0.33333333, 1.        ])
    """
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets)
    hits = targets.double()
    weights = (hits / hits.sum(0).clamp(min=1)).sum(1).numpy()
    labelled = weights > 0
    if not labelled.any():
        raise ValueError("balanced_sampling: no clip has a label")
    return np.where(labelled, weights, weights[labelled].min())


def make_loader(
    dataset: LabelledDataset,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    weights: np.ndarray | None = None,
    passes: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """A loader of `LabelledBatch`es; its `batch_sampler` has `set_epoch(epoch, batches_done)`.

    Arguments
    ---------
    dataset : LabelledDataset
    batch_size : int
        Per process.
    seed : int
    shuffle : bool
        For training: permutations, incomplete batches left out, and every process of a
        distributed run its share. Default False: every process reads all, in order.
    weights : array or None
        Draw by these instead (`BalancedSampler`).
    passes : int
        Through the clips an epoch. Default 1.
    num_workers : int
    """
    distributed = shuffle and torch.distributed.is_initialized()
    ranks = {}
    if distributed:
        ranks["rank"] = torch.distributed.get_rank()
        ranks["world_size"] = torch.distributed.get_world_size()
    sampler: CropSampler
    if weights is not None:
        sampler = BalancedSampler(weights, batch_size, seed, passes=passes, **ranks)
    else:
        sampler = CropSampler(
            len(dataset), batch_size, seed, shuffle=shuffle, passes=passes, **ranks
        )
    return crop_loader(dataset, sampler, num_workers, pin_memory=torch.cuda.is_available())
