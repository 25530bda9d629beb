"""The pretrained folder: how an encoder is kept, exchanged and found again.

    config.json         format version, encoder, features, normalisation, how it was trained
    model.safetensors   the encoder's parameters, float32
    hyperparams.yaml    for SpeechBrain's from_hparams; nothing here reads it
    README.md           model card

Loading reads JSON and safetensors (or, from an experiment folder, a state dict with
weights_only=True) and runs no code from the folder.
"""

import json
import re
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechbrain_jepa import features
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

FORMAT_VERSION = 1
MODEL_TYPE = "audio_jepa"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HYPERPARAMS = "hyperparams.yaml"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, HYPERPARAMS, CARD)

EXPERIMENT_CONFIG = "encoder_config.json"  # config.json's content, written when training starts
EXPERIMENT_SAVE = "save"  # SpeechBrain's checkpoints, CKPT+<when>
EXPERIMENT_STATE = "jepa.ckpt"  # state dict of the JEPA in each of them
ENCODERS = {"context": "context_encoder.", "target": "target_encoder."}

# what `LogMelSpectrogram` computes; a folder that asks for anything else cannot be loaded
FEATURES = {
    "sample_rate": features.SAMPLE_RATE,
    "n_fft": features.N_FFT,
    "hop_length": features.HOP_LENGTH,
    "n_mels": features.N_MELS,
    "f_min": features.F_MIN,
    "f_max": features.F_MAX,
    "log_offset": features.LOG_OFFSET,
}


# Writing


def describe(encoder: Encoder, normalization: Normalization, training: dict) -> dict:
    """The content of config.json.

    Arguments
    ---------
    encoder : Encoder
    normalization : Normalization
    training : dict
        How it was trained, in whatever JSON can say: data, masking, steps, ...

    Returns
    -------
    dict
    """
    return {
        "format_version": FORMAT_VERSION,
        "model_type": MODEL_TYPE,
        "encoder": {"grid": asdict(encoder.grid), **encoder.config},
        "features": FEATURES,
        "normalization": {"mean": normalization.mean.item(), "std": normalization.std.item()},
        "training": training,
    }


def write_config(path, encoder: Encoder, normalization: Normalization, training: dict) -> None:
    """Write the content of config.json to `path`, all at once.

    Training writes it to `<output_folder>/encoder_config.json` before the first step, which makes
    the experiment folder loadable from its first checkpoint on.

    Arguments
    ---------
    path : str or Path
        Of the file.
    encoder, normalization, training
        See `describe`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.write_text(_json(describe(encoder, normalization, training)), encoding="utf-8")
    partial.replace(path)


def save_pretrained(
    folder, encoder: Encoder, normalization: Normalization, training: dict | None = None
) -> Path:
    """Write a pretrained folder.

    It is written under another name and renamed when complete. A pretrained folder that is already
    there is replaced as a whole.

    Arguments
    ---------
    folder : str or Path
    encoder : Encoder
    normalization : Normalization
    training : dict or None
        See `describe`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If `folder` holds anything but a pretrained folder: nothing else is ever deleted.

    Example
    -------
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> folder = save_pretrained(
    ...     getfixture("tmp_path") / "tiny", encoder, Normalization(-7.06, 4.19), {"steps": 0}
    ... )
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'config.json', 'hyperparams.yaml', 'model.safetensors']
    >>> loaded, normalization, config = load_pretrained(folder)
    >>> loaded.grid.num_patches, config["training"]
    (65, {'steps': 0})
    """
    return _write_folder(
        folder, describe(encoder, normalization, training or {}), encoder.state_dict()
    )


def export_experiment(experiment_folder, out, which: str = "context") -> Path:
    """Write the newest checkpoint of an experiment as a pretrained folder.

    Arguments
    ---------
    experiment_folder : str or Path
        The `output_folder` of a training run.
    out : str or Path
        The pretrained folder to write.
    which : str
        "context", the encoder that the paper evaluates, or "target", its moving average.

    Returns
    -------
    Path
        The pretrained folder.
    """
    config, state = _read_experiment(Path(experiment_folder), which)
    _build(config, state, experiment_folder)  # what cannot be loaded is not exported
    return _write_folder(out, config, state)


def _write_folder(folder, config: dict, state: dict) -> Path:
    folder = Path(folder)
    _check_replaceable(folder)
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in state.items()
    }
    partial, replaced = _beside(folder), _beside(folder)
    partial.mkdir(parents=True)
    try:
        (partial / CONFIG).write_text(_json(config), encoding="utf-8")
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / HYPERPARAMS).write_text(_HYPERPARAMS, encoding="utf-8")
        (partial / CARD).write_text(_model_card(config, state), encoding="utf-8")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name another folder")
    strange = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if strange:
        raise FileExistsError(
            f"{folder} holds {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}, which "
            "is no part of a pretrained folder: name another folder, or empty this one"
        )


def _beside(path: Path) -> Path:
    """A name in the same folder, hence on the same disk, that nobody else uses."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def _json(config: dict) -> str:
    return json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


