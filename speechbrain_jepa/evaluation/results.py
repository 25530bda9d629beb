"""Results of linear evaluation: kept as JSON, collected into tables beside the paper's rows."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.evaluation.linear_probe import Outcome
from speechbrain_jepa.files import whole_file, write_text

RESULT = "result.json"

TASKS = {  # name: as the paper's tables call it
    "esc50": "ESC-50",
    "urbansound8k": "US8K",
    "speech_commands": "SPCV2",
    "voxceleb1": "VC1",
    "cremad": "CRM-D",
    "gtzan": "GTZAN",
    "nsynth": "NSynth",
    "surge": "Surge",
}

PAPER = (
    "Riou, Lattner, Hadjeres, Peeters: Investigating Design Choices in Joint-Embedding Predictive "
    "Architectures for General Audio Representation Learning, 2024"
)
PAPER_ROWS = {  # (table, row): accuracy in % on TASKS, in their order
    ("2", "JEPA, d = 2.1 s"): (89.3, 87.2, 94.9, 60.8, 72.2, 82.1, 76.8, 42.8),
    ("2", "JEPA, d = 3.2 s"): (89.8, 86.5, 94.6, 61.7, 72.6, 84.3, 75.6, 42.0),
    ("2", "JEPA, d = 6.4 s"): (90.0, 87.7, 92.8, 63.6, 70.8, 86.9, 74.9, 41.1),
    ("2", "wav2vec 2.0"): (57.6, 66.9, 96.6, 40.9, 65.5, 57.8, 56.6, 15.2),
    ("2", "ATST Base"): (92.9, 84.1, 95.1, 72.0, 68.6, 76.4, 75.6, 37.7),
    ("2", "MSM-MAE"): (88.6, 86.3, 94.5, 72.2, 70.2, 78.4, 75.9, 42.5),
    ("2", "M2D"): (89.7, 87.6, 95.4, 73.1, 71.7, 83.3, 75.3, 41.0),
    ("3", "unstructured, audio"): (89.3, 87.2, 94.9, 60.8, 72.2, 82.1, 76.8, 42.8),
    ("3", "multi-block, audio"): (88.6, 86.4, 92.1, 54.7, 67.6, 81.6, 75.2, 42.8),
    ("3", "time, audio"): (78.1, 77.1, 86.7, 52.3, 62.5, 79.2, 71.7, 33.0),
    ("3", "unstructured, latent"): (85.1, 84.1, 92.3, 56.9, 66.4, 80.1, 76.5, 40.8),
    ("3", "multi-block, latent"): (88.4, 79.6, 89.4, 54.3, 66.3, 83.1, 72.8, 35.2),
    ("3", "time, latent"): (82.3, 81.0, 85.2, 30.6, 60.9, 75.6, 73.7, 37.7),
}
REFERENCE = ("2", "JEPA, d = 2.1 s")  # what differences are to
OWN_SPLIT = "†"  # marks scores that compare with nobody else's


@dataclass(frozen=True)
class LayerScore:
    """Scores of one layer in per cent.

    Arguments
    ---------
    layer : int
        -1 is the last.
    seeds : list of float
        Test score of each seed, the mean over its folds.
    valid : float
        Mean validation score.
    neighbours : float or None
        Mean test accuracy of the nearest neighbours.
    """

    layer: int
    seeds: list[float]
    valid: float
    neighbours: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def deviation(self) -> float:
        """Between seeds; NaN for one."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else float("nan")


@dataclass(frozen=True)
class Result:
    """What one encoder scored on one task.

    Arguments
    ---------
    task, encoder, probe, metric : str
        The metric is "accuracy" or "mAP".
    layers : list of LayerScore
    classes : list of str
    class_scores : list of float
        In per cent, mean over folds and seeds, of `best`.
    confusion : list of lists of int
        Test clips by true and predicted class, over all folds and seeds, of `best`; empty for
        multi-label.
    counts : dict
        Clips: in all, skipped, and of the first division's train, valid and test.
    settings : dict
        Whatever the scores depend on.
    own_split : bool
        The clips were divided in a way of this recipe's own: the paper's scores are on other clips.
        Default False.
    """

    task: str
    encoder: str
    probe: str
    metric: str
    layers: list[LayerScore]
    classes: list[str]
    class_scores: list[float]
    confusion: list[list[int]]
    counts: dict
    settings: dict = field(default_factory=dict)
    own_split: bool = False

    @property
    def best(self) -> LayerScore:
        """The layer that is best on validation."""
        return max(self.layers, key=lambda layer: layer.valid)

    def save(self, path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path) -> "Result":
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = [LayerScore(**layer) for layer in values.pop("layers")]
        return cls(layers=layers, **values)

    def layer_table(self) -> str:
        """A line for each layer, the best on validation marked."""
        lines = ["layer   test             valid   nearest neighbours"]
        for layer in self.layers:
            name = "last" if layer.layer == -1 else str(layer.layer)
            near = "" if layer.neighbours is None else f"{layer.neighbours:.1f}"
            mark = " *" if layer is self.best and len(self.layers) > 1 else ""
            score = _score(layer)
            lines.append(f"{name:6}  {score:15}  {layer.valid:5.1f}   {near}{mark}")
        return "\n".join(lines)


