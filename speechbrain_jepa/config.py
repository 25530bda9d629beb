"""config.json of a pretrained folder: what it says, and what of it this version understands."""

from dataclasses import asdict
from pathlib import Path

from speechbrain_jepa import features
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.read_out import ReadOut
from speechbrain_jepa.untrusted import read_json, short
from speechbrain_jepa.vit import Encoder

CONFIG = "config.json"
FORMAT_VERSION = 1
MODEL_TYPE = "audio_jepa"
SECTIONS = ("encoder", "features", "normalization", "embedding", "training")

# what `LogMelSpectrogram` computes, whatever n_fft and n_mels are; a folder that asks for anything
# else cannot be loaded
FEATURES = {
    "sample_rate": features.SAMPLE_RATE,
    "hop_length": features.HOP_LENGTH,
    "f_min": features.F_MIN,
    "f_max": features.F_MAX,
    "log_offset": features.LOG_OFFSET,
}


def describe(
    encoder: Encoder,
    normalization: Normalization,
    training: dict,
    read_out: ReadOut | None = None,
    log_mel: LogMelSpectrogram | None = None,
) -> dict:
    """The content of config.json.

    Arguments
    ---------
    encoder : Encoder
    normalization : Normalization
    training : dict
        How it was trained, in whatever JSON can say: data, masking, steps, ...
    read_out : ReadOut or None
        What `AudioJEPA.embed` reads unless it is told otherwise. None: the last layer's mean.
    log_mel : LogMelSpectrogram or None
        What it was trained on. None: the paper's, of as many bands as the encoder has.

    Returns
    -------
    dict
    """
    return {
        "format_version": FORMAT_VERSION,
        "model_type": MODEL_TYPE,
        "encoder": {"grid": asdict(encoder.grid), **encoder.config},
        "features": {
            **FEATURES,
            "n_fft": log_mel.n_fft if log_mel else features.N_FFT,
            "n_mels": encoder.grid.bands,
        },
        "normalization": {"mean": normalization.mean.item(), "std": normalization.std.item()},
        "embedding": (read_out or ReadOut()).describe(),
        "training": training,
    }


def read_config(path: Path) -> dict:
    """The content of a config.json; `training` and `embedding` are empty where it has none.

    Raises
    ------
    ValueError
        If it is no config, or one that this version does not understand.
    """
    config = read_json(path)
    if "format_version" not in config:
        raise ValueError(f"{path} has no format_version: it is not the config of an encoder")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {short(config['format_version'])}, this version of "
            f"speechbrain-jepa reads {FORMAT_VERSION}: update the package, or export again"
        )
    config = {"training": {}, "embedding": {}, **config}
    for section in SECTIONS:
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{path} has no {section!r} section: export or download it again")
    for name, value in FEATURES.items():
        if config["features"].get(name) != value:
            raise ValueError(
                f"{path} asks for features with {name}={short(config['features'].get(name))}; "
                f"this version of speechbrain-jepa computes {value!r} only"
            )
    return config


def log_mel_of(config: dict) -> LogMelSpectrogram:
    """The front end that a config asks for."""
    return LogMelSpectrogram(config["features"]["n_fft"], config["features"]["n_mels"])
