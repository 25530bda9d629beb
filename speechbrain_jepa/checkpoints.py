"""The pretrained folder: how an encoder is kept, exchanged and found again.

    config.json         what the encoder is, what an embedding reads of it, how it was trained
    model.safetensors   the encoder's parameters, float32 or (--half) float16
    hyperparams.yaml    for SpeechBrain's from_hparams; nothing here reads it
    README.md           model card

Loading reads JSON and safetensors (or, from an experiment folder, a state dict with
weights_only=True) and runs no code from the folder.
"""

import errno
import json
import math
import re
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from speechbrain_jepa.config import CONFIG, describe, read_config
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.files import whole_folder, write_text
from speechbrain_jepa.model_card import HYPERPARAMS_TEXT, model_card
from speechbrain_jepa.read_out import ReadOut
from speechbrain_jepa.untrusted import (
    Weights,
    build_encoder,
    check_finite,
    checked_encoder,
    checked_log_mel,
    checked_normalization,
    checked_read_out,
    read_safetensors,
    read_state_dict,
    short,
)
from speechbrain_jepa.vit import Encoder

WEIGHTS = "model.safetensors"
HYPERPARAMS = "hyperparams.yaml"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, HYPERPARAMS, CARD)

EXPERIMENT_CONFIG = "encoder_config.json"  # config.json's content, written when training starts
EXPERIMENT_SAVE = "save"  # SpeechBrain's checkpoints, CKPT+<when>
EXPERIMENT_STATE = "jepa.ckpt"  # state dict of the JEPA in each of them
ENCODERS = {"context": "context_encoder.", "target": "target_encoder."}

WEIGHTS_FOLDER = Path(__file__).parent / "weights"  # pretrained folders that come with the package
DEFAULT_ENCODER = "tiny"  # of them

# Writing


def write_config(
    path,
    encoder: Encoder,
    normalization: Normalization,
    training: dict,
    read_out: ReadOut | None = None,
    log_mel: LogMelSpectrogram | None = None,
) -> None:
    """Write the content of config.json to `path`, all at once.

    Training writes it to `<output_folder>/encoder_config.json` before the first step, which makes
    the experiment folder loadable from its first checkpoint on.

    Arguments
    ---------
    path : str or Path
        Of the file.
    encoder, normalization, training, read_out, log_mel
        See `speechbrain_jepa.config.describe`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _json(describe(encoder, normalization, training, read_out, log_mel)))


def save_pretrained(
    folder,
    encoder: Encoder,
    normalization: Normalization,
    training: dict | None = None,
    read_out: ReadOut | None = None,
    log_mel: LogMelSpectrogram | None = None,
) -> Path:
    """Write a pretrained folder.

    It is written under another name and renamed when complete. A pretrained folder that is already
    there is replaced as a whole. What a killed process left of writing it is removed first.

    Arguments
    ---------
    folder : str or Path
    encoder : Encoder
    normalization : Normalization
    training : dict or None
    read_out : ReadOut or None
    log_mel : LogMelSpectrogram or None
        See `speechbrain_jepa.config.describe`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If `folder` holds anything but a pretrained folder: nothing else is ever deleted.
    FolderInUse
        If another process is writing it.
    ValueError
        If a weight or the normalisation is NaN or infinite.
    OSError
        If the disk is full: the message names it.

    Example
    -------
    >>> from speechbrain_jepa.vit import PatchGrid
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
    check_finite(encoder, folder)
    config = describe(encoder, normalization, training or {}, read_out, log_mel)
    return _write_folder(folder, config, encoder)


def export_experiment(
    experiment_folder,
    out,
    which: str = "context",
    half: bool = False,
    layers=None,
    pooling: str | None = None,
) -> Path:
    """Write the newest checkpoint of an experiment as a pretrained folder.

    Arguments
    ---------
    experiment_folder : str or Path
        The `output_folder` of a training run.
    out : str or Path
        The pretrained folder to write.
    which : str
        "context", the encoder that the paper evaluates, or "target", its moving average.
    half : bool
        Write the parameters as float16: half the size. They are float32 again when loaded.
        Default False.
    layers, pooling
        Of `ReadOut`: what `AudioJEPA.embed` is to read. None: as the training run has it.

    Returns
    -------
    Path
        The pretrained folder.
    """
    config, path, weights = _read_experiment(Path(experiment_folder), which)
    encoder, _ = _build(config, path, weights)  # what cannot be loaded is not exported
    read_out = ReadOut(**config["embedding"]).chosen(layers, pooling)
    read_out.numbers(1 + len(encoder.blocks))
    config = {**config, "embedding": read_out.describe()}
    return _write_folder(out, config, encoder, torch.float16 if half else torch.float32)