def summarise(
    outcomes: Sequence[Outcome], clips: LabelledClips, layers: Sequence[int], **facts
) -> Result:
    """The result of the outcomes of one encoder on one task.

    Arguments
    ---------
    outcomes : sequence of Outcome
        Of `probe`.
    clips : LabelledClips
    layers : sequence of int
        Of the features.
    **facts
        task, encoder, probe, counts, settings, own_split.

    Returns
    -------
    Result
    """
    scores = []
    for index, layer in enumerate(layers):
        mine = [outcome for outcome in outcomes if outcome.trial.layer == index]
        seeds = list(dict.fromkeys(outcome.trial.seed for outcome in mine))
        near = [o.neighbours_score for o in mine if o.neighbours_score is not None]
        scores.append(
            LayerScore(
                layer,
                [_percent(o.score for o in mine if o.trial.seed == seed) for seed in seeds],
                _percent(outcome.valid_score for outcome in mine),
                _percent(near) if near else None,
            )
        )
    result = Result(
        metric="mAP" if clips.multilabel else "accuracy",
        layers=scores,
        classes=clips.classes,
        class_scores=[],
        confusion=[],
        **facts,
    )
    index = list(layers).index(result.best.layer)
    mine = [outcome for outcome in outcomes if outcome.trial.layer == index]
    per_class = np.ma.masked_invalid([outcome.class_scores for outcome in mine])
    result.class_scores.extend((100 * per_class.mean(0)).filled(np.nan).tolist())
    if not clips.multilabel:
        confusion = np.zeros((len(clips.classes),) * 2, int)
        for outcome in mine:
            np.add.at(confusion, (clips.targets[outcome.trial.rows.test], outcome.predictions), 1)
        result.confusion.extend(confusion.tolist())
    return result


def _percent(shares) -> float:
    return 100 * float(np.mean(list(shares)))


def collect(folder) -> list[Result]:
    """All results below a folder, sorted by their paths."""
    return [Result.load(path) for path in sorted(Path(folder).rglob(RESULT))]


def _score(layer: LayerScore) -> str:
    deviation = layer.deviation
    return f"{layer.mean:.1f}" + ("" if np.isnan(deviation) else f" ± {deviation:.1f}")


