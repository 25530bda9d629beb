"""Configs and weights from files that are not trusted: checked before memory is allocated.

A file may say anything. The shapes that a config means are compared with those in the weights'
header before a byte is allocated for them, so that a small file cannot ask for more memory than it
holds; whatever does not fit is one ValueError that names the file and the key.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from speechbrain_jepa.features import (
    HOP_LENGTH,
    MAX_N_FFT,
    MAX_N_MELS,
    LogMelSpectrogram,
    Normalization,
)
from speechbrain_jepa.read_out import ReadOut
from speechbrain_jepa.vit import Encoder, PatchGrid

MAX_CONFIG = 2**20  # bytes of config.json
MAX_NESTING = 50  # of its lists and dicts: json and yaml fail at a few hundred
MAX_HEADER = 2**24  # bytes of a safetensors header; ViT-Base has 15,000
MAX_POSITIONS = 2**24  # values of the table of positions, which no file holds; ViT-Base has 50,000
FLOATS = ("F32", "F16", "BF16", "F64")  # as safetensors calls them

# whole numbers, with their least and greatest values
GRID = {
    "frames": (1, 2**20),
    "patch_frequency": (1, MAX_N_MELS),
    "patch_time": (1, 2**20),
    "bands": (1, MAX_N_MELS),
}
SIZES = {"dim": (1, 2**16), "depth": (1, 1000), "num_heads": (1, 2**16)}
NUMBERS = {"mlp_ratio": (1e-6, 256), "norm_eps": (1e-30, 1)}
SWITCHES = ("class_token", "stored_positions")  # False where an older config lacks them


@dataclass(frozen=True)
class Weights:
    """Named tensors in a file, of which only the shapes have been read.

    Arguments
    ---------
    path : Path
        Of the file, for messages.
    shapes : dict of str: tuple of int
        All of floating-point numbers.
    load : callable
        Reads the tensors: () -> dict of str: Tensor.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[], dict[str, Tensor]]


def short(value: Any) -> str:
    """A value of any size for a message: `repr`, cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4300 digits, a list in itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: list[str]) -> str:
    """Some names for a message: the first six, and how many there are."""
    first = [short(name)[1:-1] for name in names[:6]]
    return ", ".join(first) + (f", ... ({len(names)})" if len(names) > 6 else "")


# Configs


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises
    ------
    ValueError
        If it is not one, or is longer or deeper than any config is.
    """
    again = "export or download it again"
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{path} has more than {MAX_CONFIG} bytes, as no config has: {again}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({reason(error)}): {again}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is a {type(value).__name__}, not the config of an encoder")
    level: list[dict | list] = [value]
    for _ in range(MAX_NESTING):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"{path} is nested more than {MAX_NESTING} deep: {again}")
    return value


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON number")


def checked_encoder(settings: Any) -> tuple[PatchGrid, dict]:
    """Grid and other arguments of the `Encoder` that a config describes.

    Arguments
    ---------
    settings : dict
        As `speechbrain_jepa.config.describe` writes them.

    Raises
    ------
    ValueError
        Which key is missing, unknown, or what it should be.

    Example
    -------
    >>> checked_encoder({"grid": {}, "dim": 768})
    Traceback (most recent call last):
        ...
    ValueError: encoder.depth is missing
    """
    sizes = _checked("encoder", settings, ("grid", *SIZES, *NUMBERS), SWITCHES)
    patches = _checked("encoder.grid", sizes.pop("grid"), GRID)
    for key, limits in GRID.items():
        _check_whole(f"encoder.grid.{key}", patches[key], *limits)
    for key, limits in SIZES.items():
        _check_whole(f"encoder.{key}", sizes[key], *limits)
    for key, (least, most) in NUMBERS.items():
        _check_number(f"encoder.{key}", sizes[key], least, most)
    for key in SWITCHES:
        if not isinstance(sizes.get(key, False), bool):
            raise ValueError(f"encoder.{key}={short(sizes[key])}: expected true or false")
    grid = PatchGrid(**patches)
    if grid.num_patches * sizes["dim"] > MAX_POSITIONS:
        raise ValueError(
            f"encoder.grid has {grid.num_patches} patches of {sizes['dim']} dims: positions of "
            f"more than {MAX_POSITIONS} values are not built"
        )
    if sizes["dim"] % sizes["num_heads"] or sizes["dim"] % 4:
        raise ValueError(
            f"encoder.dim={sizes['dim']} is not a multiple of encoder.num_heads="
            f"{sizes['num_heads']} and of 4"
        )
    if round(sizes["dim"] * sizes["mlp_ratio"]) < 1:
        raise ValueError(f"encoder.mlp_ratio={sizes['mlp_ratio']} leaves no hidden layer")
    return grid, sizes


def checked_normalization(pair: Any) -> Normalization:
    """The `Normalization` of a config: mean and std, both there and both numbers."""
    pair = _checked("normalization", pair, ("mean", "std"))
    for key, value in pair.items():
        _check_number(f"normalization.{key}", value, -1e30, 1e30)
    return Normalization(**pair)


def checked_log_mel(settings: Any, bands: int) -> LogMelSpectrogram:
    """The front end of a config: its n_fft and n_mels, for an encoder of so many bands."""
    limits = {"n_fft": (HOP_LENGTH, MAX_N_FFT), "n_mels": (bands, bands)}
    for key, (least, most) in limits.items():
        _check_whole(f"features.{key}", settings.get(key), least, most)
    try:
        return LogMelSpectrogram(settings["n_fft"], settings["n_mels"])
    except ValueError as error:
        raise ValueError(f"features.{error}") from error


