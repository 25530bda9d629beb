"""Opening audio: the one way in which files and members of shards are opened, decoded and checked.

Any file gives samples or raises `UnreadableAudio` with the reason, and no other exception.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator

import numpy as np
import soundfile
from torch.utils.data import get_worker_info

from speechbrain_jepa.data.shards import ShardMember

LOWEST_RATE = 1_000  # Hz; a slower signal is no audio
HIGHEST_RATE = (
    1_000_000  # Hz; ultrasound is recorded at 500 kHz at most, and more is a damaged header
)
# full scale is 1, and unscaled 32-bit integers reach 2.1e9. The power of 400 samples of 1e10 is
# 1e25, that of samples of 1e17 overflows float32
LOUDEST = 1e10
TOO_SHORT = "truncated: holds fewer samples than its header says"

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# libsndfile quietly shortens a file that was cut off to what is there, and notes it in its log
_SIZE_NOTE = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
# sizes that programs writing to a pipe put in place of the one they do not know yet
_UNKNOWN_SIZE = 2**31 - 2**16


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


@contextlib.contextmanager
def open_audio(path: str | os.PathLike) -> Iterator[soundfile.SoundFile]:
    """Open a regular file, or a member of a shard that is one, for decoding.

    Named pipes and devices are not opened: that could wait forever. Any
    exception while the file is open becomes UnreadableAudio too.

    Arguments
    ---------
    path : str, Path or ShardMember

    Yields
    ------
    soundfile.SoundFile

    Raises
    ------
    UnreadableAudio
        If it is no regular file, or libsndfile cannot open or decode it, or its sample rate lies
        outside 1 kHz to 1 MHz.
    """
    path = os.fspath(path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_quiet_decoder(path))
            file = stack.enter_context(soundfile.SoundFile(stack.enter_context(_source(path))))
        except UnreadableAudio:
            raise
        except Exception as error:
            raise UnreadableAudio(path, f"cannot be opened: {_reason(error, path)}") from error
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            bound = f"below {LOWEST_RATE}" if file.samplerate < LOWEST_RATE else "above 1 000 000"
            raise UnreadableAudio(path, f"not audio: {file.samplerate} Hz, {bound} Hz")
        try:
            yield file
        except UnreadableAudio:
            raise
        except Exception as error:  # any decoder error: the run goes on
            raise UnreadableAudio(path, f"cannot be decoded: {_reason(error)}") from error


@contextlib.contextmanager
def _source(path: str):
    """What soundfile is given to open: a member's bytes, or the path."""
    member = path if isinstance(path, ShardMember) else None
    found = os.stat(path if member is None else member.shard)
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "something else")
        raise UnreadableAudio(path, f"is {what}: only regular files are opened")
    if (found.st_size if member is None else member.size) == 0:
        raise UnreadableAudio(path, "empty")
    if member is None:
        yield os.fsencode(path)  # soundfile refuses names that are not UTF-8
    else:
        with member.open() as file:
            yield file


def _reason(error: Exception, path: str | None = None) -> str:
    """In one line, what an exception says."""
    reason = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    if path is not None and not isinstance(error, OSError):
        try:  # libsndfile says "System error" only
            with open(path.shard if isinstance(path, ShardMember) else path, "rb"):
                pass
        except OSError as system_error:
            reason = system_error.strerror
        except ValueError:  # a NUL in the path
            pass
    return " ".join(str(reason).split()) or type(error).__name__


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


def _truncation(log: str) -> str | None:
    """What libsndfile's log says of an end that is missing: more than 1 % of the samples (headers
    off by a few bytes are common, and harmless), or an Ogg stream that ends inside a page."""
    note = _SIZE_NOTE.search(log)
    if note:
        promised, found = map(int, note.groups())
        if found < 0.99 * promised and promised < _UNKNOWN_SIZE:
            return f"truncated: {found} of {promised} bytes of samples"
    if "lacks an end-of-stream bit" in log and "Junk after the last page" in log:
        return "truncated: the Ogg stream ends inside a page"
    return None


def read_header(path: str | os.PathLike) -> tuple[int, int]:
    """Samples and sample rate of a file, nothing decoded.

    Raises
    ------
    UnreadableAudio
        As `open_audio`; and if the header tells that the end is missing.

    Example
    -------
    >>> path = getfixture("tmp_path") / "second.wav"
    >>> soundfile.write(path, np.zeros(8_000), 8_000)
    >>> read_header(path)
    (8000, 8000)
    """
    with open_audio(path) as file:
        truncation = _truncation(file.extra_info)
        if truncation:
            raise UnreadableAudio(os.fspath(path), truncation)
        return file.frames, file.samplerate


