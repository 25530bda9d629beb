"""Turn public weights of this family of encoders into a pretrained folder.

python -m speechbrain_jepa.convert <checkpoint> my_encoder --from m2d

docs/convert.md says what is mapped and what is not.
"""

import argparse
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import N_MELS, SAMPLE_RATE, Normalization
from speechbrain_jepa.files import FolderInUse
from speechbrain_jepa.pickled import read_checkpoint, state_dict
from speechbrain_jepa.untrusted import (
    Weights,
    build_encoder,
    check_tensors,
    checked_encoder,
    checked_normalization,
    encoder_shapes,
    is_plain,
    short,
)
from speechbrain_jepa.vit import Encoder, PatchGrid

HEAD_DIM = 64  # of every timm ViT from tiny to large
PATCH_EMBED = "patch_embed.proj.weight"
QKV = "blocks.0.attn.qkv.weight"
# M2D's names of weights: input size, patch size and, where it is not 16k, the sample rate
SIZES_IN_NAME = re.compile(r"(\d+)x(\d+)p(\d+)x(\d+)(?:p(\d+)k)?")


@dataclass(frozen=True)
class Family:
    """What the weights of a family have in common.

    Arguments
    ---------
    title : str
    source : str
        Where it was published.
    class_token : bool
        A class token with a position of its own, and positions [1, 1 + N, D]. Otherwise positions
        are [1, F, T, D].
    norm_eps : float
        Of the layer norms; no checkpoint says it.
    normalization : (float, float)
        Mean and deviation where the checkpoint has no `norm_stats`.
    encoder : str
        Prefix of the encoder's keys where several encoders have the same shapes.
    layers : str
        Prefix of layers and last norm, behind that of the encoder.
    unused : tuple of str
        How keys beside the encoder's begin that are not of the encoder.
    """

    title: str
    source: str
    class_token: bool
    norm_eps: float
    normalization: tuple[float, float]
    encoder: str = ""
    layers: str = ""
    unused: tuple[str, ...] = ()


FAMILIES = {
    "m2d": Family(
        title="M2D",
        source="https://github.com/nttcslab/m2d",
        class_token=True,
        norm_eps=1e-6,
        normalization=(-7.1, 4.2),
        unused=(
            *("mask_token", "decoder_", "target_", "head", "offline_predictor."),
            *("audio_proj.", "text_proj.", "logit_scale"),  # M2D-CLAP
        ),
    ),
    "matpac": Family(
        title="MATPAC",
        source="https://github.com/aurianworld/matpac",
        class_token=True,
        norm_eps=1e-6,
        normalization=(-7.056, 4.193),
        layers="student_encoder.",
        unused=(
            *("teacher_encoder.", "decoder.", "mcl_", "head", "probe.", "log_mel."),
            *("cls_student_head.", "cls_teacher_head.", "cls_head_loss."),
        ),
    ),
    "released-jepa": Family(
        title="the released JEPA code",
        source="https://github.com/SonyCSLParis/audio-representations",
        class_token=False,
        norm_eps=1e-5,
        normalization=(-7.0633, 4.1971),
        encoder="encoder.",
    ),
}


@dataclass(frozen=True)
class Conversion:
    """What was found in a checkpoint, and where the encoder was written.

    Arguments
    ---------
    folder : Path
        The pretrained folder.
    prefix : str
        Of the encoder's keys in the checkpoint.
    encoder : Encoder
    normalization : Normalization
    unused : dict of str: int
        Keys of the checkpoint that went nowhere, counted by how they begin.
    """

    folder: Path
    prefix: str
    encoder: Encoder
    normalization: Normalization
    unused: dict[str, int]

    def __str__(self):
        settings, grid = self.encoder.config, self.encoder.grid
        mean, std = self.normalization.mean.item(), self.normalization.std.item()
        unused = ", ".join(f"{name} ({count})" for name, count in self.unused.items())
        return "\n".join(
            (
                f"encoder: {settings['depth']} layers, {settings['num_heads']} heads, "
                f"{settings['dim']} dims, keys under {self.prefix!r}",
                f"input: {grid.bands} x {grid.frames}, "
                f"patches {grid.patch_frequency} x {grid.patch_time}",
                f"normalisation: mean {mean:g}, deviation {std:g}",
                f"keys left unused: {unused or 'none'}",
                f"written to {self.folder}",
            )
        )


