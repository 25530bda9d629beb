"""Which tensor of a public checkpoint is what, for each family of encoders.

The families have the same kind of encoder, a ViT over log-mel patches, and differ in the names and
shapes of its parameters. Nothing is computed here: sizes follow from shapes.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from speechbrain_jepa.features import N_MELS, SAMPLE_RATE
from speechbrain_jepa.untrusted import checked_encoder, encoder_shapes, listed
from speechbrain_jepa.vit import PatchGrid

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
class Layout:
    """Where the encoder is in a checkpoint.

    Arguments
    ---------
    prefix : str
        Of the encoder's keys.
    settings : dict
        What config.json says of the encoder.
    names : dict of str: str
        Names of our parameters to those in the checkpoint.
    unused : list of str
        Keys of the checkpoint that are not of the encoder, sorted.
    """

    prefix: str
    settings: dict
    names: dict[str, str]
    unused: list[str]


def find_encoder(
    state: dict[str, Tensor],
    kind: Family,
    path: Path,
    prefix: str | None = None,
    input_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    norm_eps: float | None = None,
    ignore: tuple[str, ...] = (),
) -> Layout:
    """Find all of a family's encoder in a state dict.

    Arguments
    ---------
    state : dict of str: Tensor
    kind : Family
    path : Path
        Of the checkpoint: its name, or its folder's, may say the sizes.
    prefix, input_size, patch_size, num_heads, norm_eps, ignore
        See `speechbrain_jepa.convert.convert`.

    Raises
    ------
    ValueError
        What is missing, unknown or of another size.
    """
    prefix = _find_prefix(state, kind) if prefix is None else prefix
    grid = _grid(state, prefix, kind, path, input_size, patch_size)
    settings = _settings(state, prefix, kind, grid, num_heads, norm_eps)
    names = _names(settings, prefix, kind)
    unused = sorted(state.keys() - {*names.values(), f"{prefix}norm_stats"})
    _check_keys(state, names, unused, prefix, (*kind.unused, *ignore))
    return Layout(prefix, settings, names, unused)


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
        raise ValueError(f"several encoders, under {listed(ours)}: choose one with --prefix")
    dims = "[1, 1 + N, D]" if kind.class_token else "[1, F, T, D]"
    raise ValueError(
        f"no encoder of {kind.title} found, with {PATCH_EMBED} [D, 1, height, width], pos_embed "
        f"{dims} and {kind.layers}{QKV} [3 D, D] under one prefix; the checkpoint begins with "
        f"{listed(list(state))}: is it of another family?"
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


def _check_keys(state, names, unused, prefix, known: tuple[str, ...]) -> None:
    """Every parameter of the encoder is there, and nothing that it does not know."""
    missing = [name for name in names.values() if name not in state]
    strange = [
        name
        for name in unused
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(known)
    ]
    problems = []
    if missing:
        problems.append(f"{listed(missing)} missing")
    if strange:
        problems.append(
            f"{listed(strange)} unknown (if no part of the encoder: --ignore "
            f"{strange[0].removeprefix(prefix)[:200]})"
        )
    if problems:
        raise ValueError(f"the encoder would not be the one trained: {'; '.join(problems)}")


def _times(size) -> str:
    return "x".join(map(str, size))
