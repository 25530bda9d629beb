"""Random crops of audio files: only the samples used are read and decoded.

A crop depends on (seed, epoch, item) and on nothing else, so the same crops come back whatever the
number of loader processes, and after a resume.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np
import torch
import torchaudio
from speechbrain.dataio import audio_io
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.features import HOP_LENGTH, N_FFT, SAMPLE_RATE, crop_samples, num_frames

MARGIN = N_FFT // 2  # samples that the first and last frame of a crop need beyond their centres
MAX_REPLACEMENTS = 32  # broken files in a row, before it must be said that something is wrong

Key = tuple[int, int]  # (pass through the items, item)
CROPS, ORDER = 0, 1  # what random numbers are for: independent streams of one seed


def _random(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Random numbers that belong to a place (up to three numbers), without state or history."""
    counter = [0, *place, *[0] * (3 - len(place))]  # the first word counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, stream], counter=counter))


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
def resampler(sample_rate: int) -> torchaudio.transforms.Resample:
    """Resampling to 16 kHz; the transform keeps its filter, the function would compute it anew.

    torchaudio's filter has old x new taps for the ratio old / new in lowest terms: 11 127 Hz would
    take 0.7 GB. The nearest ratio with a denominator of up to 640 is used instead. It is exact for
    every usual rate (11 025 Hz is 441 / 640) and off by less than 0.1 % for the odd ones.

    Example
    -------
    >>> [(r.orig_freq, r.new_freq) for r in map(resampler, (44_100, 48_000, 11_127))]
    [(441, 160), (3, 1), (427, 614)]
    """
    ratio = Fraction(sample_rate, SAMPLE_RATE).limit_denominator(640)
    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator)