def convert(
    checkpoint,
    out,
    family: str,
    input_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    norm_eps: float | None = None,
    norm_stats: tuple[float, float] | None = None,
    prefix: str | None = None,
    ignore: tuple[str, ...] = (),
    unsafe: bool = False,
) -> Conversion:
    """Write public weights as a pretrained folder, all of the encoder or nothing.

    Arguments
    ---------
    checkpoint : str or Path
        What `torch.load` reads.
    out : str or Path
        The pretrained folder to write.
    family : str
        "m2d", "matpac" or "released-jepa".
    input_size, patch_size : (int, int) or None
        Mel bands and frames. None: as the checkpoint's folder or file name says
        (...-80x608p16x16-...), or else as follows from the weights. Both must fit the weights.
    num_heads : int or None
        None: one for every 64 dims, as in timm's ViTs.
    norm_eps : float or None
        None: the family's.
    norm_stats : (float, float) or None
        Mean and deviation of the log-mel. None: the checkpoint's `norm_stats`, or else the
        family's.
    prefix : str or None
        Of the encoder's keys, "target_encoder." say. None: found by the shapes.
    ignore : tuple of str
        How further keys begin that may be left unused.
    unsafe : bool
        Read a checkpoint that holds more than tensors and plain values, which can run any code.

    Returns
    -------
    Conversion

    Raises
    ------
    FileNotFoundError, FileExistsError
        If there is no checkpoint, or `out` holds anything but a pretrained folder.
    FolderInUse
        If another process is writing `out`.
    ValueError
        If the checkpoint cannot be read, or is not wholly understood: the message says what is
        missing, unknown or of another size.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: choose one of {', '.join(FAMILIES)}")
    kind, path = FAMILIES[family], Path(checkpoint)
    contents = read_checkpoint(path, unsafe)
    try:
        state = state_dict(contents)
        prefix = _find_prefix(state, kind) if prefix is None else prefix
        grid = _grid(state, prefix, kind, path, input_size, patch_size)
        settings = _settings(state, prefix, kind, grid, num_heads, norm_eps)
        names = _names(settings, prefix, kind)
        left = state.keys() - {*names.values(), f"{prefix}norm_stats"}
        _check_keys(state, names, left, prefix, (*kind.unused, *ignore))
        used = {theirs: state[theirs] for theirs in names.values()}
        check_tensors(path, used)
        encoder = _encoder(settings, used, names, path)
        stored = state.get(f"{prefix}norm_stats", contents.get("norm_stats", kind.normalization))
        normalization = _normalization(stored if norm_stats is None else norm_stats)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    origin = {
        "converted_from": kind.title,
        "source": kind.source,
        "checkpoint": "/".join(path.absolute().parts[-2:]),
    }
    folder = save_pretrained(out, encoder, normalization, origin)
    unused = Counter(_beginning(name, prefix) for name in sorted(left))
    return Conversion(folder, prefix, encoder, normalization, dict(unused))


# Which tensor is what


def _normalization(stored) -> Normalization:
    """Mean and deviation from whatever a checkpoint keeps as `norm_stats`."""
    if isinstance(stored, Tensor):
        stored = stored.flatten()[:3].tolist() if is_plain(stored) else None
    if not isinstance(stored, list | tuple) or len(stored) != 2:
        raise ValueError(f"norm_stats={short(stored)}: mean and deviation are needed, two numbers")
    return checked_normalization(dict(zip(("mean", "std"), stored, strict=True)))


def _find_prefix(state: dict[str, Tensor], kind: Family) -> str:
    """Where a patch convolution, positions and layers stand together with the same dims."""
    found = []
    for name, tensor in state.items():
        prefix = name.removesuffix(PATCH_EMBED)
        if prefix == name or prefix[-1:] not in ("", ".") or tensor.dim() != 4:
            continue
        qkv, positions = (state.get(prefix + key) for key in (kind.layers + QKV, "pos_embed"))
        fits = [
            part.shape[-1:] == tensor.shape[:1] for part in (qkv, positions) if part is not None
        ]
        if fits and all(fits):  # if one of them is missing, that is said later
            found.append(prefix)
    ours = [prefix for prefix in found if f".{prefix}".endswith(f".{kind.encoder}")] or found
    if len(ours) == 1:
        return ours[0]
    if ours:
        raise ValueError(f"several encoders, under {_listed(ours)}: choose one with --prefix")
    dims = "[1, 1 + N, D]" if kind.class_token else "[1, F, T, D]"
    raise ValueError(
        f"no encoder of {kind.title} found, with {PATCH_EMBED} [D, 1, height, width], pos_embed "
        f"{dims} and {kind.layers}{QKV} [3 D, D] under one prefix; the checkpoint begins with "
        f"{_listed(list(state))}: is it of another family?"
    )


def _grid(state, prefix, kind, path, input_size, patch_size) -> PatchGrid:
    """The patch grid that the weights have, which must be the one asked for or in the name."""
    for name in (prefix + PATCH_EMBED, f"{prefix}pos_embed"):
        if name not in state:
            raise ValueError(f"{name} is missing: nothing is converted in part")
    conv, positions = state[prefix + PATCH_EMBED], state[f"{prefix}pos_embed"]
    if conv.dim() != 4 or conv.shape[1] != 1 or positions.dim() != (3 if kind.class_token else 4):
        raise ValueError(
            f"{PATCH_EMBED} is {tuple(conv.shape)} and pos_embed {tuple(positions.shape)}: those "
            f"are not the shapes of {kind.title}"
        )
    patch = tuple(conv.shape[2:])
    rows = PatchGrid(patch[1], *patch).frequency_patches
    if kind.class_token:
        time_patches, rest = divmod(positions.shape[1] - 1, rows)
    else:
        time_patches, rest = positions.shape[2], positions.shape[1] - rows
    if rest:
        raise ValueError(
            f"pos_embed {tuple(positions.shape)} with patches of {_times(patch)} is not of the "
            f"{N_MELS} mel bands that this package computes"
        )
    if time_patches == 1:
        raise ValueError(
            f"pos_embed {tuple(positions.shape)} has a single time step: encoders without "
            "absolute positions in time cannot be converted"
        )
    frames = time_patches * patch[1]
    hint = None
    if input_size is None or patch_size is None:
        hint = SIZES_IN_NAME.search(path.absolute().parent.name) or SIZES_IN_NAME.search(path.name)
    if hint:
        *sizes, kilohertz = (int(number or SAMPLE_RATE // 1000) for number in hint.groups())
        if kilohertz * 1000 != SAMPLE_RATE:
            raise ValueError(
                f"{hint[0]!r} in the name says {kilohertz} kHz: this package computes features "
                f"of {SAMPLE_RATE // 1000} kHz audio only"
            )
        input_size, patch_size = input_size or sizes[:2], patch_size or sizes[2:]
    stated, stated_patch = input_size or (N_MELS, frames), tuple(patch_size or patch)
    # frames that fill no patch were never encoded: 1001 frames are 62 patches of 16
    if stated_patch != patch or stated[0] != N_MELS or stated[1] // patch[1] != time_patches:
        raise ValueError(
            f"input {_times(stated)} with patches {_times(stated_patch)} does not fit the weights, "
            f"which are of {N_MELS}x{frames} with patches {_times(patch)}"
            f"{f' (the name says {hint[0]})' if hint else ''}: set --input_size and --patch_size"
        )
    return PatchGrid(frames, *patch)


def _settings(state, prefix, kind, grid, num_heads, norm_eps) -> dict:
    """What config.json will say of the encoder, from the shapes of the weights."""
    layers = prefix + kind.layers
    dim = len(state[prefix + PATCH_EMBED])
    if num_heads is None and dim % HEAD_DIM:
        raise ValueError(f"{dim} dims are not a multiple of {HEAD_DIM}: set --num_heads")
    layer = re.compile(rf"{re.escape(layers)}blocks\.(\d{{1,6}})\.")
    numbers = [int(match[1]) for match in map(layer.match, state) if match]
    hidden = state.get(f"{layers}blocks.0.mlp.fc1.bias")
    settings = {
        "grid": asdict(grid),
        "dim": dim,
        "depth": max(numbers, default=0) + 1,
        "num_heads": dim // HEAD_DIM if num_heads is None else num_heads,
        "mlp_ratio": 4.0 if hidden is None or not dim else hidden.numel() / dim,
        "norm_eps": kind.norm_eps if norm_eps is None else norm_eps,
        "class_token": kind.class_token,
        "stored_positions": True,
    }
    checked_encoder(settings)
    return settings


def _names(settings: dict, prefix: str, kind: Family) -> dict[str, str]:
    """Names of the encoder's parameters to those in the checkpoint."""
    renamed = {
        "patch_embed.weight": PATCH_EMBED,
        "patch_embed.bias": "patch_embed.proj.bias",
        "positions": "pos_embed",
        "class_token": "cls_token",
    }
    ours = encoder_shapes(*checked_encoder(settings))
    return {name: prefix + renamed.get(name, kind.layers + name) for name in ours}