def read_samples(path: str | os.PathLike, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples `start` to `stop` of a file that was scanned: `read_spans` of one span."""
    return read_spans(path, [(start, stop)], sample_rate)[0]


def read_spans(
    path: str | os.PathLike, spans: list[tuple[int, int]], sample_rate: int
) -> list[np.ndarray]:
    """Several stretches of a file that was scanned, channels averaged, from one opening (Ogg: one
    each).

    Arguments
    ---------
    path : str, Path or ShardMember
    spans : list of (int, int)
        Start and stop of each, in samples at the file's own rate: ascending, without overlap.
    sample_rate : int
        What the scan found, in Hz.

    Returns
    -------
    list of array [stop - start], float32

    Raises
    ------
    UnreadableAudio
        As `open_audio`; if the file is shorter or has another rate than said; and if a sample is
        NaN, infinite or beyond +-1e10.
    """
    path, place, found = os.fspath(path), 0, []
    with open_audio(path) as file:
        if file.samplerate != sample_rate:
            raise _changed(path, file.samplerate, sample_rate)
        if file.format == "OGG" and len(spans) > 1:
            # the second seek of one opening lands elsewhere, by thousands of samples (libsndfile
            # 1.2.2): each span has an opening of its own
            return [read_samples(path, *span, sample_rate) for span in spans]
        for start, stop in spans:
            if start != place and file.seekable():
                file.seek(start)
                place = start
            # GSM 6.10 and some ADPCM can be read from the beginning only
            wav = _mono(file, stop - place)[start - place :]
            place = stop
            if len(wav) < stop - start:
                raise UnreadableAudio(path, TOO_SHORT)
            _check_samples(path, wav)
            found.append(wav)
    return found


def read_blocks(
    path: str | os.PathLike, start: int, stop: int, sample_rate: int, block: int
) -> Iterator[np.ndarray]:
    """Samples `start` to `stop` of a file that was scanned, `block` by block from one opening.

    Yields and raises what `read_samples` returns and raises.
    """
    path = os.fspath(path)
    with open_audio(path) as file:
        if file.samplerate != sample_rate:
            raise _changed(path, file.samplerate, sample_rate)
        if start and file.seekable():
            file.seek(start)
        elif start:
            _mono(file, start)
        for begin in range(start, stop, block):
            wanted = min(block, stop - begin)
            wav = _mono(file, wanted)
            if len(wav) < wanted:
                raise UnreadableAudio(path, TOO_SHORT)
            _check_samples(path, wav)
            yield wav


def _changed(path: str, found: int, expected: int) -> UnreadableAudio:
    reason = f"changed since it was scanned: {found} Hz, was {expected} Hz"
    return UnreadableAudio(path, reason)


def read_whole(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """All samples of a file, channels averaged, and its sample rate.

    Returns
    -------
    wav : array [samples], float32
    sample_rate : int
        Hz.

    Raises
    ------
    UnreadableAudio
        As `open_audio`; if it holds no samples, or more than 1 % of them are missing; and if a
        sample is NaN, infinite or beyond +-1e10.
    """
    path = os.fspath(path)
    with open_audio(path) as file:
        truncation = _truncation(file.extra_info)
        if truncation:
            raise UnreadableAudio(path, truncation)
        wav, promised, rate = _mono(file, file.frames), file.frames, file.samplerate
    if len(wav) == 0:
        raise UnreadableAudio(path, "holds no samples")
    if len(wav) < 0.99 * promised:
        raise UnreadableAudio(path, f"truncated: {len(wav)} of {promised} samples")
    _check_samples(path, wav)
    return wav, rate


def _mono(file: soundfile.SoundFile, count: int) -> np.ndarray:
    """The next `count` samples, or as many as there are, channels averaged."""
    wav = file.read(count, dtype="float32", always_2d=True)
    channels = wav.shape[1]
    if channels == 1:
        return wav[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # `_check_samples` finds these
        # numpy's mean over an axis as short as this takes a hundred times as long
        total = wav[:, 0] + wav[:, 1]
        for channel in range(2, channels):
            total += wav[:, channel]
        return np.divide(total, channels, out=total)


def _check_samples(path: str, wav: np.ndarray) -> None:
    if len(wav) == 0:
        return
    with np.errstate(invalid="ignore"):
        low, high = wav.min(), wav.max()  # NaN if any sample is
    if low >= -LOUDEST and high <= LOUDEST:
        return
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableAudio(path, "holds NaN or infinite samples")
    loudest = max(-low, high)
    raise UnreadableAudio(
        path, f"holds a sample of {loudest:.1e}, beyond {LOUDEST:.0e} (full scale is 1)"
    )
