"""How embeddings are read out of an encoder: from which layers, and how over a clip's time steps.

Shapes: R layers read, B clips, W windows of a clip, T time steps of a window, C dims.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CHOICES = ("last", "all")
POOLINGS = ("mean", "mean_std")
NORM_EPS = 1e-5  # of the layer norm over a clip, as in torch's
VARIANCE_FLOOR = 1e-12  # of a clip of one time step: the root has no gradient at 0


@dataclass(frozen=True)
class ReadOut:
    """Which layers are read, side by side, and how a clip's time steps become one embedding.

    Arguments
    ---------
    layers : str or sequence of int
        "last" (default), "all", or numbers: 0 is what enters the first layer (the patch
        embedding), i what leaves layer i, -1 the last one, which is behind the final layer norm.
    pooling : str
        "mean" (default) over the time steps, or "mean_std": their deviation beside it (statistics
        pooling; the deviation is that of the clip's own steps, divided by their number).

    Raises
    ------
    ValueError
        If a choice is none of these.

    Example
    -------
    >>> ReadOut("all").numbers(num_layers=3), ReadOut([0, -1]).numbers(num_layers=3)
    ([0, 1, 2], [0, 2])
    """

    layers: str | Sequence[int] = "last"
    pooling: str = "mean"

    def __post_init__(self):
        whole = isinstance(self.layers, list | tuple) and all(type(n) is int for n in self.layers)
        if whole and self.layers:
            object.__setattr__(self, "layers", tuple(self.layers))
        elif not isinstance(self.layers, str) or self.layers not in CHOICES:
            raise ValueError(
                f"layers={self.layers!r:.80}: choose one of {', '.join(CHOICES)}, or give a list "
                "of whole numbers"
            )
        if not isinstance(self.pooling, str) or self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r:.80}: choose one of {', '.join(POOLINGS)}")

    def chosen(self, layers, pooling, all_hiddens: bool = False) -> "ReadOut":
        """This one, with what else was asked for: None leaves a choice as it is.

        With `all_hiddens` it is every layer, and nothing of this one.
        """
        if all_hiddens and layers is not None:
            raise ValueError(f"layers={layers!r:.80} with output_all_hiddens: choose one of them")
        base = ReadOut("all") if all_hiddens else self
        return ReadOut(
            base.layers if layers is None else layers,
            base.pooling if pooling is None else pooling,
        )

    def numbers(self, num_layers: int) -> list[int]:
        """The layers read, from 0, of an encoder with so many outputs (1 + depth).

        Raises
        ------
        ValueError
            If it has no such layer.
        """
        if self.layers == "last":
            return [num_layers - 1]
        if isinstance(self.layers, str):
            return list(range(num_layers))
        for number in self.layers:
            if not -num_layers <= number < num_layers:
                raise ValueError(
                    f"layers={list(self.layers)!r:.80}: there is no {number!r:.20}; this encoder "
                    f"has 0 (the patch embedding) to {num_layers - 1}"
                )
        return [number % num_layers for number in self.layers]

    @property
    def statistics(self) -> int:
        """Numbers of an embedding for each dim of a layer: 1, or 2 with the deviation."""
        return 2 if self.pooling == "mean_std" else 1

    def joined(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Mean [..., C], or mean and deviation [..., 2 * C]."""
        if self.pooling == "mean":
            return mean
        return torch.cat([mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()], -1)

    def describe(self) -> dict:
        """For config.json."""
        settings = asdict(self)
        if not isinstance(self.layers, str):
            settings["layers"] = list(self.layers)
        return settings


def add_read_out(parser: ArgumentParser, otherwise: str) -> None:
    """The options --layers and --pooling of a command; `otherwise` says what is read without."""
    parser.add_argument(
        "--layers",
        type=_layers,
        help=f"last, all, or numbers as in 0,3,6 (0: the patch embedding); default: {otherwise}",
    )
    parser.add_argument("--pooling", choices=POOLINGS, help="of a clip's time steps; likewise")


def _layers(text: str) -> str | list[int]:
    return text if text in CHOICES else [int(number) for number in text.split(",")]


def side_by_side(layers: Tensor) -> Tensor:
    """[R, ..., C] to [..., R * C]."""
    return layers.movedim(0, -2).flatten(-2)


def step_statistics(steps: Tensor, present: Tensor | None) -> Tensor:
    """What `pooled` needs of one window's time steps.

    Arguments
    ---------
    steps : Tensor [..., T, C]
        Zeros where there is no time step.
    present : Tensor [..., T], bool, or None
        Where there is one. None: everywhere.

    Returns
    -------
    Tensor [..., 1, 2 * C + 1], float32
        Sum, sum of squared differences from the window's own mean, number of time steps.
    """
    steps = steps.float()
    if present is None:
        present = steps.new_ones(steps.shape[:-1], dtype=torch.bool)
    present = present[..., None].expand(*steps.shape[:-1], 1)
    count = present.sum(-2, keepdim=True)
    total = steps.sum(-2, keepdim=True)
    squares = ((steps - total / count) * present).square().sum(-2, keepdim=True)
    return torch.cat([total, squares, count.to(steps.dtype)], -1)


def pooled(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over a clip's time steps, from those of its windows.

    The windows' squares are put together by the formula of Chan, Golub and LeVeque (1979), not by a
    difference of two large sums, which loses the variance of dims far from zero.

    Arguments
    ---------
    statistics : Tensor [..., W, 2 * C + 1]
        Of `step_statistics`; zeros where there is no window.

    Returns
    -------
    mean, variance : Tensor [..., C]
    """
    dims = statistics.shape[-1] // 2
    total, squares, count = statistics.split([dims, dims, 1], -1)
    steps = count.sum(-2)
    mean = total.sum(-2) / steps
    between = count * (total / count.clamp(min=1) - mean[..., None, :]).square()
    return mean, (squares + between).sum(-2) / steps


def normalized_steps(steps: Tensor, count: Tensor) -> Tensor:
    """Layer norm of [..., B, T, C] over each clip's own time steps, `count` [B], and its dims."""
    own = (torch.arange(steps.shape[-2]) < count[:, None]).to(steps.device)[..., None]
    size = (count * steps.shape[-1]).to(steps.device)[:, None, None]
    values = steps.float()
    centered = (values - values.sum((-2, -1), keepdim=True) / size) * own
    variance = centered.square().sum((-2, -1), keepdim=True) / size
    return (centered * (variance + NORM_EPS).rsqrt()).to(steps.dtype)


def normalized(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [..., C] of a clip's time steps, as if they were `normalized_steps`.

    That is one affine map for all time steps, so it can be applied to their statistics.
    """
    center = mean.mean(-1, keepdim=True)
    spread = (variance + (mean - center).square()).mean(-1, keepdim=True) + NORM_EPS
    return (mean - center) * spread.rsqrt(), variance / spread
