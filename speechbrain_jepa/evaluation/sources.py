"""Encoders by name, all with one interface: clips of equal length in, a vector per layer out.

| name | encoder |
| --- | --- |
| a folder, or a Hugging Face repo of this package | `AudioJEPA` |
| `random` | the paper's ViT-Base, untrained |
| `random:<folder>` | the encoder of a folder, untrained |
| `logmel` | mean and deviation over time of each log-mel band |
| `s3prl:<upstream>` or `s3prl:<upstream>@<checkpoint>` | any upstream of s3prl |
| `hf:<repo or folder>` | wav2vec 2.0, HuBERT, WavLM, data2vec, W2V-BERT, MERT by SpeechBrain |

Without a prefix, the name of an upstream is looked up in s3prl, and `owner/name` at Hugging Face.
Shapes: B clips, L layers, C dims.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchaudio
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor, nn

from speechbrain_jepa import __version__
from speechbrain_jepa.checkpoints import load_pretrained
from speechbrain_jepa.config import CONFIG, MODEL_TYPE, log_mel_of
from speechbrain_jepa.embed import PRECISIONS
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation.logmel import logmel_statistics
from speechbrain_jepa.features import SAMPLE_RATE, LogMelSpectrogram, Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

# model_type of a Hugging Face config: where SpeechBrain wraps it
WRAPPERS = {
    "wav2vec2": ("wav2vec2", "Wav2Vec2"),
    "data2vec-audio": ("wav2vec2", "Wav2Vec2"),
    "hubert": ("hubert", "HuBERT"),
    "wavlm": ("wavlm", "WavLM"),
    "wav2vec2-bert": ("w2v_bert", "W2VBert"),
    "mert_model": ("mert", "MERT"),
}


@dataclass
class Source:
    """A frozen encoder under its name.

    Arguments
    ---------
    name : str
        As it is shown in tables.
    module : nn.Module
        Holds the weights.
    layer_means : callable
        Waveforms [B, samples] at 16 kHz to the mean over time of each layer, [L, B, C].
    settings : dict
        What the embeddings depend on, beside the weights.
    precision : str
        "fp32", "bf16" or "fp16".
    """

    name: str
    module: nn.Module
    layer_means: Callable[[Tensor], Tensor]
    settings: dict = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        # not the state dict: the log-mel's buffers are not in it
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @torch.inference_mode()
    def embed(self, wav: Tensor) -> Tensor:
        """Waveforms [B, samples] at 16 kHz to [L, B, C], float32, on the CPU."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.layer_means(wav.to(self.device)).float().cpu()

    @property
    def fits_data(self) -> bool:
        """Whether the log-mel normalisation is measured anew on each data set."""
        return isinstance(self.module, AudioJEPA) and self.module.normalize == "dataset"

    def fit(self, batches: Iterable[Tensor]) -> dict:
        """Measure mean and deviation of the log-mel on batches [B, samples], and give them."""
        assert isinstance(self.module, AudioJEPA)  # `fits_data`
        pair = self.module.fit_normalization(batches).normalization
        return {"mean": pair.mean.item(), "std": pair.std.item()}

    def set_normalization(self, mean: float, std: float) -> None:
        """Take a pair that `fit` has given before."""
        assert isinstance(self.module, AudioJEPA)  # `fits_data`
        self.module.normalization.set(mean, std)

    def fingerprint(self) -> dict:
        """Whatever the embeddings depend on: weights, settings, precision, package version."""
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            if self.fits_data and name.startswith("normalization."):
                continue  # measured on the data, not part of the weights
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return {
            "weights": digest.hexdigest()[:16],
            "precision": self.precision,
            "version": __version__,
            **self.settings,
        }


def load_source(
    name,
    all_layers: bool = False,
    normalization: str = "dataset",
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    save_path=None,
    trust_remote_code: bool = False,
) -> Source:
    """Load an encoder by its name (see the table above).

    Arguments
    ---------
    name : str or Path
    all_layers : bool
        Give what enters the first layer and leaves each. Default False: the last layer only.
    normalization : str
        Of our encoders' log-mel: "dataset" (default, the paper's evaluation), "pretraining" or
        "instance".
    precision : str
        "fp32" (default), "bf16" or "fp16". log-mel statistics are always float32.
    device : str or torch.device
    seed : int
        Of the untrained encoders' weights. Default 0.
    save_path : str or Path or None
        Where what is downloaded is cached. None: the libraries' own caches.
    trust_remote_code : bool
        Allow models whose code comes from their repo (MERT). Default False.

    Returns
    -------
    Source

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        If there is no such encoder, or its library is not installed.

    Example
    -------
    >>> load_source("logmel").embed(torch.randn(2, 16_000)).shape
    torch.Size([1, 2, 160])
    """
    name = os.fspath(name)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    kind, _, rest = name.partition(":")
    if name == "logmel":
        return _log_mel(device)
    if kind == "random" and not Path(name).exists():
        encoder, settings = _untrained(rest, seed)
        model = AudioJEPA(encoder, normalization=normalization, output_all_hiddens=all_layers)
        name = f"random:{_folder_name(rest)}" if rest else name
        return _audio_jepa(name, model.to(device), precision, settings)
    if kind == "s3prl":
        return _s3prl(name, rest, all_layers, precision, device)
    if kind == "hf":
        return _hugging_face(
            name, rest, all_layers, precision, device, save_path, trust_remote_code
        )
    if Path(name).exists() or _is_ours(name, save_path):
        model = AudioJEPA(
            name, save_path, normalization=normalization, output_all_hiddens=all_layers
        )
        return _audio_jepa(_folder_name(name), model.to(device), precision, {})
    if "/" in name:
        return _hugging_face(
            name, name, all_layers, precision, device, save_path, trust_remote_code
        )
    return _s3prl(name, name, all_layers, precision, device)