def table(
    results: Iterable[Result], reference=REFERENCE, paper: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Encoders by tasks, and the paper's rows on the same tasks.

    Arguments
    ---------
    results : iterable of Result
    reference : (str, str) or None
        The row of `PAPER_ROWS` that differences are to.
    paper : bool
        Give the paper's rows. Default True.

    Returns
    -------
    ours : DataFrame of str
        "mean ± deviation (difference)" in per cent, empty where there is no result; a dagger in
        place of the difference where the split is not the paper's.
    theirs : DataFrame of str
        Only tasks of the paper; empty where ours has none of them.

    Example
    -------
    >>> score = LayerScore(-1, [88.0, 89.0], 90.0)
    >>> result = Result("esc50", "mine", "paper", "accuracy", [score], [], [], [], {})
    >>> ours, theirs = table([result])
    >>> ours.loc["mine", "ESC-50"], theirs.loc["M2D (Table 2)", "ESC-50"]
    ('88.5 ± 0.7 (-0.8)', '89.7')
    """
    results = list(results)
    order = [*TASKS, *dict.fromkeys(r.task for r in results if r.task not in TASKS)]
    columns = [task for task in order if any(r.task == task for r in results)]
    several = len({result.probe for result in results}) > 1
    cells: dict[str, dict[str, str]] = {}
    for result in results:
        name = f"{result.encoder} [{result.probe}]" if several else result.encoder
        text = _score(result.best)
        if result.metric != "accuracy":
            text += f" {result.metric}"
        elif result.own_split:
            text += f" {OWN_SPLIT}"
        elif reference and result.task in TASKS:
            place = list(TASKS).index(result.task)
            text += f" ({result.best.mean - PAPER_ROWS[reference][place]:+.1f})"
        cells.setdefault(name, {})[result.task] = text
    titles = [TASKS.get(task, task) for task in columns]
    ours = pd.DataFrame.from_dict(cells, orient="index", columns=None)
    ours = ours.reindex(columns=columns).fillna("").set_axis(titles, axis=1)
    known = [task for task in columns if task in TASKS] if paper else []
    theirs = pd.DataFrame(
        {
            TASKS[task]: [f"{row[list(TASKS).index(task)]:.1f}" for row in PAPER_ROWS.values()]
            for task in known
        },
        index=[f"{name} (Table {number})" for number, name in PAPER_ROWS] if known else [],
    )
    return ours, theirs


def write_tables(results: Iterable[Result], folder, reference=REFERENCE) -> str:
    """Write results.csv, results.md and results.tex.

    Arguments
    ---------
    results : iterable of Result
    folder : str or Path
    reference : (str, str) or None
        See `table`.

    Returns
    -------
    str
        The table for a terminal.
    """
    results, folder = list(results), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = table(results, reference)
    _write_csv(results, folder / "results.csv")
    note = _note(reference if len(theirs.columns) else None, results)
    both = pd.concat([ours, theirs]).fillna("")
    write_text(folder / "results.md", f"{_markdown(both)}\n\n{note}\n")
    write_text(folder / "results.tex", _latex(ours, theirs, note))
    return f"{both.to_string()}\n{note}"


def _note(reference, results: Sequence[Result]) -> str:
    note = "Test score in %, mean ± deviation between seeds."
    if reference:
        note += (
            f" In brackets: difference to the paper's {reference[1]} (Table {reference[0]}). "
            f"Paper: {PAPER}, Tables 2 and 3."
        )
    own = dict.fromkeys(TASKS.get(r.task, r.task) for r in results if r.own_split)
    if own:
        note += (
            f" {OWN_SPLIT} {', '.join(own)}: divided by this recipe (no --split_csv), so that "
            "other rows are on other clips."
        )
    return note


def _write_csv(results: list[Result], path: Path) -> None:
    columns = ["encoder", "task", "probe", "layer", "metric", "mean", "deviation", "seeds"]
    columns += ["valid", "nearest_neighbours", "paper", "source"]
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for result in results:
            for layer in result.layers:
                name = "last" if layer.layer == -1 else layer.layer
                row: list = [result.encoder, result.task, result.probe, name, result.metric]
                row += [round(layer.mean, 3), round(layer.deviation, 3), len(layer.seeds)]
                source = "own split" if result.own_split else ""
                writer.writerow([*row, round(layer.valid, 3), layer.neighbours, False, source])
        tasks = {result.task for result in results}
        for (number, name), values in PAPER_ROWS.items():
            for task, value in zip(TASKS, values):
                if task in tasks:
                    row = [name, task, "paper", "last", "accuracy", value, "", "", "", ""]
                    writer.writerow([*row, True, f"{PAPER}, Table {number}"])


def _markdown(frame: pd.DataFrame) -> str:
    lines = [["", *frame.columns], ["---"] * (1 + len(frame.columns))]
    lines += [[name, *row] for name, row in zip(frame.index, frame.to_numpy())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _latex(ours: pd.DataFrame, theirs: pd.DataFrame, note: str) -> str:
    def cell(text) -> str:
        text = str(text)
        for plain, escaped in (
            ("_", r"\_"),
            ("%", r"\%"),
            ("&", r"\&"),
            ("±", r"$\pm$"),
            ("†", r"$\dagger$"),
        ):
            text = text.replace(plain, escaped)
        return text

    def line(cells) -> str:
        return " & ".join(map(cell, cells)) + r" \\"

    parts = [r"\begin{tabular}{l" + "r" * len(ours.columns) + "}", r"\toprule"]
    parts += [line(["encoder", *ours.columns]), r"\midrule"]
    parts += [line([name, *row]) for name, row in zip(ours.index, ours.to_numpy())]
    if len(theirs):
        parts.append(r"\midrule")
        theirs = theirs.reindex(columns=ours.columns).fillna("")
        parts += [line([name, *row]) for name, row in zip(theirs.index, theirs.to_numpy())]
    parts += [r"\bottomrule", r"\end{tabular}", f"% {note}", ""]
    return "\n".join(parts)
