"""What the tasks of SUPERB gave: kept as JSON, collected into one table."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_jepa.files import whole_file, write_text
from speechbrain_jepa.s3prl.tasks import TASKS

RESULT = "result.json"


@dataclass(frozen=True)
class Score:
    """What an upstream reached on a task: `values` by the names of the task's metrics."""

    task: str
    encoder: str
    values: dict[str, float]
    checkpoint: str
    command: list[str]

    @classmethod
    def load(cls, path) -> "Score":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def _cells(scores: Iterable[Score]) -> Iterator[tuple[str, str, str, float, bool, str]]:
    """Encoder, task, metric, value, whether higher is better, checkpoint."""
    order = list(TASKS)
    for score in sorted(scores, key=lambda score: order.index(score.task)):
        for metric in TASKS[score.task].metrics:
            value = score.values[metric.name]
            yield (
                *(score.encoder, score.task, metric.name, value),
                *(metric.higher_is_better, score.checkpoint),
            )


def write_tables(scores: Sequence[Score], folder: Path) -> str:
    """results.csv, a row for each number, and results.md, a row for each encoder.

    Returns
    -------
    str
        The second.

    Example
    -------
    >>> scores = [Score("KS", name, {"accuracy %": 90.0}, "dev-best.ckpt", []) for name in "ab"]
    >>> print(write_tables(scores, getfixture("tmp_path")))
    | encoder | KS accuracy % ↑ |
    | --- | --- |
    | a | 90.00 |
    | b | 90.00 |
    """
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    header = ["encoder", "task", "metric", "value", "higher_is_better", "checkpoint"]
    path = folder / "results.csv"
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for cell in _cells(scores):
            writer.writerow(cell)
            encoder, task, metric, value, higher, _ = cell
            column = f"{task} {metric} {'↑' if higher else '↓'}"
            columns[column] = None
            rows.setdefault(encoder, {})[column] = f"{value:.2f}"
    lines = [["encoder", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_text(folder / "results.md", f"{text}\n")
    return text