def _write_folder(folder, config: dict, encoder: Encoder, dtype=torch.float32) -> Path:
    folder = Path(folder)
    _check_replaceable(folder)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    parameters = sum(tensor.numel() for tensor in state.values())
    with whole_folder(folder) as partial:
        (partial / CONFIG).write_text(_json(config), encoding="utf-8")
        _save_safetensors(state, partial / WEIGHTS)
        (partial / HYPERPARAMS).write_text(HYPERPARAMS_TEXT, encoding="utf-8")
        (partial / CARD).write_text(model_card(config, parameters), encoding="utf-8")
        _check_replaceable(folder)
    return folder


def _save_safetensors(state: dict, path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # that of any new file; save_file's own is readable by nobody else
    try:
        save_file(state, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # raised for a full disk too, and no OSError
        raise OSError(errno.EIO, str(error)) from error


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


def _json(config: dict) -> str:
    return json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


# Reading


def load_pretrained(
    source, save_path=None, which: str = "context"
) -> tuple[Encoder, Normalization, dict]:
    """Load an encoder, on the CPU and in eval mode.

    Arguments
    ---------
    source : str, Path or None
        A pretrained folder, an experiment folder (its newest complete checkpoint is taken), a
        Hugging Face repo id, or the name of an encoder that comes with the package (see
        `packaged_encoders`). None: "tiny".
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
        config, path, weights = _read_experiment(folder, which)
    else:
        config, path, weights = _read_folder(folder)
    return *_build(config, path, weights), config


def packaged_encoders() -> dict[str, Path]:
    """The encoders that come with the package, by name. A folder of that name goes before them."""
    return {path.parent.name: path.parent for path in sorted(WEIGHTS_FOLDER.glob(f"*/{CONFIG}"))}


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
    packaged = packaged_encoders()
    if source is None:
        if DEFAULT_ENCODER not in packaged:
            raise FileNotFoundError(
                "no encoder comes with this version: give a pretrained folder, an experiment "
                "folder or a Hugging Face repo id"
            )
        return packaged[DEFAULT_ENCODER]
    try:
        folder = Path(source).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a string that cannot be a path
        raise FileNotFoundError(f"{short(str(source))}: no such folder ({error})") from error
    if is_folder:
        return folder
    if exists:
        raise FileNotFoundError(f"{source} is a file: give the pretrained folder that holds it")
    if str(source) in packaged:
        return packaged[str(source)]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"{source}: no such folder; give a pretrained folder, an experiment folder or a "
            "Hugging Face repo id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        hub_options = {"allow_patterns": [CONFIG, WEIGHTS], **hub_options}
        return Path(snapshot_download(str(source), cache_dir=save_path, **hub_options))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder, and as a Hugging Face repo id it could not be "
            f"downloaded ({str(error).strip().splitlines()[0]}): check the spelling, and the "
            "network if it is a repo"
        ) from error


def _read_folder(folder: Path) -> tuple[dict, Path, Weights]:
    """Config, the path of its file, and the header of the weights."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: a pretrained folder has {CONFIG} and {WEIGHTS}, an "
                f"experiment folder {EXPERIMENT_CONFIG}"
            )
    return read_config(folder / CONFIG), folder / CONFIG, read_safetensors(folder / WEIGHTS)


def _build(config: dict, path: Path, weights: Weights) -> tuple[Encoder, Normalization]:
    """The encoder and normalisation of a config, whose file is `path`, and weights."""
    try:
        checked_encoder(config["encoder"])
        normalization = checked_normalization(config["normalization"])
        checked_log_mel(config["features"], config["encoder"]["grid"]["bands"])
        checked_read_out(config["embedding"], config["encoder"]["depth"])
    except ValueError as error:
        raise ValueError(f"{path}: the config describes no encoder ({error})") from error
    return build_encoder(config["encoder"], weights), normalization


def _read_experiment(folder: Path, which: str) -> tuple[dict, Path, Weights]:
    """As `_read_folder`, of one encoder in the newest complete checkpoint."""
    if which not in ENCODERS:
        raise ValueError(f"which={which!r}: choose one of {', '.join(ENCODERS)}")
    path = folder / EXPERIMENT_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {EXPERIMENT_CONFIG}: it is not the output_folder of a training run"
        )
    config = read_config(path)
    checkpoint, meta = newest_checkpoint(folder)
    weights = read_state_dict(checkpoint / EXPERIMENT_STATE, ENCODERS[which])
    facts = {name: value for name, value in meta.items() if _is_finite(value)}
    training = {**config["training"], "encoder": which, "checkpoint": facts}
    return {**config, "training": training}, path, weights


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and -math.inf < value < math.inf


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
        except Exception:  # unfinished; a damaged yaml can raise other errors than YAMLError
            continue
        is_complete = isinstance(meta, dict) and (folder / EXPERIMENT_STATE).is_file()
        if is_complete and _is_finite(meta.get("unixtime")):
            complete.append((meta["unixtime"], folder, meta))
    if not complete:
        raise FileNotFoundError(
            f"{save} has no complete checkpoint yet: wait for the first one, or lower "
            "ckpt_interval_minutes"
        )
    _, folder, meta = max(complete, key=lambda found: found[:2])
    return folder, meta