# Reading


def load_pretrained(
    source, save_path=None, which: str = "context"
) -> tuple[Encoder, Normalization, dict]:
    """Load an encoder, on the CPU and in eval mode.

    Arguments
    ---------
    source : str or Path
        A pretrained folder, an experiment folder (its newest complete checkpoint is taken), or a
        Hugging Face repo id.
    save_path : str or Path or None
        Where a Hugging Face repo is cached. None: huggingface_hub's own cache.
    which : str
        For an experiment folder: "context" (default) or "target".

    Returns
    -------
    encoder : Encoder
    normalization : Normalization
    config : dict
        The content of config.json.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or repo, or a file or complete checkpoint is missing.
    ValueError
        If a file is not what it should be: the message names file, key and what was expected.
    """
    folder = find_folder(source, save_path)
    if (folder / EXPERIMENT_CONFIG).is_file():
        config, state = _read_experiment(folder, which)
    else:
        config, state = _read_folder(folder)
    return *_build(config, state, source), config


def find_folder(source, save_path=None, **hub_options) -> Path:
    """The local folder behind `source`, downloaded if it is a Hugging Face repo id.

    Arguments
    ---------
    source, save_path
        See `load_pretrained`.
    **hub_options
        For `huggingface_hub.snapshot_download`, such as revision.

    Returns
    -------
    Path
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{source} is a file: give the pretrained folder that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"{source}: no such folder; give a pretrained folder, an experiment folder or a "
            "Hugging Face repo id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                str(source), cache_dir=save_path, allow_patterns=[CONFIG, WEIGHTS], **hub_options
            )
        )
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder, and as a Hugging Face repo id it could not be "
            f"downloaded ({str(error).strip().splitlines()[0]}): check the spelling, and the "
            "network if it is a repo"
        ) from error


def _read_folder(folder: Path) -> tuple[dict, dict]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: a pretrained folder has {CONFIG} and {WEIGHTS}, an "
                f"experiment folder {EXPERIMENT_CONFIG}"
            )
    config = _read_config(folder / CONFIG)
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is not a safetensors file, or is damaged ({error}): "
            "export or download it again"
        ) from error


def _read_config(path: Path) -> dict:
    """config.json, as far as this version understands it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): export or download it again") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"{path} has no format_version: it is not the config of an encoder")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {config['format_version']!r}, this version of "
            f"speechbrain-jepa reads {FORMAT_VERSION}: update the package, or export again"
        )
    for section in ("encoder", "features", "normalization"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{path} has no {section!r} section: export or download it again")
    for name, value in FEATURES.items():
        if config["features"].get(name) != value:
            raise ValueError(
                f"{path} asks for features with {name}={config['features'].get(name)!r}; "
                f"this version of speechbrain-jepa computes {value!r} only"
            )
    return {"training": {}, **config}


def _build(config: dict, state: dict, source) -> tuple[Encoder, Normalization]:
    """The encoder and normalisation that a config and a state dict describe."""
    settings = dict(config["encoder"])
    try:
        encoder = Encoder(PatchGrid(**settings.pop("grid")), **settings)
        normalization = Normalization(**config["normalization"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: the config describes no encoder ({error})") from error
    expected = encoder.state_dict()
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [f"{name} is missing" for name in expected.keys() - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    if wrong:
        listed = "; ".join(sorted(wrong)[:8]) + ("; ..." if len(wrong) > 8 else "")
        raise ValueError(f"{source}: the parameters do not fit the config: {listed}")
    encoder.load_state_dict(state)
    return encoder.eval(), normalization


def _read_experiment(folder: Path, which: str) -> tuple[dict, dict]:
    """Config and state dict of one encoder in the newest complete checkpoint."""
    if which not in ENCODERS:
        raise ValueError(f"which={which!r}: choose one of {', '.join(ENCODERS)}")
    if not (folder / EXPERIMENT_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {EXPERIMENT_CONFIG}: it is not the output_folder of a training run"
        )
    config = _read_config(folder / EXPERIMENT_CONFIG)
    checkpoint, meta = newest_checkpoint(folder)
    try:
        state = torch.load(
            checkpoint / EXPERIMENT_STATE, map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{checkpoint / EXPERIMENT_STATE} is not a state dict, or is damaged ({reason})"
        ) from error
    prefix = ENCODERS[which]
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    facts = {name: value for name, value in meta.items() if isinstance(value, int | float)}
    training = {**config["training"], "encoder": which, "checkpoint": facts}
    return {**config, "training": training}, state


def newest_checkpoint(experiment_folder) -> tuple[Path, dict]:
    """The newest complete checkpoint of a training run.

    Arguments
    ---------
    experiment_folder : str or Path

    Returns
    -------
    folder : Path
    meta : dict
        What SpeechBrain's CKPT.yaml says: unixtime, end-of-epoch, and what training added.

    Raises
    ------
    FileNotFoundError
        If there is none yet.
    """
    save = Path(experiment_folder) / EXPERIMENT_SAVE
    complete = []
    for folder in save.glob("CKPT+*"):
        try:
            meta = yaml.safe_load((folder / "CKPT.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(meta, dict) and "unixtime" in meta and (folder / EXPERIMENT_STATE).is_file():
            complete.append((meta["unixtime"], folder, meta))
    if not complete:
        raise FileNotFoundError(
            f"{save} has no complete checkpoint yet: wait for the first one, or lower "
            "ckpt_interval_minutes"
        )
    _, folder, meta = max(complete, key=lambda found: found[:2])
    return folder, meta


# The two files for people and for SpeechBrain

_HYPERPARAMS = """\
# For SpeechBrain: WaveformEncoder.from_hparams(source=<this folder>). Settings and parameters are
# read from config.json and model.safetensors. Any line can be overridden:
# from_hparams(source=..., overrides={"output_all_hiddens": True})

output_norm: False # layer norm over each clip's output
output_all_hiddens: False # the output of every layer
flat: False # average the frequency patches of a time step instead of concatenating them
normalization: pretraining # or instance
max_windows_per_batch: 128
clip_level: False # one embedding per clip instead of one per time step

encoder: !new:speechbrain_jepa.inference.PretrainedAudioJEPA
    clip_level: !ref <clip_level>
    output_norm: !ref <output_norm>
    output_all_hiddens: !ref <output_all_hiddens>
    flat: !ref <flat>
    normalization: !ref <normalization>
    max_windows_per_batch: !ref <max_windows_per_batch>

modules:
    encoder: !ref <encoder>

pretrainer: !new:speechbrain_jepa.inference.FolderPretrainer
    loadables:
        encoder: !ref <encoder>
"""


def _model_card(config: dict, state: dict) -> str:
    settings, grid = config["encoder"], PatchGrid(**config["encoder"]["grid"])
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    seconds = grid.frames * features.HOP_LENGTH / features.SAMPLE_RATE
    step = grid.patch_time * features.HOP_LENGTH / features.SAMPLE_RATE
    layers = f"{settings['depth']} layers, {settings['num_heads']} heads, {settings['dim']} dims"
    shape = f"{grid.patch_frequency} bands x {grid.patch_time} frames"
    dims = f"{grid.frequency_patches} x {settings['dim']}"
    training = yaml.safe_dump(config["training"], sort_keys=False, allow_unicode=True).strip()
    title, origin, licence = _origin(config["training"])
    return f"""\
---
library_name: speechbrain
pipeline_tag: feature-extraction
tags: [audio, speechbrain, self-supervised, jepa]
license: other # TO BE CHOSEN by whoever publishes this folder
---

# Audio encoder {title}

A vision transformer over log-mel spectrograms (16 kHz audio, {features.N_MELS} bands, 100 frames a
second), {origin}

| | |
| --- | --- |
| encoder | {layers}, {millions:.1f} M parameters |
| window | {grid.frames} frames ({seconds:.2f} s); longer audio is cut into windows |
| patches | {shape}, {grid.frequency_patches} x {grid.time_patches} of them |
| output | one vector of {dims} dims every {step:g} s |

## How it was trained

```yaml
{training}
```

## How to use it

`pip install speechbrain-jepa`. `FOLDER` is this folder, or its Hugging Face repo id.

SpeechBrain:

```python
from speechbrain.inference.encoders import WaveformEncoder
encoder = WaveformEncoder.from_hparams(source="FOLDER")
embeddings = encoder.encode_file("audio.wav")  # [1, time steps, dims]
```

s3prl:

```
pip install 'speechbrain-jepa[s3prl]'
python -m speechbrain_jepa.s3prl run_downstream.py -m train -n my_run -d emotion \\
    -u audio_jepa -k FOLDER
```

PyTorch:

```python
from speechbrain_jepa import AudioJEPA
encoder = AudioJEPA("FOLDER")
embedding = encoder.embed(wav)  # [B, samples] at 16 kHz to [B, dims]
```

## Licence

{licence}
"""


def _origin(training: dict) -> tuple[str, str, str]:
    """Title, description and licence of the model card."""
    if "converted_from" in training:
        return (
            f"converted from {training['converted_from']}",
            f"with the weights of {training['converted_from']} ({training['source']}), converted "
            "by\nspeechbrain-jepa.",
            "That of the original weights.",
        )
    return (
        "pretrained with a JEPA",
        "pretrained without labels by predicting the representations of masked patches:\n"
        'Riou et al., "Investigating Design Choices in Joint-Embedding Predictive Architectures '
        'for General\nAudio Representation Learning", 2024. Written by speechbrain-jepa.',
        "To be filled in by whoever publishes this folder, with regard to the audio it was "
        "trained on.",
    )
