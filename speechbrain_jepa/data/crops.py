"""Random crops of audio files: only the samples used are read and decoded.

A crop depends on (seed, epoch, item) and on nothing else, so the same crops come back whatever the
number of loader processes, and after a resume.
"""

import math
import os
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from speechbrain_jepa.data import shards
from speechbrain_jepa.data.audio import UnreadableAudio, read_samples, read_spans
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.resampling import (
    resample,
    resampled_length,
    resampling_ratio,
    spare_blocks,
)
from speechbrain_jepa.features import (
    HOP_LENGTH,
    N_FFT,
    SAMPLE_RATE,
    crop_samples,
    num_frames,
)

NEAR = 0.5  # seconds between two crops that are decoded rather than sought over
MAX_REPLACEMENTS = 32  # broken files in a row; more mean that the disk is the problem

# (pass through the items, item), and the crop's frames where they are not the dataset's own
Key = tuple[int, int] | tuple[int, int, int]
CROPS, ORDER, DURATIONS = 0, 1, 2  # streams: independent random numbers of one seed


def random_at(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on seed, stream and up to three more numbers, and on no state."""
    counter = [0, *place, *[0] * (3 - len(place))]  # the first word counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, stream], counter=counter))


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
    return resample(read_samples(path, start, start + length, sample_rate), sample_rate)


def read_crop(
    path: str | os.PathLike,
    first_frame: int,
    frames: int,
    sample_rate: int,
    start: int,
    length: int,
    n_fft: int = N_FFT,
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
    n_fft : int
        Of the log-mel that the crop is for. Default 400.

    Returns
    -------
    array [crop_samples(frames, n_fft)], float32
        Mono (the mean of the channels), 16 kHz.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened or decoded, is shorter than said, or holds a sample that is
        NaN, infinite or beyond +-1e10.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "noise.wav"
    >>> soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (44_100, 2)), 44_100)
    >>> read_crop(path, 10, 64, sample_rate=44_100, start=0, length=44_100).shape
    (10480,)
    """
    return read_crops(path, [first_frame], frames, sample_rate, start, length, n_fft)[0]


def read_crops(
    path: str | os.PathLike,
    first_frames: list[int],
    frames: int,
    sample_rate: int,
    start: int,
    length: int,
    n_fft: int = N_FFT,
) -> np.ndarray:
    """Read several crops of a segment from one opening of its file.

    What overlaps, or lies within half a second of each other, is decoded and resampled once; over
    more is sought, so a crop costs no more than alone.

    Arguments
    ---------
    path, frames, sample_rate, start, length, n_fft
        As in `read_crop`.
    first_frames : list of int
        Of each crop, in any order.

    Returns
    -------
    array [crops, crop_samples(frames, n_fft)], float32

    Raises
    ------
    UnreadableAudio
        As `read_crop`.
    """
    path = os.fspath(path)
    available = resampled_length(length, sample_rate)
    begins = [first * HOP_LENGTH - n_fft // 2 for first in first_frames]
    for first in first_frames:
        if not 0 <= first < num_frames(available):
            raise UnreadableAudio(
                path, f"has {num_frames(available)} frames: none at first_frame={first}"
            )
    samples = crop_samples(frames, n_fft)
    needs = [(max(begin, 0), min(begin + samples, available)) for begin in begins]
    spans = _joined(needs, round(NEAR * SAMPLE_RATE))
    wavs = _read_resampled(path, spans, sample_rate, start, length)
    crops = []
    for first, begin, (heard, end) in zip(first_frames, begins, needs):
        place, wav = next(
            (span[0], wav) for span, wav in zip(spans, wavs) if span[0] <= heard < span[1]
        )
        wav = wav[heard - place : end - place]
        if begin < 0:
            wav = np.pad(wav, (-begin, 0), mode="reflect" if len(wav) > 1 else "edge")
        if len(wav) < samples:
            is_short = num_frames(available) < first + frames
            missing = (0, samples - len(wav))
            wav = np.pad(wav, missing, mode="constant" if is_short else "reflect")
        crops.append(wav)
    return np.stack(crops)


def _joined(needs: list[tuple[int, int]], near: int) -> list[tuple[int, int]]:
    """Ascending spans that hold all (begin, end), more than `near` from each other."""
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(needs):
        if spans and begin <= spans[-1][1] + near:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((begin, end))
    return spans


def _read_resampled(
    path: str, spans: list[tuple[int, int]], sample_rate: int, start: int, length: int
) -> list[np.ndarray]:
    """Spans, in samples at 16 kHz, of a segment of `length` samples from `start` on.

    They equal those of the whole segment resampled: the filter's phase repeats every `old` source
    samples, so reading begins at a multiple of them, with blocks to spare for the filter.
    """
    old, new = resampling_ratio(sample_rate)
    if old == new:
        sources = [(start + begin, start + end) for begin, end in spans]
        return read_spans(path, sources, sample_rate)
    spare = spare_blocks(sample_rate)
    firsts = [max(begin // new - spare, 0) for begin, _ in spans]
    lasts = [math.ceil(end / new) + spare for _, end in spans]
    sources = [
        (start + first * old, start + min(last * old, length)) for first, last in zip(firsts, lasts)
    ]
    wavs = read_spans(path, sources, sample_rate)
    return [
        resample(wav, sample_rate, last - first)[begin - first * new : end - first * new]
        for wav, first, last, (begin, end) in zip(wavs, firsts, lasts, spans)
    ]


@dataclass
class CropBatch:
    """Crops of one batch.

    Arguments
    ---------
    wav : Tensor [B, crop_samples(frames, n_fft)], float32
    item : Tensor [B], int64
        Rows of the manifest.
    failures : list of (str, str)
        Path and reason of each file that broke; other files took their places.
    seconds : float
        That reading took.
    """

    wav: Tensor
    item: Tensor
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.wav)

    def to(self, device) -> "CropBatch":
        wav, item = (x.to(device, non_blocking=True) for x in (self.wav, self.item))
        return replace(self, wav=wav, item=item)

    def split(self, parts: int) -> list["CropBatch"]:
        """So many batches of as many consecutive rows each; the first has the failures."""
        batches = [
            CropBatch(wav, item, seconds=self.seconds / parts)
            for wav, item in zip(self.wav.chunk(parts), self.item.chunk(parts))
        ]
        batches[0].failures = self.failures
        return batches

    def pin_memory(self) -> "CropBatch":
        return replace(self, wav=self.wav.pin_memory(), item=self.item.pin_memory())


class CropDataset(Dataset):
    """Crops of a manifest's segments, asked for by key (epoch, item), or (epoch, item, frames).

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
    crops_per_file : int
        Crops that a key stands for, each drawn for itself, read from one opening of the file:
        those of key (epoch, item) are what (crops_per_file * epoch + 0, 1, ...; item) would draw
        alone. Default 1.
    n_fft : int
        Of the log-mel that the crops are for. Default 400.

    Raises
    ------
    ValueError
        If the manifest is empty, the crop has no frames or there is none of a file.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> noise = np.random.default_rng(0).normal(0, 0.1, 48_000)
    >>> soundfile.write(folder / "noise.wav", noise, 16_000)
    >>> from speechbrain_jepa.data import scan_folder
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
        crops_per_file: int = 1,
        n_fft: int = N_FFT,
    ):
        if len(manifest) == 0:
            raise ValueError("the manifest is empty: there is nothing to crop")
        if crop_frames < 1:
            raise ValueError(f"crop_frames={crop_frames}: must be at least 1")
        if crops_per_file < 1:
            raise ValueError(f"crops_per_file={crops_per_file}: must be at least 1")
        self.manifest = manifest
        self.data_folder = os.fspath(data_folder or "")
        self.crop_frames = crop_frames
        self.seed = seed
        self.random_crops = random_crops
        self.crops_per_file = crops_per_file
        self.n_fft = n_fft
        self._reported: set[int] = set()  # broken items that this process has reported

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: Key) -> CropBatch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> CropBatch:
        """Read the crops of each key, all of the same frames; broken files are replaced by others
        and reported.

        First one crop of every key, in the order of the keys, then the next of each, ...
        """
        began = time.perf_counter()
        frames = keys[0][2] if len(keys[0]) == 3 else self.crop_frames
        wav = torch.empty(self.crops_per_file, len(keys), crop_samples(frames, self.n_fft))
        crops, items = wav.numpy(), []
        failures: list[tuple[str, str]] = []
        for row, (epoch, item, *_) in enumerate(keys):
            epoch = epoch if self.random_crops else 0
            crops[:, row], item = self._read(epoch, item, frames, failures)
            items.append(item)
        whose = torch.tensor(items * self.crops_per_file)
        return CropBatch(wav.flatten(0, 1), whose, failures, time.perf_counter() - began)

    def _read(self, epoch: int, item: int, frames: int, failures: list) -> tuple[np.ndarray, int]:
        """The crops of an item, or of its replacement, and whose they are.

        What broke before is tried again: a cut-off file has good crops as well as bad ones, and if
        earlier crops decided, a crop would depend on which process has read what.
        """
        draws = range(epoch * self.crops_per_file, (epoch + 1) * self.crops_per_file)
        for attempt in range(MAX_REPLACEMENTS + 1):
            randoms = [random_at(self.seed, CROPS, attempt, item, draw) for draw in draws]
            chosen = item
            if attempt:
                chosen, *_ = [int(random.integers(len(self.manifest))) for random in randoms]
            try:
                return self._crops(chosen, frames, randoms), chosen
            except UnreadableAudio as error:
                last = error
                if chosen not in self._reported:
                    self._reported.add(chosen)
                    failures.append((self.manifest.path(chosen), error.reason))
        raise RuntimeError(
            f"{MAX_REPLACEMENTS + 1} files in a row could not be read, the last one {last}: is "
            f"data_folder={self.data_folder} still there and whole?"
        )

    def problem(self, item: int) -> str | None:
        """Why the crop of epoch 0 of an item cannot be read; None if it can."""
        try:
            self._crops(item, self.crop_frames, [random_at(self.seed, CROPS, 0, item, 0)])
            return None
        except UnreadableAudio as error:
            return error.reason

    def _crops(self, item: int, frames: int, randoms: list[np.random.Generator]) -> np.ndarray:
        manifest = self.manifest
        rate, length = int(manifest.sample_rate[item]), int(manifest.length[item])
        room = num_frames(resampled_length(length, rate)) - frames
        firsts = [int(random.integers(room + 1)) if room > 0 else 0 for random in randoms]
        path = shards.join(self.data_folder, manifest.path(item))
        start = int(manifest.start[item])
        return read_crops(path, firsts, frames, rate, start, length, self.n_fft)
