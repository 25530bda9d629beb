"""Random crops of audio files: only the samples used are read and decoded.

A crop depends on (seed, epoch, item) and on nothing else, so the same crops come back whatever the
number of loader processes, and after a resume.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchaudio
from speechbrain.dataio import audio_io
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.features import HOP_LENGTH, N_FFT, SAMPLE_RATE, crop_samples, num_frames

MARGIN = N_FFT // 2  # samples that the first and last frame of a crop need beyond their centres
MAX_REPLACEMENTS = 32  # broken files in a row, before it must be said that something is wrong

Key = tuple[int, int]  # (epoch, item)


class UnreadableAudio(Exception):
    """A file that cannot be used, and why.

    Arguments
    ---------
    path : str
    reason : str
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@cache
def _resampler(rate: int) -> torchaudio.transforms.Resample:
    """The transform keeps its filter; the function would compute it for every crop."""
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def resampled_length(length: int, sample_rate: int) -> int:
    """Samples at 16 kHz of `length` samples at `sample_rate`.

    Example
    -------
    >>> resampled_length(44_100, 44_100), resampled_length(7, 8_000)
    (16000, 14)
    """
    return math.ceil(length * SAMPLE_RATE / sample_rate)


def _read_mono(path: str, start: int, stop: int) -> Tensor:
    """Samples start to stop of a file at its own rate, channels averaged."""
    try:
        wav, _ = audio_io.load(path, frame_offset=start, num_frames=stop - start)
    except Exception as error:  # whatever the decoder stumbles over, the run goes on
        reason = str(error.__cause__ or error).replace("\n", " ")
        raise UnreadableAudio(path, f"cannot be decoded: {reason}") from error
    if wav.shape[1] < stop - start:
        found, promised = start + wav.shape[1], stop
        raise UnreadableAudio(path, f"truncated: {found} samples where {promised} were promised")
    wav = wav[0] if len(wav) == 1 else wav.mean(0)
    if not torch.isfinite(wav).all():
        raise UnreadableAudio(path, "holds NaN or infinite samples")
    return wav


def _read_resampled(
    path: str, begin: int, end: int, sample_rate: int, start: int, length: int
) -> Tensor:
    """Samples begin to end, at 16 kHz, of a segment of `length` samples from `start` on.

    They equal those of the whole segment resampled: the filter's phase repeats every `old` source
    samples, so reading begins at a multiple of them, with blocks to spare for the filter.
    """
    if sample_rate == SAMPLE_RATE:
        return _read_mono(path, start + begin, start + end)
    resampler = _resampler(sample_rate)
    divisor = math.gcd(sample_rate, SAMPLE_RATE)
    old, new = sample_rate // divisor, SAMPLE_RATE // divisor
    spare = math.ceil(resampler.width / old)  # blocks
    first = max(begin // new - spare, 0)
    last = math.ceil(end / new) + spare
    wav = _read_mono(path, start + first * old, start + min(last * old, length))
    wav = resampler(wav)
    return wav[begin - first * new : end - first * new]


def read_crop(
    path: str | os.PathLike,
    first_frame: int,
    frames: int,
    sample_rate: int,
    start: int,
    length: int,
) -> Tensor:
    """Read what `frames` spectrogram frames of a segment need, from its `first_frame` on.

    The log-mel of the crop (`LogMelSpectrogram` with `margins=True`) equals the same frames of the
    log-mel of the whole segment, which is padded by reflection at its two ends. A segment with
    fewer frames than asked for is followed by zeros.

    Arguments
    ---------
    path : str or path
    first_frame, frames : int
        In frames of 10 ms.
    sample_rate : int
        Of the file, in Hz.
    start, length : int
        The segment, in samples at the file's rate.

    Returns
    -------
    Tensor [crop_samples(frames)], float32
        Mono (the mean of the channels), 16 kHz.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened or decoded, is shorter than said, or holds NaN or infinity.
    """
    path = os.fspath(path)
    available = resampled_length(length, sample_rate)
    begin = first_frame * HOP_LENGTH - MARGIN
    end = begin + crop_samples(frames)
    wav = _read_resampled(
        path, max(begin, 0), min(end, available), sample_rate, start, length
    ).numpy()
    if begin < 0:
        wav = np.pad(wav, (-begin, 0), mode="reflect" if len(wav) > 1 else "edge")
    if end > available:
        missing = end - available
        short = num_frames(available) < first_frame + frames
        wav = np.pad(wav, (0, missing), mode="constant" if short else "reflect")
    return torch.from_numpy(np.ascontiguousarray(wav))


@dataclass
class CropBatch:
    """Crops of one batch.

    Arguments
    ---------
    wav : Tensor [B, crop_samples(frames)], float32
    item : Tensor [B], int64
        Rows of the manifest.
    failures : list of (str, str)
        Path and reason of each file that broke; other files took their places.
    """

    wav: Tensor
    item: Tensor
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.wav)

    def to(self, device) -> "CropBatch":
        wav, item = (x.to(device, non_blocking=True) for x in (self.wav, self.item))
        return CropBatch(wav, item, self.failures)

    def pin_memory(self) -> "CropBatch":
        return CropBatch(self.wav.pin_memory(), self.item.pin_memory(), self.failures)