def resampled_length(length: int, sample_rate: int) -> int:
    """Samples at 16 kHz of `length` samples at `sample_rate`.

    Example
    -------
    >>> resampled_length(44_100, 44_100), resampled_length(7, 8_000)
    (16000, 14)
    """
    ratio = resampler(sample_rate)
    return -(-length * ratio.new_freq // ratio.orig_freq)


@contextlib.contextmanager
def _quiet_decoder(path: str):
    """In loader processes, keep from the terminal what mpg123 says at every tenth seek or so: that
    the frames it skips lack their bit reservoir, which is of no consequence."""
    if get_worker_info() is None or not path.lower().endswith((".mp3", ".mp2")):
        yield
        return
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _read_mono(path: str, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples start to stop of a file at its own rate, channels averaged."""
    try:
        with _quiet_decoder(path), shards.audio_source(path) as source:
            # 0.02 ms slower than soundfile itself, of 0.3 ms at least
            wav, rate = audio_io.load(
                source,
                frame_offset=start,
                num_frames=stop - start,
                dtype=torch.float32,
                channels_first=False,
            )
    except Exception as error:  # whatever the decoder stumbles over, the run goes on
        reason = getattr(error.__cause__, "error_string", None) or str(error.__cause__ or error)
        reason = " ".join(reason.split())
        raise UnreadableAudio(path, f"cannot be decoded: {reason}") from error
    if rate != sample_rate:
        reason = f"changed since it was scanned: {rate} Hz, was {sample_rate} Hz"
        raise UnreadableAudio(path, reason)
    if len(wav) < stop - start:
        raise UnreadableAudio(path, "truncated: holds fewer samples than its header says")
    wav = wav.numpy()
    wav = wav[:, 0] if wav.shape[1] == 1 else wav.mean(1)
    if not np.isfinite(wav).all():
        raise UnreadableAudio(path, "holds NaN or infinite samples")
    return wav


def _read_resampled(
    path: str, begin: int, end: int, sample_rate: int, start: int, length: int
) -> np.ndarray:
    """Samples begin to end, at 16 kHz, of a segment of `length` samples from `start` on.

    They equal those of the whole segment resampled: the filter's phase repeats every `old` source
    samples, so reading begins at a multiple of them, with blocks to spare for the filter.
    """
    resample = resampler(sample_rate)
    old, new = resample.orig_freq, resample.new_freq
    if old == new:
        return _read_mono(path, start + begin, start + end, sample_rate)
    spare = math.ceil(resample.width / old)  # blocks
    first = max(begin // new - spare, 0)
    last = math.ceil(end / new) + spare
    wav = _read_mono(path, start + first * old, start + min(last * old, length), sample_rate)
    # whole blocks: torchaudio works out the length of others in float32, and may drop a sample
    wav = np.pad(wav, (0, (last - first) * old - len(wav)))
    wav = resample(torch.from_numpy(wav)).numpy()
    return wav[begin - first * new : end - first * new]


def read_segment(path: str | os.PathLike, sample_rate: int, start: int, length: int) -> np.ndarray:
    """A whole segment of a file, mono, at 16 kHz.

    Arguments
    ---------
    path, sample_rate, start, length
        As in `read_crop`.

    Returns
    -------
    array [samples], float32

    Raises
    ------
    UnreadableAudio
        As `read_crop`.
    """
    end = resampled_length(length, sample_rate)
    return _read_resampled(os.fspath(path), 0, end, sample_rate, start, length)


def read_crop(
    path: str | os.PathLike,
    first_frame: int,
    frames: int,
    sample_rate: int,
    start: int,
    length: int,
) -> np.ndarray:
    """Read what `frames` spectrogram frames of a segment need, from its `first_frame` on.

    The log-mel of the crop (`LogMelSpectrogram` with `margins=True`) equals the same frames of the
    log-mel of the whole segment, which is padded by reflection at its two ends. A segment with
    fewer frames than asked for is followed by zeros, not by its reflection.

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
    array [crop_samples(frames)], float32
        Mono (the mean of the channels), 16 kHz.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened or decoded, is shorter than said, or holds NaN or infinity.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "noise.wav"
    >>> soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (44_100, 2)), 44_100)
    >>> read_crop(path, 10, 64, sample_rate=44_100, start=0, length=44_100).shape
    (10480,)
    """
    path = os.fspath(path)
    available = resampled_length(length, sample_rate)
    begin = first_frame * HOP_LENGTH - MARGIN
    end = begin + crop_samples(frames)
    if not 0 <= first_frame < num_frames(available):
        raise UnreadableAudio(
            path, f"has {num_frames(available)} frames: none at first_frame={first_frame}"
        )
    wav = _read_resampled(path, max(begin, 0), min(end, available), sample_rate, start, length)
    if begin < 0:
        wav = np.pad(wav, (-begin, 0), mode="reflect" if len(wav) > 1 else "edge")
    if end > available:
        is_short = num_frames(available) < first_frame + frames
        wav = np.pad(wav, (0, end - available), mode="constant" if is_short else "reflect")
    return wav


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

    Raises
    ------
    ValueError
        If the manifest is empty or the crop has no frames.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> noise = np.random.default_rng(0).normal(0, 0.1, 48_000)
    >>> soundfile.write(folder / "noise.wav", noise, 16_000)
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
        if len(manifest) == 0:
            raise ValueError("the manifest is empty: there is nothing to crop")
        if crop_frames < 1:
            raise ValueError(f"crop_frames={crop_frames}: must be at least 1")
        self.manifest = manifest
        self.data_folder = os.fspath(data_folder or "")
        self.crop_frames = crop_frames
        self.seed = seed
        self.random_crops = random_crops
        self._reported: set[int] = set()  # broken items that this process has reported

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: Key) -> CropBatch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> CropBatch:
        """Read one crop for each key; broken files are replaced by others and reported."""
        wav = torch.empty(len(keys), crop_samples(self.crop_frames))
        items, failures = [], []
        for row, (epoch, item) in zip(wav.numpy(), keys):
            row[:], item = self._read(epoch if self.random_crops else 0, item, failures)
            items.append(item)
        return CropBatch(wav, torch.tensor(items), failures)

    def _read(self, epoch: int, item: int, failures: list) -> tuple[np.ndarray, int]:
        """The crop of an item, or of its replacement, and whose it is.

        What broke before is tried again: a cut-off file has good crops as well as bad ones, and if
        earlier crops decided, a crop would depend on which process has read what.
        """
        for attempt in range(MAX_REPLACEMENTS + 1):
            random = _random(self.seed, CROPS, attempt, item, epoch)
            chosen = item if attempt == 0 else int(random.integers(len(self.manifest)))
            try:
                return self._crop(chosen, random), chosen
            except UnreadableAudio as error:
                last = error
                if chosen not in self._reported:
                    self._reported.add(chosen)
                    failures.append((self.manifest.path(chosen), error.reason))
        raise RuntimeError(
            f"{MAX_REPLACEMENTS + 1} files in a row could not be read, the last one {last}: is "
            f"data_folder={self.data_folder} still there and whole?"
        )

    def _crop(self, item: int, random: np.random.Generator) -> np.ndarray:
        manifest = self.manifest
        rate, length = int(manifest.sample_rate[item]), int(manifest.length[item])
        room = num_frames(resampled_length(length, rate)) - self.crop_frames
        first = int(random.integers(room + 1)) if room > 0 else 0
        path = shards.join(self.data_folder, manifest.path(item))
        return read_crop(path, first, self.crop_frames, rate, int(manifest.start[item]), length)


class CropSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, item), in an order that depends on (seed, epoch) alone.

    Process `rank` of a distributed run takes every `world_size`-th item of that order. With several
    passes through the items, a key's epoch counts passes, so that each pass draws other crops.

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
        validation: every item once over all processes, in order, the last batch smaller.
    passes : int
        How often a shuffled epoch goes through the items. Default 1.

    Raises
    ------
    ValueError
        If a number is out of its range.

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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must lie between 0 and world_size={world_size}")
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
        order = self._order()
        own = np.arange(self.rank, len(order), self.world_size)
        epochs = self.epoch * self.passes + own // self.num_items
        items = order[own]
        for batch in range(self.batches_done, len(self)):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield list(zip(epochs[part].tolist(), items[part].tolist()))

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_items)
        random = _random(self.seed, ORDER, self.epoch)
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
    prefetch_factor: int = 2,
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
        Batches that each worker keeps ready. Default 2: one of 2048 crops takes 0.26 GiB.
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
