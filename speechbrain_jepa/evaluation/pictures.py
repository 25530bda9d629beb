"""Two pictures of a pretraining run: its masks on a spectrogram, and its curves."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speechbrain_jepa.features import F_MAX, F_MIN, HOP_LENGTH, SAMPLE_RATE

DPI = 150
COLOURS = {"train": "#8fb3d9", "valid": "#c44e2d", "third": "#4c8c5a"}
TEXT = 8  # points
HIDDEN = "#e9e9e4"  # patches that a view does not show
TICKS_HZ = (500, 1000, 2000, 4000)


def visible_patches(index, bands: int, frames: int, patch_shape: tuple[int, int]) -> np.ndarray:
    """Which bins of a spectrogram belong to the patches of an index.

    Patches are numbered row by row: index = frequency_patch * time_patches + time_patch, and
    frequency patch 0 holds the lowest bands.

    Arguments
    ---------
    index : sequence of int [K]
        Patch numbers; a Tensor on the CPU will do.
    bands, frames : int
        Size of the spectrogram. Frames beyond the last whole patch are in no patch.
    patch_shape : (int, int)
        Bands and frames of a patch.

    Returns
    -------
    array [bands, frames], bool

    Raises
    ------
    ValueError
        If patches do not fit the spectrogram, or a number is no patch of it.

    Example
    -------
    >>> visible_patches([0, 5], bands=4, frames=6, patch_shape=(2, 2)).astype(int)
    array([[1, 1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [0, 0, 0, 0, 1, 1],
           [0, 0, 0, 0, 1, 1]])
    """
    height, width = patch_shape
    if bands % height or frames < width:
        raise ValueError(
            f"patches of {height} x {width} do not fit a spectrogram of {bands} bands and "
            f"{frames} frames: the bands must be a multiple, the frames at least one patch"
        )
    grid = np.zeros((bands // height, frames // width), bool)
    index = np.asarray(index, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < grid.size:
        raise ValueError(
            f"patch numbers from {index.min()} to {index.max()}: "
            f"{grid.shape[0]} x {grid.shape[1]} patches are numbered 0 to {grid.size - 1}"
        )
    grid.flat[index] = True
    bins = grid.repeat(height, 0).repeat(width, 1)
    return np.pad(bins, ((0, 0), (0, frames - bins.shape[1])))


def draw_masks(
    spectrogram,
    masks: Mapping[str, tuple],
    patch_shape: tuple[int, int],
    path,
) -> Path:
    """One spectrogram with its context and target patches for each strategy (the paper's Fig. 1).

    Top row: the whole spectrogram. Below it one column per strategy: what the context encoder
    sees, then what is predicted. Low frequencies are at the bottom.

    Arguments
    ---------
    spectrogram : array or Tensor [bands, frames]
        Log-mel of one clip.
    masks : dict of pairs
        For each strategy's name, context_index [Kc] and target_index [Kt] of that clip, without
        padding.
    patch_shape : (int, int)
        Bands and frames of a patch.
    path : str or Path
        Where the PNG goes. Its folder is made.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If there are no masks, or they do not fit the spectrogram.

    Example
    -------
    >>> spectrogram = np.random.default_rng(0).normal(size=(80, 208))
    >>> masks = {"unstructured": (range(26), range(26, 65))}
    >>> draw_masks(spectrogram, masks, (16, 16), getfixture("tmp_path") / "masks.png").name
    'masks.png'
    """
    spectrogram = np.asarray(spectrogram, np.float32)
    if not masks:
        raise ValueError("masks is empty: give context and target patches of a strategy")
    bands, frames = spectrogram.shape
    size = (bands, frames, patch_shape)
    views = [
        (name, [visible_patches(index, *size) for index in pair]) for name, pair in masks.items()
    ]
    columns = len(views)
    figure = Figure(figsize=(max(2.6 * columns, 3.6) + 0.5, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, columns)
    limits = dict(zip(("vmin", "vmax"), np.percentile(spectrogram, (1, 99.8))))
    axes = figure.add_subplot(grid[0, :])
    _show(axes, spectrogram, limits, patch_shape)
    _frequency_ticks(axes, bands)
    _time_ticks(axes, frames)
    axes.set_title("log-mel spectrogram", fontsize=TEXT)
    for row, role in enumerate(("context", "target")):
        for column, (name, visible) in enumerate(views):
            axes = figure.add_subplot(grid[1 + row, column])
            _show(axes, np.where(visible[row], spectrogram, np.nan), limits, patch_shape)
            axes.set_xticks([])
            axes.set_yticks([])
            count = len(masks[name][row])
            axes.set_xlabel(f"{count} patches", fontsize=TEXT - 1, labelpad=2)
            if row == 0:
                axes.set_title(name, fontsize=TEXT)
            if column == 0:
                axes.set_ylabel(role, fontsize=TEXT)
    return _save(figure, path)


def _show(axes, image, limits, patch_shape):
    """An image with low frequencies at the bottom and a thin line between patches."""
    axes.set_facecolor(HIDDEN)
    axes.imshow(
        image, origin="lower", aspect="auto", interpolation="nearest", cmap="magma", **limits
    )
    bands, frames = image.shape
    line = dict(color="white", linewidth=0.35, alpha=0.7)
    for edge in range(patch_shape[0], bands, patch_shape[0]):
        axes.axhline(edge - 0.5, **line)
    for edge in range(patch_shape[1], frames, patch_shape[1]):
        axes.axvline(edge - 0.5, **line)
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)


def _time_ticks(axes, frames):
    frames_a_second = SAMPLE_RATE / HOP_LENGTH
    seconds = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(0, frames / frames_a_second)
    seconds = seconds[seconds * frames_a_second < frames]
    axes.set_xticks(seconds * frames_a_second, [f"{second:g}" for second in seconds])
    axes.set_xlabel("time (s)", fontsize=TEXT, labelpad=1)
    axes.tick_params(which="both", labelsize=TEXT - 1, width=0.5, length=2)


def _frequency_ticks(axes, bands):
    """Hz at the mel bands whose centres are nearest (Slaney's scale)."""
    centres = np.linspace(_mel(F_MIN), _mel(F_MAX), bands + 2)[1:-1]
    place = [np.interp(_mel(hertz), centres, np.arange(bands)) for hertz in TICKS_HZ]
    axes.set_yticks(place, [f"{hertz / 1000:g}" for hertz in TICKS_HZ])
    axes.set_ylabel("kHz", fontsize=TEXT)


def _mel(hertz: float) -> float:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def draw_curves(history, path) -> Path:
    """Loss, effective rank and deviations, learning rate and EMA rate over the optimiser steps.

    Arguments
    ---------
    history : str, Path or iterable of dicts
        The run's metrics.csv, or its rows. Each has a step and some of train_loss, valid_loss,
        valid_embedding_rank, valid_embedding_deviation, valid_target_deviation,
        train_learning_rate, train_ema_rate; values may be text, and missing ones empty.
    path : str or Path
        Where the PNG goes. Its folder is made.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If no row has a loss.

    Example
    -------
    >>> history = [{"step": step, "train_loss": 1 / step} for step in range(1, 100)]
    >>> draw_curves(history, getfixture("tmp_path") / "curves.png").name
    'curves.png'
    """
    if isinstance(history, (str, Path)):
        with open(history, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = list(history)
    curves = {
        name: curve(rows, name)
        for name in (
            "train_loss",
            "valid_loss",
            "valid_embedding_rank",
            "valid_embedding_deviation",
            "valid_target_deviation",
            "train_learning_rate",
            "train_ema_rate",
        )
    }
    if not (len(curves["train_loss"][0]) or len(curves["valid_loss"][0])):
        raise ValueError(
            "the history has no row with a train_loss or a valid_loss: nothing to draw"
        )
    figure = Figure(figsize=(9.6, 2.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rank, rates = figure.subplots(1, 3)

    _plot(loss, curves["train_loss"], "train", "train")
    _plot(loss, curves["valid_loss"], "valid", "validation", marker=True)
    loss.set_ylabel("loss", fontsize=TEXT)

    _plot(rank, curves["valid_embedding_rank"], "valid", "rank", marker=True)
    rank.set_ylabel("effective rank (RankMe)", fontsize=TEXT)
    deviation = rank.twinx()
    _plot(deviation, curves["valid_embedding_deviation"], "train", "embeddings")
    _plot(deviation, curves["valid_target_deviation"], "third", "targets")
    deviation.set_ylabel("deviation of embeddings, targets", fontsize=TEXT)

    _plot(rates, curves["train_learning_rate"], "valid", "learning rate")
    rates.set_ylabel("learning rate", fontsize=TEXT)
    ema = rates.twinx()
    steps, rate = curves["train_ema_rate"]
    _plot(ema, (steps, 1 - rate), "third", "1 - EMA rate")
    if len(rate) and (rate < 1).all():
        ema.set_yscale("log")
    ema.set_ylabel("1 - EMA rate", fontsize=TEXT)

    for panel, others in ((loss, []), (rank, [deviation]), (rates, [ema])):
        handles = [line for axes in (panel, *others) for line in axes.get_lines()]
        for axes in (panel, *others):
            axes.tick_params(which="both", labelsize=TEXT - 1, width=0.5, length=2)
            axes.spines["top"].set_visible(False)
            axes.spines["right"].set_visible(bool(others))
            if axes.get_yscale() == "linear" and axes is not loss:
                axes.set_ylim(bottom=0)
        panel.set_xlabel("optimiser steps", fontsize=TEXT)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if handles:
            place = dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above the curves
            panel.legend(
                handles=handles, fontsize=TEXT - 1, frameon=False, columnspacing=1.2, **place
            )
    return _save(figure, path)


def curve(rows: Iterable[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one column, of the rows that have it.

    Example
    -------
    >>> rows = [{"step": "1", "loss": ""}, {"step": "2", "loss": "0.5"}, {"step": "3"}]
    >>> curve(rows, "loss")
    (array([2.]), array([0.5]))
    """
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) not in (None, "")]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _plot(axes, points: Sequence[np.ndarray], colour, label, marker=False):
    if len(points[0]):
        style = dict(marker="o", markersize=2.5) if marker else {}
        axes.plot(*points, color=COLOURS[colour], linewidth=1.2, label=label, **style)


def _save(figure: Figure, path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
