"""Figures of a linear evaluation: confusion, classes, profiles over tasks, a map of the clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from speechbrain_jepa.evaluation.pictures import COLOURS, DPI, TEXT, _save

NAMED_CLASSES = 60  # with more, their names are left out
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
PRINCIPAL_DIMS = 50  # that t-SNE starts from


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_confusion(confusion, classes: Sequence[str], path) -> Path:
    """Confusion matrix in per cent of each true class.

    Arguments
    ---------
    confusion : array [K, K] of int
        True classes by predicted ones.
    classes : sequence of str
    path : str or Path
        Where the PNG goes. Its folder is made.

    Returns
    -------
    Path

    Example
    -------
    >>> draw_confusion([[3, 1], [0, 4]], ["cat", "dog"], getfixture("tmp_path") / "c.png").name
    'c.png'
    """
    confusion = np.asarray(confusion, float)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    side = min(max(0.22 * len(classes), 2.6), 12) if named else 7.0
    figure, axes = _figure(side + 1.6, side + 0.8)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set_xlabel("predicted", fontsize=TEXT)
    axes.set_ylabel("true", fontsize=TEXT)
    if named:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
    axes.tick_params(labelsize=TEXT - 1, width=0.5, length=2)
    if len(classes) <= 16:
        for row, column in np.ndindex(share.shape):
            if share[row, column] >= 0.5:
                colour = "white" if share[row, column] > 55 else "black"
                text = f"{share[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    bar = figure.colorbar(image, shrink=0.7)
    bar.set_label("% of the true class", fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT - 1, width=0.5, length=2)
    return _save(figure, path)


def draw_class_scores(scores, classes: Sequence[str], path, metric: str = "accuracy") -> Path:
    """Score of each class, the best first.

    Arguments
    ---------
    scores : sequence of float [K]
        In per cent; NaN for classes that are not tested.
    classes : sequence of str
    path : str or Path
    metric : str
        What the axis says. Default "accuracy".

    Returns
    -------
    Path

    Example
    -------
    >>> draw_class_scores([90.0, 70.0], ["cat", "dog"], getfixture("tmp_path") / "s.png").name
    's.png'
    """
    scores = np.asarray(scores, float)
    order = np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable")
    order = order[~np.isnan(scores[order])]
    figure, axes = _figure(min(max(0.17 * len(order), 3.2), 13), 2.8)
    axes.bar(range(len(order)), scores[order], color=COLOURS["train"], width=0.8)
    axes.axhline(scores[order].mean(), color=COLOURS["valid"], linewidth=1)
    axes.text(len(order) - 0.5, scores[order].mean() + 1, "mean", ha="right", fontsize=TEXT - 1)
    if len(order) <= NAMED_CLASSES:
        axes.set_xticks(range(len(order)), [classes[index] for index in order], rotation=90)
    else:
        axes.set_xlabel(f"{len(order)} classes", fontsize=TEXT)
    axes.set_ylim(0, 105)
    axes.set_ylabel(f"{metric} (%)", fontsize=TEXT)
    _plain(axes)
    return _save(figure, path)


def draw_profiles(scores: Mapping[str, Mapping[str, float]], path) -> Path:
    """Several encoders over several tasks, side by side.

    Arguments
    ---------
    scores : dict of dicts
        For each encoder, the score in per cent on each task that it has one for.
    path : str or Path

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If there are no scores.

    Example
    -------
    >>> scores = {"mine": {"ESC-50": 88.0, "GTZAN": 80.0}, "logmel": {"ESC-50": 30.0}}
    >>> draw_profiles(scores, getfixture("tmp_path") / "profiles.png").name
    'profiles.png'
    """
    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    if not tasks:
        raise ValueError("there are no scores: nothing to draw")
    figure, axes = _figure(max(0.9 * len(tasks), 3.6) + 1.8, 3.2)
    width = 0.8 / len(scores)
    for number, (name, row) in enumerate(scores.items()):
        places = [tasks.index(task) + width * (number + 0.5) - 0.4 for task in row]
        colour = PALETTE[number % len(PALETTE)]
        axes.bar(places, list(row.values()), width * 0.92, label=name, color=colour)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test score (%)", fontsize=TEXT)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.legend(fontsize=TEXT - 1, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _save(figure, path)


def draw_map(features, labels: Sequence[str], path, max_clips: int = 2000, seed: int = 0) -> Path:
    """A map of clips by t-SNE: those with similar embeddings lie close to each other.

    Arguments
    ---------
    features : array [n, C]
        Embeddings; they are standardised, and reduced to 50 principal dims first.
    labels : sequence of str [n]
        What the colours mean.
    path : str or Path
    max_clips : int
        A random choice of so many. Default 2000.
    seed : int

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If there are fewer than 4 clips.

    Example
    -------
    >>> x = np.random.default_rng(0).normal(size=(12, 4))
    >>> draw_map(x, list("ab" * 6), getfixture("tmp_path") / "map.png").name
    'map.png'
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(labels) < 4:
        raise ValueError(f"{len(labels)} clips are too few for a map: give at least 4")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(labels))[:max_clips])
    x = np.asarray(features[chosen], np.float32)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    if min(x.shape) > PRINCIPAL_DIMS:
        x = PCA(PRINCIPAL_DIMS, random_state=seed).fit_transform(x)
    perplexity = min(30.0, (len(x) - 1) / 3)
    places = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(x)
    mine = np.array([labels[index] for index in chosen])
    classes = sorted(set(labels))
    figure, axes = _figure(6.0, 4.6)
    colours = [_colour(number, len(classes)) for number in range(len(classes))]
    for name, colour in zip(classes, colours):
        axes.scatter(*places[mine == name].T, s=6, color=colour, linewidths=0, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    if len(classes) <= 24:
        axes.legend(
            fontsize=TEXT - 1, frameon=False, markerscale=2, loc="upper left", bbox_to_anchor=(1, 1)
        )
    else:
        axes.set_title(f"{len(classes)} classes", fontsize=TEXT)
    return _save(figure, path)


def _colour(number: int, count: int):
    from matplotlib import colormaps

    if count <= len(PALETTE):
        return PALETTE[number]
    return colormaps["tab20"](number) if count <= 20 else colormaps["turbo"](number / (count - 1))


def _plain(axes) -> None:
    axes.tick_params(labelsize=TEXT - 1, width=0.5, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