def _log_mel(device) -> Source:
    features = LogMelSpectrogram().to(device)
    return Source(
        name="logmel",
        module=features,
        layer_means=lambda wav: torch.from_numpy(logmel_statistics(wav, features))[None],
        settings={"statistics": "mean and deviation"},
    )


def _untrained(folder: str, seed: int):
    """The encoder and normalisation of a folder, or the paper's, with weights of a seed."""
    grid, normalization = PatchGrid(), Normalization(-7.0633, 4.1971)  # AudioSet's
    config: dict[str, Any] = {}
    log_mel = LogMelSpectrogram()
    if folder:
        loaded, normalization, description = load_pretrained(folder)
        grid, config = loaded.grid, loaded.config
        log_mel = log_mel_of(description)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(grid, **config)
    return (encoder, normalization, log_mel), {"seed": seed}


def _audio_jepa(name: str, model: AudioJEPA, precision: str, settings: dict) -> Source:
    def layer_means(wav):
        means = model.embed(wav)
        return means if model.output_all_hiddens else means[None]

    settings = {
        **settings,
        "normalization": model.normalize,
        "grid": str(model.encoder.grid),
        "encoder": str(model.encoder.config),
        "n_fft": model.features.n_fft,
        "read_out": str(model.read_out),
    }
    return Source(name, model, layer_means, settings, precision)


def _folder_name(name: str) -> str:
    """What to call a folder: `pretrained` and the names of seeds say nothing on their own."""
    parts = [part for part in Path(name).parts if part not in (os.sep, ".", "..")]
    if len(parts) > 1 and parts[-1] == "pretrained":
        parts = parts[:-1]
    return "/".join(parts[-2:]) if parts and parts[-1].isdigit() else (parts or [name])[-1]


def _is_ours(name: str, save_path) -> bool:
    """Whether `owner/name` at Hugging Face is a pretrained folder of this package."""
    if name.count("/") != 1:
        return False
    config = _hub_config(name, save_path)
    return config is not None and config.get("model_type") == MODEL_TYPE


def _hub_config(name: str, save_path) -> dict | None:
    """config.json of a repo, or None where there is none to be had."""
    try:
        path = hf_hub_download(name, CONFIG, cache_dir=save_path)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _s3prl(name: str, upstream: str, all_layers: bool, precision: str, device) -> Source:
    upstream, _, checkpoint = upstream.partition("@")
    try:
        from s3prl import hub
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"--encoder {name}: is no folder here, and for an upstream s3prl cannot be imported "
            f"({error}): check the path, or pip install '.[s3prl]' in a clone of this repository"
        ) from error
    entry = getattr(hub, upstream, None)
    if entry is None:
        raise ValueError(
            f"--encoder {name}: there is no folder and no s3prl upstream of this name "
            "(python -c 'import s3prl.hub as hub; print(hub.options())' lists those)"
        )
    model = (entry(checkpoint) if checkpoint else entry()).to(device).eval()

    def layer_means(wav):
        states = model(list(wav))["hidden_states"]
        return torch.stack([layer.mean(1) for layer in (states if all_layers else states[-1:])])

    return Source(name, model, layer_means, {"upstream": upstream}, precision)


def _hugging_face(
    name: str, repo: str, all_layers: bool, precision: str, device, save_path, trust: bool
) -> Source:
    try:
        from transformers import PretrainedConfig
    except ImportError as error:
        raise ImportError(
            f"--encoder {name}: Hugging Face models need transformers: pip install transformers"
        ) from error
    try:
        config, _ = PretrainedConfig.get_config_dict(repo, cache_dir=save_path)
    except OSError as error:
        raise FileNotFoundError(
            f"--encoder {name}: no such folder, and no Hugging Face repo could be downloaded "
            f"({str(error).strip().splitlines()[0]}): check the spelling, and the network"
        ) from error
    kind = config.get("model_type")
    if kind not in WRAPPERS:
        raise ValueError(
            f"--encoder {name} has model_type {kind!r}: SpeechBrain wraps "
            f"{', '.join(sorted(WRAPPERS))}"
        )
    if kind == "mert_model" and not trust:
        raise ValueError(
            f"--encoder {name} runs code from its repo: read it, then set trust_remote_code: True"
        )
    module, wrapper = WRAPPERS[kind]
    wrapper = getattr(
        importlib.import_module(f"speechbrain.integrations.huggingface.{module}"), wrapper
    )
    save_path = str(save_path or HF_HUB_CACHE)
    model = wrapper(repo, save_path, freeze=True, output_all_hiddens=all_layers).to(device).eval()
    extractor = getattr(model, "feature_extractor", None)
    rate = getattr(extractor, "sampling_rate", SAMPLE_RATE)

    def layer_means(wav):
        wav = torchaudio.functional.resample(wav, SAMPLE_RATE, rate)
        states = model(wav)
        return states.mean(-2) if all_layers else states.mean(-2)[None]

    return Source(name, model, layer_means, {"repo": repo, "sampling_rate": rate}, precision)