class CropDataset(Dataset):
    """Crops of a manifest's segments, asked for by key (epoch, item).

    Arguments
    ---------
    manifest : Manifest
    data_folder : str or path, or None
        What relative paths of the manifest are relative to.
    crop_frames : int
        Default 208.
    seed : int
        Default 0.
    random_crops : bool
        True: each start that fits is equally likely, anew each epoch. False: the crop of epoch 0
        in every epoch, for validation.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000)
    >>> from speechbrain_jepa.data.manifest import scan_folder
    >>> manifest, skipped = scan_folder(folder, folder / "cache", progress=False)
    >>> CropDataset(manifest, folder, crop_frames=208).__getitems__([(1, 0), (1, 0)]).wav.shape
    torch.Size([2, 33520])
    """

    def __init__(
        self,
        manifest: Manifest,
        data_folder: str | os.PathLike | None = None,
        crop_frames: int = 208,
        seed: int = 0,
        random_crops: bool = True,
    ):
        self.manifest = manifest
        self.data_folder = Path(data_folder or "")
        self.crop_frames = crop_frames
        self.seed = seed
        self.random_crops = random_crops
        self.broken: set[int] = set()  # known to this process

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: Key) -> CropBatch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> CropBatch:
        """Read one crop for each key; broken files are replaced by others and reported."""
        wavs, items, failures = [], [], []
        for epoch, item in keys:
            wav, item = self._read(epoch if self.random_crops else 0, item, failures)
            wavs.append(wav)
            items.append(item)
        return CropBatch(torch.stack(wavs), torch.tensor(items), failures)

    def _read(self, epoch: int, item: int, failures: list) -> tuple[Tensor, int]:
        for attempt in range(MAX_REPLACEMENTS + 1):
            # Philox is counter based: these numbers need no state and no history
            random = np.random.Generator(
                np.random.Philox(key=self.seed, counter=[epoch, item, attempt, 0])
            )
            chosen = item if attempt == 0 else int(random.integers(len(self.manifest)))
            if chosen in self.broken:
                continue
            try:
                return self._crop(chosen, random), chosen
            except UnreadableAudio as error:
                self.broken.add(chosen)
                failures.append((error.path, error.reason))
        raise RuntimeError(
            f"{MAX_REPLACEMENTS} files in a row could not be read, the last one {failures[-1:]}: "
            f"is {self.data_folder} still there and whole?"
        )

    def _crop(self, item: int, random: np.random.Generator) -> Tensor:
        manifest = self.manifest
        rate, length = int(manifest.sample_rate[item]), int(manifest.length[item])
        room = num_frames(resampled_length(length, rate)) - self.crop_frames
        first = int(random.integers(room + 1)) if room > 0 else 0
        path = self.data_folder / manifest.path(item)
        return read_crop(path, first, self.crop_frames, rate, int(manifest.start[item]), length)


class CropSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, item), in an order that depends on (seed, epoch) alone.

    Processes of a distributed run take every `world_size`-th batch's worth of the same order.

    Arguments
    ---------
    num_items : int
    batch_size : int
        Per process.
    seed : int
        Default 0.
    rank, world_size : int
        Default 0 and 1.
    shuffle : bool
        Default True: `passes` permutations an epoch, incomplete batches left out; a corpus
        smaller than one global batch is gone through as often as fills it. False, for
        validation: every item once, in order, the last batches smaller.
    passes : int
        How often an epoch goes through the items. Default 1.

    Example
    -------
    >>> sampler = CropSampler(num_items=10, batch_size=4, seed=0)
    >>> sampler.set_epoch(3, batches_done=1)
    >>> len(sampler), [len(batch) for batch in sampler]
    (2, [4])
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        passes: int = 1,
    ):
        for name, value in {
            "num_items": num_items,
            "batch_size": batch_size,
            "passes": passes,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.passes = max(passes, math.ceil(batch_size * world_size / num_items)) if shuffle else 1
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration is this epoch's, after its first `batches_done` batches."""
        self.epoch = epoch
        self.batches_done = batches_done

    def __len__(self) -> int:
        """Batches of a whole epoch, for this process."""
        items = self.num_items * self.passes
        if self.shuffle:
            return items // (self.batch_size * self.world_size)
        return math.ceil(len(range(self.rank, items, self.world_size)) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()[self.rank :: self.world_size]
        for batch in range(self.batches_done, len(self)):
            items = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(item)) for item in items]

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_items)
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, self.epoch]))
        return np.concatenate([random.permutation(self.num_items) for _ in range(self.passes)])


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)


def _only(batch: CropBatch) -> CropBatch:
    """`CropDataset` fetches whole batches: there is nothing left to collate."""
    return batch


def crop_loader(
    dataset: CropDataset,
    sampler: CropSampler,
    num_workers: int = 0,
    prefetch_factor: int = 4,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of `CropBatch`es.

    Workers live as long as the loader; each decodes whole batches on one thread. The sampler stays
    in the main process, so `sampler.set_epoch` holds for the next iteration.

    Arguments
    ---------
    dataset : CropDataset
    sampler : CropSampler
    num_workers : int
        Default 0: read in the main process.
    prefetch_factor : int
        Batches that each worker keeps ready. Default 4.
    pin_memory : bool
        For CUDA devices. Default False.
    """
    workers = dict(
        prefetch_factor=prefetch_factor, persistent_workers=True, worker_init_fn=_start_worker
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_only,
        num_workers=num_workers,
        pin_memory=pin_memory,
        **(workers if num_workers else {}),
    )
