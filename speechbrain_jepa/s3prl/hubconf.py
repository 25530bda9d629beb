"""The entries on `s3prl.hub`.

Each takes what s3prl's own entries take, `ckpt` (-k), `model_config` (-g) and `refresh` (-r), and
options of `AudioJEPA` such as flat=True, in S3PRLUpstream's `extra_conf`.
"""

from pathlib import Path

from speechbrain_jepa.checkpoints import find_folder
from speechbrain_jepa.s3prl.expert import UpstreamExpert as _UpstreamExpert
from speechbrain_jepa.s3prl.sources import download, is_url

__all__ = [
    "audio_jepa",
    "audio_jepa_20ms",
    "audio_jepa_40ms",
    "audio_jepa_hf",
    "audio_jepa_local",
    "audio_jepa_url",
]


def audio_jepa(ckpt=None, refresh=False, **options):
    """Any source: folder, file, URL, or Hugging Face repo id. None: the package's own encoder."""
    if ckpt is None:
        return _UpstreamExpert(None, **options)
    if is_url(ckpt):
        return audio_jepa_url(ckpt, refresh, **options)
    if Path(ckpt).expanduser().exists():
        return audio_jepa_local(ckpt, refresh, **options)
    return audio_jepa_hf(ckpt, refresh, **options)


def audio_jepa_20ms(ckpt=None, **options):
    """As `audio_jepa`, with time steps of 20 ms."""
    return audio_jepa(ckpt, step_seconds=0.02, **options)


def audio_jepa_40ms(ckpt=None, **options):
    """As `audio_jepa`, with time steps of 40 ms."""
    return audio_jepa(ckpt, step_seconds=0.04, **options)


def audio_jepa_local(ckpt, refresh=False, **options):
    """A pretrained folder, its model.safetensors, an experiment folder, or a zip or tar."""
    if not Path(ckpt).expanduser().exists():
        raise FileNotFoundError(
            f"{ckpt}: no such file or folder; audio_jepa_local takes what is on this machine, "
            "audio_jepa_url a URL, audio_jepa_hf a Hugging Face repo id, audio_jepa all of them"
        )
    return _UpstreamExpert(ckpt, **options)


def audio_jepa_url(ckpt, refresh=False, **options):
    """The URL of a zip or tar, or of a pretrained folder's model.safetensors."""
    return _UpstreamExpert(download(ckpt, refresh), **options)


def audio_jepa_hf(ckpt, refresh=False, revision=None, save_path=None, **options):
    """A Hugging Face repo id; `revision` is a branch, tag or commit of it."""
    folder = find_folder(ckpt, save_path, revision=revision, force_download=refresh)
    return _UpstreamExpert(folder, **options)
