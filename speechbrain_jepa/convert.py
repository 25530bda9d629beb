"""Turn public weights of this family of encoders into a pretrained folder.

python -m speechbrain_jepa.convert <checkpoint> my_encoder --from m2d

docs/convert.md says what is mapped and what is not.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.families import FAMILIES, HEAD_DIM, find_encoder
from speechbrain_jepa.features import Normalization
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
    listed,
    short,
)
from speechbrain_jepa.vit import Encoder


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
        layout = find_encoder(
            state, kind, path, prefix, input_size, patch_size, num_heads, norm_eps, ignore
        )
        used = {theirs: state[theirs] for theirs in layout.names.values()}
        check_tensors(path, used)
        encoder = _encoder(layout.settings, used, layout.names, path)
        own = contents.get("norm_stats", kind.normalization)
        stored = state.get(f"{layout.prefix}norm_stats", own)
        normalization = _normalization(stored if norm_stats is None else norm_stats)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    origin = {
        "converted_from": kind.title,
        "source": kind.source,
        "checkpoint": "/".join(path.absolute().parts[-2:]),
    }
    folder = save_pretrained(out, encoder, normalization, origin)
    unused = Counter(_beginning(name, layout.prefix) for name in layout.unused)
    return Conversion(folder, layout.prefix, encoder, normalization, dict(unused))


def _normalization(stored) -> Normalization:
    """Mean and deviation from whatever a checkpoint keeps as `norm_stats`."""
    if isinstance(stored, Tensor):
        stored = stored.flatten()[:3].tolist() if is_plain(stored) else None
    if not isinstance(stored, list | tuple) or len(stored) != 2:
        raise ValueError(f"norm_stats={short(stored)}: mean and deviation are needed, two numbers")
    return checked_normalization(dict(zip(("mean", "std"), stored, strict=True)))


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
        raise ValueError(f"shapes do not fit {settings['dim']} dims: {listed(wrong)}")
    broken = [theirs for theirs in names.values() if not state[theirs].isfinite().all()]
    if broken:
        raise ValueError(f"the checkpoint is damaged: {listed(broken)} holds NaN or infinity")

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
