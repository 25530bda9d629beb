"""What s3prl 0.4.18 imports and today's packages no longer have.

torchaudio 2.9 dropped audio backends, sox effects and `info`, and its `load` and `save` need
torchcodec; huggingface_hub 1.0 dropped `HfFolder` and `Repository`; since torch 2.6, `torch.load`
refuses the argparse.Namespace in s3prl's own checkpoints. `supply` puts in what is missing, and
nothing where s3prl finds what it needs.
"""

import argparse
import re
import sys
import types
import warnings
from functools import cache
from typing import NamedTuple

import huggingface_hub
import soundfile
import torch
import torchaudio
from torch import Tensor

NUMBER = r"[+-]?\d+(\.\d*)?"
# libsndfile's names in torchaudio's terms
_ENCODINGS = {
    "PCM_S8": ("PCM_S", 8),
    "PCM_U8": ("PCM_U", 8),
    "PCM_16": ("PCM_S", 16),
    "PCM_24": ("PCM_S", 24),
    "PCM_32": ("PCM_S", 32),
    "FLOAT": ("PCM_F", 32),
    "DOUBLE": ("PCM_F", 64),
    "ULAW": ("ULAW", 8),
    "ALAW": ("ALAW", 8),
    "VORBIS": ("VORBIS", 0),
    "OPUS": ("OPUS", 0),
    "MPEG_LAYER_III": ("MP3", 0),
}


@cache
def supply() -> list[str]:
    """Supply the missing names; a second call does nothing.

    Returns
    -------
    list of str
        What was supplied; empty where s3prl works without.
    """
    supplied = []

    def put(module, name: str, value) -> None:
        setattr(module, name, value)
        supplied.append(f"{module.__name__}.{name}")

    if not hasattr(torchaudio, "set_audio_backend"):
        put(torchaudio, "set_audio_backend", lambda backend: None)
        put(torchaudio, "info", info)
        if not _has_torchcodec():
            put(torchaudio, "load", load)
            put(torchaudio, "save", save)
    if not _has_sox():
        if not hasattr(torchaudio, "sox_effects"):
            torchaudio.sox_effects = types.ModuleType("torchaudio.sox_effects")
            sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects
        put(torchaudio.sox_effects, "apply_effects_tensor", apply_effects_tensor)
        put(torchaudio.sox_effects, "apply_effects_file", apply_effects_file)
    for cls in (HfFolder, Repository):
        if not hasattr(huggingface_hub, cls.__name__):
            put(huggingface_hub, cls.__name__, cls)
    if argparse.Namespace not in torch.serialization.get_safe_globals():
        torch.serialization.add_safe_globals([argparse.Namespace])
        supplied.append("torch.load of argparse.Namespace")
    return supplied


def _has_torchcodec() -> bool:
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # the last two: it finds no FFmpeg
        return False
    return True


def _has_sox() -> bool:
    """Whether torchaudio has sox effects, and finds the libsox that they need."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are deprecated in 2.8
            torchaudio.sox_effects.effect_names()
    except (AttributeError, OSError):
        return False
    return True


# torchaudio


class AudioMetaData(NamedTuple):
    """As torchaudio.info gave it."""

    sample_rate: int
    num_frames: int
    num_channels: int
    bits_per_sample: int
    encoding: str


def info(uri, format=None, buffer_size=4096, backend=None) -> AudioMetaData:
    """torchaudio.info, through soundfile.

    Example
    -------
    >>> path = str(getfixture("tmp_path") / "a.wav")
    >>> save(path, torch.zeros(2, 800), 16_000)
    >>> tuple(info(path))  # rate, frames, channels, bits, encoding
    (16000, 800, 2, 32, 'PCM_F')
    """
    file = soundfile.info(str(uri))
    encoding, bits = _ENCODINGS.get(file.subtype, ("UNKNOWN", 0))
    if file.format == "FLAC":
        encoding = "FLAC"
    return AudioMetaData(file.samplerate, file.frames, file.channels, bits, encoding)


def load(
    uri,
    frame_offset=0,
    num_frames=-1,
    normalize=True,
    channels_first=True,
    format=None,
    buffer_size=4096,
    backend=None,
) -> tuple[Tensor, int]:
    """torchaudio.load, through soundfile: always float32, as in torchaudio 2.9 and later."""
    wav, sample_rate = soundfile.read(
        str(uri), num_frames, frame_offset, dtype="float32", always_2d=True
    )
    wav = torch.from_numpy(wav)
    return wav.T if channels_first else wav, sample_rate


def save(uri, src, sample_rate, channels_first=True, **ignored) -> None:
    """torchaudio.save of float32, through soundfile."""
    wav = src.detach().cpu().float().numpy()
    subtype = "FLOAT" if str(uri).lower().endswith(".wav") else None
    soundfile.write(str(uri), wav.T if channels_first else wav, sample_rate, subtype)


# sox effects


def apply_effects_file(
    path, effects, normalize=True, channels_first=True, format=None
) -> tuple[Tensor, int]:
    """torchaudio.sox_effects.apply_effects_file for the effects channels, rate and gain."""
    wav, sample_rate = load(path, channels_first=channels_first)
    return apply_effects_tensor(wav, sample_rate, effects, channels_first)


def apply_effects_tensor(tensor, sample_rate, effects, channels_first=True) -> tuple[Tensor, int]:
    """torchaudio.sox_effects.apply_effects_tensor for the effects channels, rate and gain.

    Raises
    ------
    NotImplementedError
        For any other effect, or these with options.

    Example
    -------
    >>> effects = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
    >>> wav, sample_rate = apply_effects_tensor(torch.full((2, 8_000), 0.5), 8_000, effects)
    >>> wav.shape, sample_rate, round(wav[0, 8_000].item(), 3)
    (torch.Size([1, 16000]), 16000, 0.354)
    """
    wav = tensor if channels_first else tensor.T
    for effect in effects:
        name, *arguments = effect
        if name == "channels" and arguments == ["1"]:
            wav = wav.mean(0, keepdim=True)
        elif name == "rate" and len(arguments) == 1 and arguments[0].isdigit():
            wav = torchaudio.functional.resample(wav, sample_rate, int(arguments[0]))
            sample_rate = int(arguments[0])
        elif name == "gain" and len(arguments) == 1 and re.fullmatch(NUMBER, arguments[0]):
            wav = (wav * 10 ** (float(arguments[0]) / 20)).clamp(-1, 1)  # sox clips
        else:
            raise NotImplementedError(
                f"sox effect {' '.join(effect)!r}: speechbrain_jepa supplies `channels 1`, `rate` "
                "and `gain`; for others use torch 2.8 with torchaudio 2.8, and install libsox"
            )
    return wav if channels_first else wav.T, sample_rate


# huggingface_hub


class HfFolder:
    """Of huggingface_hub < 1: the stored token."""

    @staticmethod
    def get_token() -> str | None:
        return huggingface_hub.get_token()

    @staticmethod
    def save_token(token: str) -> None:
        huggingface_hub.login(token)


class Repository:
    """Of huggingface_hub < 1: a git clone of a repo. s3prl imports it for --push_to_hf_hub only."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            f"huggingface_hub {huggingface_hub.__version__} has no Repository: "
            "--push_to_hf_hub needs huggingface_hub < 1"
        )