def _check_keys(state, names, left, prefix, unused: tuple[str, ...]) -> None:
    """Every parameter of the encoder is there, and nothing that it does not know."""
    missing = [name for name in names.values() if name not in state]
    strange = [
        name
        for name in sorted(left)
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(unused)
    ]
    problems = []
    if missing:
        problems.append(f"{_listed(missing)} missing")
    if strange:
        problems.append(
            f"{_listed(strange)} unknown (if no part of the encoder: --ignore "
            f"{strange[0].removeprefix(prefix)[:200]})"
        )
    if problems:
        raise ValueError(f"the encoder would not be the one trained: {'; '.join(problems)}")


def _encoder(settings: dict, state, names, path: Path) -> Encoder:
    """The encoder, from the checkpoint's tensors."""
    tensors = {name: state[theirs] for name, theirs in names.items()}
    # a convolution that strides by its size is a linear layer over the values of a patch, in the
    # order bands, frames
    tensors["patch_embed.weight"] = tensors["patch_embed.weight"].flatten(1)
    tensors["positions"] = tensors["positions"].flatten(0, -2)
    first = None
    if settings["class_token"]:
        tensors["class_token"] = tensors["class_token"].flatten()
        first, tensors["positions"] = tensors["positions"].tensor_split([1])
    expected = encoder_shapes(*checked_encoder(settings))
    wrong = [
        f"{names[name]} is {tuple(state[names[name]].shape)}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"shapes do not fit {settings['dim']} dims: {_listed(wrong)}")
    broken = [theirs for theirs in names.values() if not state[theirs].isfinite().all()]
    if broken:
        raise ValueError(f"the checkpoint is damaged: {_listed(broken)} holds NaN or infinity")

    def load() -> dict[str, Tensor]:
        loaded = {name: tensor.float() for name, tensor in tensors.items()}
        if first is not None:  # the first position is the class token's
            loaded["class_token"] = loaded["class_token"] + first[0].float()
        return loaded

    return build_encoder(settings, Weights(path, expected, load))


def _beginning(name: str, prefix: str) -> str:
    """The prefix of a key and the name behind it, by which unused keys are counted."""
    behind = name.removeprefix(prefix)
    return name[: len(name) - len(behind)] + behind.split(".")[0]


def _listed(names: list[str]) -> str:
    first = [short(name)[1:-1] for name in names[:6]]
    return ", ".join(first) + (f", ... ({len(names)})" if len(names) > 6 else "")


def _times(size) -> str:
    return "x".join(map(str, size))


def _size(text: str) -> tuple[int, int]:
    """'80x608' to (80, 608)."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write bands x frames, such as 80x608")
    bands, frames = map(int, text.split("x"))
    return bands, frames


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.convert", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("checkpoint", help="the file of weights")
    add("out", help="pretrained folder to write")
    add("--from", dest="family", required=True, choices=FAMILIES, help="whose weights they are")
    add("--input_size", type=_size, help="bands x frames, if the name has others (80x608)")
    add("--patch_size", type=_size, help="bands x frames, if the name has others (16x16)")
    add("--num_heads", type=int, help=f"default: one for every {HEAD_DIM} dims")
    add("--norm_eps", type=float, help="of the layer norms; default: the family's")
    add("--norm_stats", type=float, nargs=2, metavar=("MEAN", "STD"), help="of the log-mel")
    add("--prefix", help="of the encoder's keys; default: found by the shapes")
    add("--ignore", action="append", default=[], help="how keys begin that may be left unused")
    add("--unsafe", action="store_true", help="unpickle anything: runs what the file says")
    options = vars(parser.parse_args(arguments))
    try:
        print(convert(**options))
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"convert: {error}") from error


if __name__ == "__main__":
    main()
