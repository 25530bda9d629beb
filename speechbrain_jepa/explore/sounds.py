"""What is seen and heard of a clip: a small mel picture, and its sound for pages that carry it."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, pad

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.features import N_FFT, SAMPLE_RATE, LogMelSpectrogram

HEIGHT, WIDTH = 40, 96  # pixels of a picture: multiples of a JPEG's blocks of 8
ACROSS = 16  # pictures in a row of a sheet
PER_SHEET = ACROSS * ACROSS
QUALITY = 60
DYNAMIC_RANGE = 70 / (10 / np.log(10))  # of a picture, 70 dB as a natural logarithm of power


@dataclass
class Sounds:
    """Clips that share a sheet of pictures.

    Arguments
    ---------
    seconds : array [n], float32
        Their durations; NaN where a file cannot be read.
    sheet : bytes
        A grey JPEG, ACROSS pictures a row.
    audio : list of bytes
        MP3 of each; empty where there is none.
    problems : list of str
        One line for each file that cannot be read.
    """

    seconds: np.ndarray
    sheet: bytes
    audio: list[bytes]
    problems: list[str]


def mel_picture(wav: torch.Tensor, features: LogMelSpectrogram) -> np.ndarray:
    """The log-mel spectrogram of a clip, as small as a picture on a page.

    Arguments
    ---------
    wav : Tensor [samples]
        Mono, 16 kHz.
    features : LogMelSpectrogram

    Returns
    -------
    array [HEIGHT, WIDTH], uint8
        Low frequencies at the bottom. 255 is the loudest, 0 is 70 dB below.

    Example
    -------
    >>> picture = mel_picture(torch.sin(torch.arange(16_000) / 8), LogMelSpectrogram())
    >>> picture.shape, int(picture.max())
    ((40, 96), 255)
    """
    wav = pad(wav, (0, max(N_FFT - len(wav), 0)))
    spectrogram = adaptive_avg_pool2d(features(wav[None]), (HEIGHT, WIDTH))[0]
    shade = 1 + (spectrogram - spectrogram.max()) / DYNAMIC_RANGE
    return (255 * shade.clamp(0, 1)).round().byte().flip(0).numpy()


def as_mp3(wav: torch.Tensor) -> bytes:
    """A clip [samples] at 16 kHz, in a format that every browser plays."""
    out = io.BytesIO()
    soundfile.write(
        out, wav.clamp(-1, 1).numpy(), SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III"
    )
    return out.getvalue()


def read_sounds(paths: Sequence[str], with_audio: bool, num_workers: int = 2) -> Iterator[Sounds]:
    """Sheet by sheet, what is seen and heard of files.

    Arguments
    ---------
    paths : sequence of str
    with_audio : bool
        Whether their sound is wanted too.
    num_workers : int
        Decoding threads. Default 2.

    Yields
    ------
    Sounds
        Of PER_SHEET files each.
    """
    features = LogMelSpectrogram()

    @torch.inference_mode()
    def read(path: str):
        try:
            wav = read_audio(path)
        except UnreadableAudio as error:
            return np.nan, np.zeros((HEIGHT, WIDTH), np.uint8), b"", str(error)
        sound = as_mp3(wav) if with_audio else b""
        return len(wav) / SAMPLE_RATE, mel_picture(wav, features), sound, None

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for first in range(0, len(paths), PER_SHEET):
            clips = list(pool.map(read, paths[first : first + PER_SHEET]))
            seconds, pictures, audio, problems = zip(*clips)
            yield Sounds(
                np.array(seconds, np.float32),
                _sheet(pictures),
                list(audio),
                [problem for problem in problems if problem is not None],
            )


def _sheet(pictures: Sequence[np.ndarray]) -> bytes:
    rows = -(-len(pictures) // ACROSS)
    sheet = np.zeros((rows, ACROSS, HEIGHT, WIDTH), np.uint8)
    sheet.reshape(-1, HEIGHT, WIDTH)[: len(pictures)] = pictures
    image = Image.fromarray(sheet.transpose(0, 2, 1, 3).reshape(rows * HEIGHT, ACROSS * WIDTH))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()
