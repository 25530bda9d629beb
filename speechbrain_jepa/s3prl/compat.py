"""What s3prl 0.4.18 imports and today's packages no longer have.

torchaudio 2.9 dropped audio backends, sox effects and `info`, and its `load` and `save` need
torchcodec; huggingface_hub 1.0 dropped `HfFolder` and `Repository`; since torch 2.6, `torch.load`
refuses the argparse.Namespace in s3prl's own checkpoints; catalyst's last release cannot be
installed by pip 24.1 and later. `supply` puts in what is missing, and nothing where s3prl finds
what it needs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import soundfile
import torch
import torchaudio
from torch import Tensor
from torch.utils.data import DistributedSampler

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
    if find_spec("catalyst") is None:
        catalyst, data, sampler = (
            module_from_spec(ModuleSpec(name, None, is_package=True))
            for name in ("catalyst", "catalyst.data", "catalyst.data.sampler")
        )
        sys.modules |= {module.__name__: module for module in (catalyst, data, sampler)}
        catalyst.data, data.sampler = data, sampler  # type: ignore[attr-defined]
        put(sampler, "DistributedSamplerWrapper", DistributedSamplerWrapper)
    return supplied


def hide_cuda() -> None:
    """For --device cpu: s3prl asks for GPUs that it finds, and speaker verification calls .cuda().

    Call it before CUDA is used.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]


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
    """torchaudio.sox_effects.apply_effects_file, see `apply_effects_tensor`."""
    wav, sample_rate = load(path, channels_first=channels_first)
    return apply_effects_tensor(wav, sample_rate, effects, channels_first)


def apply_effects_tensor(tensor, sample_rate, effects, channels_first=True) -> tuple[Tensor, int]:
    """torchaudio.sox_effects.apply_effects_tensor.

    The effects channels, rate and gain are computed here; a chain with any other goes through the
    program sox.

    Raises
    ------
    NotImplementedError
        If another effect is asked for, and there is no program sox.
    RuntimeError
        With what sox says, if it fails.

    Example
    -------
    >>> effects = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
    >>> wav, sample_rate = apply_effects_tensor(torch.full((2, 8_000), 0.5), 8_000, effects)
    >>> wav.shape, sample_rate, round(wav[0, 8_000].item(), 3)
    (torch.Size([1, 16000]), 16000, 0.354)
    """
    wav = tensor if channels_first else tensor.T
    if others := [effect for effect in effects if not _is_ours(*effect)]:
        wav, sample_rate = _run_sox(wav, sample_rate, effects, others[0])
        return wav if channels_first else wav.T, sample_rate
    for name, argument in effects:
        if name == "channels":
            wav = wav.mean(0, keepdim=True)
        elif name == "rate":
            wav = torchaudio.functional.resample(wav, sample_rate, int(argument))
            sample_rate = int(argument)
        else:
            wav = (wav * 10 ** (float(argument) / 20)).clamp(-1, 1)  # sox clips
    return wav if channels_first else wav.T, sample_rate


def _is_ours(name, *arguments) -> bool:
    patterns = {"channels": "1", "rate": r"\d+", "gain": NUMBER}
    pattern = patterns.get(name)
    return pattern is not None and len(arguments) == 1 and bool(re.fullmatch(pattern, arguments[0]))


def _run_sox(wav: Tensor, sample_rate: int, effects, missing) -> tuple[Tensor, int]:
    """A chain of effects on [channels, samples], through the program."""
    program = shutil.which("sox")
    if program is None:
        raise NotImplementedError(
            f"sox effect {' '.join(missing)!r}: speechbrain_jepa supplies `channels 1`, `rate` and "
            "`gain`; others need the program sox: apt install sox"
        )
    with tempfile.TemporaryDirectory(prefix="sox-") as folder:
        before, after = Path(folder) / "before.wav", Path(folder) / "after.wav"
        save(before, wav, sample_rate)
        command = [program, "-V1", "-D", str(before), "-b", "32", "-e", "float", str(after)]
        command += [word for effect in effects for word in effect]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"sox {effects} failed:\n{done.stderr}")
        return load(after)


# catalyst


class DistributedSamplerWrapper(DistributedSampler):
    """Of catalyst: each process takes its share of what another sampler draws.

    Every process has to draw the same, so the sampler wants the same generator, or the same seed,
    in all of them, as run_downstream.py sets it.

    Arguments
    ---------
    sampler : Sampler
        Such as torch.utils.data.WeightedRandomSampler.
    num_replicas, rank, shuffle
        As in torch.utils.data.DistributedSampler. `shuffle` reorders what is drawn.

    Example
    -------
    >>> parts = [DistributedSamplerWrapper(range(10, 15), 2, rank, False) for rank in (0, 1)]
    >>> [list(part) for part in parts]  # what is drawn, then from its beginning again
    [[10, 12, 14], [11, 13, 10]]
    """

    def __init__(self, sampler, num_replicas=None, rank=None, shuffle=True):
        super().__init__(sampler, num_replicas, rank, shuffle)
        self.sampler = sampler

    def __iter__(self):
        drawn = list(self.sampler)
        return (drawn[place] for place in super().__iter__())


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