def checked_read_out(settings: Any, depth: int) -> ReadOut:
    """The `ReadOut` of a config, for an encoder of so many layers."""
    settings = _checked("embedding", settings, (), ("layers", "pooling"))
    layers = settings.get("layers")
    if isinstance(layers, list) and len(layers) > 1 + depth:
        raise ValueError(f"embedding.layers={short(layers)}: there are {1 + depth} layers")
    try:
        read_out = ReadOut(**settings)
        read_out.numbers(1 + depth)
    except ValueError as error:
        raise ValueError(f"embedding.{error}") from error
    return read_out


def _checked(name: str, section: Any, needed, optional=()) -> dict:
    """A copy of a section that has the needed keys, and no others than the optional ones."""
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}={short(section)}: expected {{...}}")
    for key in needed:
        if key not in section:
            raise ValueError(f"{name}.{key} is missing")
    for key in section:
        if key not in needed and key not in optional:
            raise ValueError(f"{name}.{short(key)[1:-1]} is unknown")
    return dict(section)


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        expected = f"a whole number from {least} to {most}" if least < most else f"{least}"
        raise ValueError(f"{name}={short(value)}: expected {expected}")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={short(value)}: expected a number from {least:g} to {most:g}")


# Weights


def read_safetensors(path: Path) -> Weights:
    """The header of a safetensors file.

    Raises
    ------
    ValueError
        If it is no such file, is damaged, or holds anything but floating-point numbers.
    """
    again = "export or download it again"
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file, or is damaged (header): {again}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            parts = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged ({reason(error)}): {again}"
        ) from error
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{path}: {short(name)} is {dtype}, expected one of {', '.join(FLOATS)}"
            )
    return Weights(path, shapes, lambda: load_file(path))


def read_state_dict(path: Path, prefix: str) -> Weights:
    """Those tensors of a state dict of torch.save's whose names begin with `prefix`.

    Raises
    ------
    ValueError
        If it is no state dict, is damaged, or one of them is no plain tensor (`check_tensors`).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise ValueError(f"{path} is not a state dict, or is damaged ({reason(error)})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is not a state dict, but a {type(state).__name__}")
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    check_tensors(path, tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(path, shapes, lambda: tensors)


def check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse tensors that are not what lies in the file.

    A pickled tensor can be of any shape without a byte behind it: on the meta device, expanded,
    or a view of another one's values.

    Raises
    ------
    ValueError
        The first one that is no tensor of floating-point numbers in memory, or how much they ask
        for if that is more than the file holds.
    """
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise ValueError(f"{path}: {short(name)} is no tensor of floating-point numbers")
    asked = sum(math.prod(part.shape) * part.element_size() for part in tensors.values())
    if asked > path.stat().st_size:
        raise ValueError(
            f"{path} is damaged: its {path.stat().st_size} bytes cannot hold the {asked} that its "
            "parameters claim"
        )


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of floating-point numbers in this machine's memory."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and not value.is_quantized
        and not value.is_nested
    )


def reason(error: BaseException) -> str:
    """The first line of an error, cut."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# Both


def encoder_shapes(grid: PatchGrid, sizes: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dict of an `Encoder`, which is not built.

    Example
    -------
    >>> grid, sizes = PatchGrid(), {"dim": 6000, "depth": 900, "num_heads": 100, "mlp_ratio": 4}
    >>> encoder_shapes(grid, sizes)["blocks.899.mlp.fc1.weight"]
    (24000, 6000)
    """
    dim, hidden = sizes["dim"], round(sizes["dim"] * sizes["mlp_ratio"])
    layer = {
        "norm1": (dim,),
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "norm2": (dim,),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    weights = {"patch_embed": (dim, grid.patch_values), "norm": (dim,)}
    for number in range(sizes["depth"]):
        weights |= {f"blocks.{number}.{name}": shape for name, shape in layer.items()}
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    if sizes.get("class_token"):
        shapes["class_token"] = (dim,)
    if sizes.get("stored_positions"):
        shapes["positions"] = (grid.num_patches, dim)
    return shapes


def build_encoder(settings: Any, weights: Weights) -> Encoder:
    """The encoder that a config and weights describe, in eval mode.

    Raises
    ------
    ValueError
        If they do not fit each other (nothing has been allocated then), or a weight is NaN or
        infinite.
    """
    grid, sizes = checked_encoder(settings)
    expected, found = encoder_shapes(grid, sizes), weights.shapes
    wrong = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{short(name)[1:-1]} is unknown" for name in found.keys() - expected.keys()]
    if wrong:
        some = "; ".join(sorted(wrong)[:8]) + ("; ..." if len(wrong) > 8 else "")
        raise ValueError(f"{weights.path}: the parameters do not fit the config: {some}")
    encoder = Encoder(grid, **sizes)
    encoder.load_state_dict(weights.load())
    check_finite(encoder, weights.path)
    return encoder.eval()


def check_finite(encoder: Encoder, where) -> None:
    """Refuse weights that are no numbers.

    Raises
    ------
    ValueError
        Which parameters hold NaN or infinity, of the file or folder `where`.
    """
    broken = [name for name, part in encoder.state_dict().items() if not part.isfinite().all()]
    if broken:
        raise ValueError(
            f"{where}: the weights are damaged: {listed(broken)} holds NaN or infinity"
        )
