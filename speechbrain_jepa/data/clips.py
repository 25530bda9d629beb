"""Whole files, for embedding: found, decoded in threads, and batched by their length."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechbrain_jepa.data.audio import UnreadableAudio, read_whole
from speechbrain_jepa.data.listing import list_audio
from speechbrain_jepa.data.resampling import resample
from speechbrain_jepa.features import SAMPLE_RATE

logger = logging.getLogger(__name__)

BATCH_SECONDS = 600.0  # of audio, padding included
READ_AHEAD = 16  # files decoded in advance, for each thread


def find_audio(sources) -> list[str]:
    """Audio files, sorted within each folder.

    Arguments
    ---------
    sources : str, Path or iterable of them
        Files, taken whatever their name, and folders, searched to the bottom for the extensions
        that libsndfile reads (hidden ones are left out).

    Returns
    -------
    list of str
        Paths as they were given, and what was found below the folders; each once.

    Raises
    ------
    FileNotFoundError
        If a source does not exist, or there is no audio in any.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("b.flac", "a.wav", "notes.txt"):
    ...     (folder / name).touch()
    >>> [os.path.basename(file) for file in find_audio(folder)]
    ['a.wav', 'b.flac']
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    found = []
    for source in map(os.fspath, sources):
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        if os.path.isdir(source):
            found += [os.path.join(source, path) for path, *_ in list_audio(source)[0]]
        else:
            found.append(source)
    if not found:
        raise FileNotFoundError(f"no audio file in {', '.join(map(str, sources))}")
    return list(dict.fromkeys(found))


def read_audio(path) -> Tensor:
    """Read a whole file.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    Tensor [samples], float32
        Mono (the mean of the channels), 16 kHz.

    Raises
    ------
    UnreadableAudio
        If the file cannot be opened or decoded, holds no samples, more than 1 % of them are
        missing, or one is NaN, infinite or beyond +-1e10.
    """
    wav, rate = read_whole(path)
    return torch.from_numpy(resample(wav, rate))


@dataclass
class ClipBatch:
    """Whole clips, padded with zeros.

    Arguments
    ---------
    files : list of str
    wav : Tensor [B, samples], float32
    wav_lens : Tensor [B], float64
        Lengths over that of the longest, as everywhere in SpeechBrain.
    """

    files: list[str]
    wav: Tensor
    wav_lens: Tensor


def read_clips(
    files: Iterable[str],
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    on_failure: Callable[[UnreadableAudio], None] | None = None,
) -> Iterator[ClipBatch]:
    """Read files in their order, in batches of bounded size.

    Arguments
    ---------
    files : iterable of str
    batch_seconds : float
        Of audio in a batch, with its padding; a longer file is a batch of its own. Default 600.
    num_workers : int
        Decoding threads. Default 2.
    on_failure : callable
        Told of each file that cannot be used. None: the exception is raised.

    Yields
    ------
    ClipBatch

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> for name, seconds in {"a": 2, "b": 1, "c": 3}.items():
    ...     soundfile.write(folder / f"{name}.wav", torch.randn(seconds * 8_000).numpy() / 9, 8_000)
    >>> for batch in read_clips(find_audio(folder), batch_seconds=4):
    ...     print([os.path.basename(file) for file in batch.files], batch.wav.shape, batch.wav_lens)
    ['a.wav', 'b.wav'] torch.Size([2, 32000]) tensor([1.0000, 0.5000], dtype=torch.float64)
    ['c.wav'] torch.Size([1, 48000]) tensor([1.], dtype=torch.float64)
    """
    yield from in_batches(_read_ahead(files, num_workers, on_failure), batch_seconds)


def in_batches(clips: Iterable[tuple[str, Tensor]], batch_seconds: float) -> Iterator[ClipBatch]:
    """Clips (name, samples) in their order, in batches as `read_clips` gives them."""
    limit = batch_seconds * SAMPLE_RATE
    names: list[str] = []
    wavs: list[Tensor] = []
    longest = 0
    for name, wav in clips:
        longest = max(longest, len(wav))
        if wavs and longest * (len(wavs) + 1) > limit:
            yield _collate(names, wavs)
            names, wavs, longest = [], [], len(wav)
        names.append(name)
        wavs.append(wav)
    if wavs:
        yield _collate(names, wavs)


def waveforms(source, max_clips: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pairs of waveforms and wav_lens, to measure something on.

    Arguments
    ---------
    source : str, Path, list of them, or iterable of batches
        See `speechbrain_jepa.AudioJEPA.fit_normalization`.
    max_clips : int
        Of files, so many at most are read, evenly spread.
    num_workers : int
        Decoding threads.
    """
    if isinstance(source, str | os.PathLike):
        source = [source]
    if isinstance(source, list | tuple) and isinstance(source[0], str | os.PathLike):
        files = find_audio(source)
        files = files[:: -(-len(files) // max_clips)]
        for batch in read_clips(files, num_workers=num_workers, on_failure=logger.warning):
            yield batch.wav, batch.wav_lens
        return
    for batch in source:
        yield tuple(batch) if isinstance(batch, tuple | list) else (batch, None)


def _read_ahead(files, num_workers: int, on_failure) -> Iterator[tuple[str, Tensor]]:
    """Files in their order, while threads decode the next ones."""
    files = iter(files)
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        ahead = READ_AHEAD * max(num_workers, 1)
        pending = deque((file, pool.submit(read_audio, file)) for file in islice(files, ahead))
        while pending:
            file, future = pending.popleft()
            try:
                yield file, future.result()
            except UnreadableAudio as error:
                if on_failure is None:
                    raise
                on_failure(error)
            pending.extend((file, pool.submit(read_audio, file)) for file in islice(files, 1))


def _collate(names: list[str], wavs: list[Tensor]) -> ClipBatch:
    lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
    return ClipBatch(names, pad_sequence(wavs, batch_first=True), lengths / lengths.max())
