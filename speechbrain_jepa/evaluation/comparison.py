"""Pretraining recipes compared: runs of train.py, scored by the quick probe, in one csv.

A run is a row as soon as it ends. What is a row is not run again, nor is a run with the arguments
of one; one that differs from a row in its read-out alone is scored anew, and not trained. A run
that was killed goes on from its checkpoint. A run that failed is a row that says so, and is tried
again next time.
"""

import csv
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from speechbrain_jepa.data.sampler import mixed_batch_sizes
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation.logmel import LOG_MEL, logmel_statistics
from speechbrain_jepa.evaluation.online_probe import embed_with
from speechbrain_jepa.evaluation.quick_probe import (
    embed_files,
    files_used,
    probe_table,
    read_label_sets,
)
from speechbrain_jepa.files import folder_lock, write_text
from speechbrain_jepa.vit import Encoder

logger = logging.getLogger(__name__)

SPLITS = ("valid", "test")
UNTRAINED = "untrained"
DONE = "done"
# what the paper has otherwise than the quickstart, as told to train.py
PAPER_FEATURES = ("--n_fft", "400", "--n_mels", "80", "--patch_frequency", "16")
PAPER_READ_OUT = ("--embedding_layers", "last", "--embedding_pooling", "mean")
READ_OUT = {"--embedding_layers": "layers", "--embedding_pooling": "pooling"}  # of AudioJEPA
MEASURED = ("steps", "global_batch", "minutes_trained", "rank", "status", *SPLITS)


@dataclass(frozen=True)
class Run:
    """One pretraining.

    Arguments
    ---------
    recipe : str
        Name of the recipe in the table.
    arguments : tuple of str
        What train.py is told: a yaml and overrides. Folders and the seed come with `Comparison`.
    seed : int
    keys : mapping
        Further columns that tell runs apart, such as the budget.
    """

    recipe: str
    arguments: tuple[str, ...]
    seed: int = 0
    keys: Mapping[str, object] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        """The columns that tell this run from the others, as text."""
        columns = {"recipe": self.recipe, **self.keys, "seed": self.seed}
        return {name: str(value) for name, value in columns.items()}

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return re.sub(r"[^\w.-]+", "_", "-".join(self.identity.values()))

    @property
    def _overrides(self) -> list[tuple[str, str]]:
        return list(zip(self.arguments[1::2], self.arguments[2::2]))

    @property
    def read_out(self) -> dict[str, object]:
        """What of `AudioJEPA` the embedding is taken from, where the arguments say so."""
        return {
            READ_OUT[flag]: yaml.safe_load(value)
            for flag, value in self._overrides
            if flag in READ_OUT
        }

    @property
    def training(self) -> "Run":
        """This run with the read-out of its yaml."""
        kept = (word for pair in self._overrides if pair[0] not in READ_OUT for word in pair)
        return replace(self, arguments=(self.arguments[0], *kept))


class Comparison:
    """A table of runs on one corpus and one folder of label sets.

    Arguments
    ---------
    output_folder : str or path
        Holds `scores.csv`, a folder for each run, and the scan that they share.
    data_folder : str, path or None
        Audio to pretrain on. None: the demo corpus.
    tasks_folder : str or path
        Label sets (see `read_label_sets`) with train, valid and test rows.
    train : str or path
        The pretraining script.

    Raises
    ------
    FileNotFoundError, ValueError
        If the label sets do not fit, before anything is trained.
    """

    def __init__(self, output_folder, data_folder, tasks_folder, train):
        self.output_folder = Path(output_folder)
        self.data_folder = data_folder
        self.train = Path(train)
        self.label_sets = read_label_sets(tasks_folder)
        for name, clips in self.label_sets.items():
            missing = {"train", *SPLITS} - set(clips.splits)
            if missing:
                raise ValueError(
                    f"label set {name} of {tasks_folder} has no {sorted(missing)[0]} rows: recipes "
                    "are chosen on valid, and test is for the table"
                )
        self.output_folder.mkdir(parents=True, exist_ok=True)
        self.csv = self.output_folder / "scores.csv"

    @property
    def rows(self) -> list[dict[str, str]]:
        """What scores.csv holds."""
        if not self.csv.exists():
            return []
        with open(self.csv, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def command(self, run: Run, folder: str | None = None) -> list[str]:
        """What makes this run again, by itself; in a folder of another name."""
        data = [] if self.data_folder is None else ["--data_folder", str(self.data_folder)]
        return [
            *(sys.executable, str(self.train), *run.arguments, *data),
            *("--output_folder", str(self.output_folder / (folder or run.folder))),
            *("--cache_folder", str(self.output_folder / "scan")),
            *("--seed", str(run.seed), "--after_training", "null", "--report", "False"),
            "--noprogressbar",
        ]

    def typed(self, run: Run, folder: str | None = None) -> str:
        """`command` for a reader: python by its name, paths from the current folder."""
        words = (os.path.relpath(w) if _is_here(w) else w for w in self.command(run, folder)[1:])
        return shlex.join(["python", *words])

    def run(self, runs: Iterable[Run]) -> list[dict[str, str]]:
        """Train and score what is not a row yet, one run after another.

        Returns
        -------
        list of dict
            The rows of `runs`, as in scores.csv.
        """
        wanted = []
        with folder_lock(self.output_folder, fix="wait for that comparison, or name another"):
            for run in runs:
                row = self._row_of(run)
                if row is None or row["status"] != DONE:
                    row = (
                        self._same_training(run)
                        or self._other_read_out(run)
                        or self._train_and_score(run)
                    )
                    self._add(run, row)
                wanted.append(row)
        return wanted

    def baselines(
        self, like: Mapping[str, Run], seeds: Sequence[int] = (0, 1, 2)
    ) -> list[dict[str, str]]:
        """Log-mel statistics, and untrained encoders with the shape and read-out of runs.

        Arguments
        ---------
        like : mapping of Run
            Done runs, by what their untrained rows are to be called.
        seeds : sequence of int
            Of the initialisations.

        Returns
        -------
        list of dict
            These and all others that scores.csv holds.
        """
        wanted: list[tuple[Run, Run | None]] = [(Run(LOG_MEL, ()), None)]
        wanted += [(Run(name, (), seed), run) for name, run in like.items() for seed in seeds]
        with folder_lock(self.output_folder, fix="wait for that comparison, or name another"):
            for baseline, run in wanted:
                if self._row_of(baseline) is None:
                    embed = logmel_statistics
                    if run is not None:
                        encoder = AudioJEPA(self._trained(self._row_of(run)), **run.read_out)
                        embed = embed_with(untrained_like(encoder, baseline.seed))
                    self._add(baseline, baseline.identity | {"status": DONE} | self.score(embed))
        return [row for row in self.rows if row["recipe"].startswith((LOG_MEL, UNTRAINED))]

    def shapes(self, runs: Iterable[Run]) -> list[Run]:
        """The first done run of every encoder, features and read-out, where its folder is here."""
        found: dict[str, Run] = {}
        for run in runs:
            folder = self._trained(self._row_of(run))
            if folder is not None:
                config = _config_of(folder)
                read_out = config.get("embedding", {}) | run.read_out
                shape = json.dumps([config["encoder"], config["features"], read_out])
                found.setdefault(shape, run)
        return list(found.values())

    def _trained(self, row: Mapping[str, str] | None) -> Path | None:
        """The pretrained folder of a done row, where it is here."""
        if row is None or row["status"] != DONE:
            return None
        folder = self.output_folder / row["folder"] / "pretrained"
        return folder if folder.is_dir() else None

    def score(self, embed) -> dict[str, str]:
        """Average accuracy on valid and test, and the test accuracy of each label set, in %."""
        files = files_used(self.label_sets, ("train", *SPLITS))
        features, read = embed_files(files, {"x": [embed]})
        tables = {s: probe_table(features, read, self.label_sets, s).accuracy for s in SPLITS}
        averages = {split: table.mean(axis=1).iloc[0] for split, table in tables.items()}
        columns = averages | tables["test"].iloc[0].to_dict()
        return {name: f"{value:.2f}" for name, value in columns.items()}

    def _row_of(self, run: Run) -> dict[str, str] | None:
        for row in self.rows:
            if run.identity.items() <= row.items():
                return row
        return None

    def _same_training(self, run: Run) -> dict[str, str] | None:
        """The row of another question whose run is this one but for its name, under this name."""
        for row in self.rows:
            folder = row.get("folder")
            if row["status"] == DONE and folder and self.typed(run, folder) == row["command"]:
                measured = {*MEASURED, *self.label_sets, "folder", "command"}
                return run.identity | {name: row[name] for name in measured & row.keys()}
        return None

    def _other_read_out(self, run: Run) -> dict[str, str] | None:
        """What a row has trained, read out as this run says."""
        row = self._same_training(run.training) if run.read_out else None
        trained = self._trained(row)
        if row is None or trained is None:
            return None
        logger.info("reading %s out as %s", row["folder"], run.identity)
        scores = self.score(embed_with(AudioJEPA(trained, **run.read_out)))
        return row | {"command": self.typed(run)} | scores

    def _add(self, run: Run, row: dict[str, str]) -> None:
        rows = [old for old in self.rows if not run.identity.items() <= old.items()] + [row]
        keys = dict.fromkeys(name for r in rows for name in r)
        last = ("folder", "command")
        tasks = [name for name in self.label_sets if name in keys]
        known = {*MEASURED, *last, *tasks}
        columns = [name for name in keys if name not in known]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns, *MEASURED, *tasks, *last], restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.csv, text.getvalue())

    def train_only(self, run: Run) -> Path:
        """Pretrain, or go on where a killed run was.

        Returns
        -------
        Path
            The experiment folder.

        Raises
        ------
        RuntimeError
            If train.py fails, with its last line. What it printed is in output.txt.
        """
        folder = self.output_folder / run.folder
        folder.mkdir(exist_ok=True)
        with open(folder / "output.txt", "ab") as output:
            command = self.command(run)
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {code}")
        return folder

    def _train_and_score(self, run: Run) -> dict[str, str]:
        logger.info("pretraining %s", run.identity)
        row = run.identity | {"command": self.typed(run), "folder": run.folder}
        try:
            folder = self.train_only(run)
        except RuntimeError as error:
            logger.error("%s failed: %s", run.folder, error)
            return row | {"status": f"failed: {error}"[:200]}
        scores = self.score(embed_with(AudioJEPA(folder / "pretrained")))
        return row | training_of(folder) | {"status": DONE} | scores


def _is_here(word: str) -> bool:
    return os.path.isabs(word) and Path(word).is_relative_to(Path.cwd())


def untrained_like(encoder: AudioJEPA, seed: int) -> AudioJEPA:
    """The same shape, normalisation and read-out with the weights of a fresh initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Encoder(encoder.encoder.grid, **encoder.encoder.config)
    encoder.encoder.load_state_dict(fresh.state_dict())
    return encoder


def training_of(folder: str | Path) -> dict[str, str]:
    """Steps, minutes of training (validation and start not counted) and the last effective rank.

    Arguments
    ---------
    folder : str or path
        An experiment folder.
    """
    metrics = pd.read_csv(Path(folder) / "metrics.csv")
    train = metrics.dropna(subset=["train_clips_per_second"])
    steps = np.diff(train["step"], prepend=0)
    seconds = (steps * clips_a_step(folder) / train["train_clips_per_second"]).sum()
    return {
        "steps": str(int(metrics["step"].max())),
        "global_batch": str(_config_of(Path(folder) / "pretrained")["training"]["global_batch"]),
        "minutes_trained": f"{seconds / 60:.2f}",
        "rank": f"{metrics['valid_embedding_rank'].dropna().iloc[-1]:.0f}",
    }


def clips_a_step(folder: str | Path) -> float:
    """Crops of an optimiser step: the mean over the durations, where there are several."""
    training = _config_of(Path(folder) / "pretrained")["training"]
    frames = training.get("mixed_frames") or [1]
    return float(np.mean(mixed_batch_sizes(training["global_batch"], frames)))


def _config_of(pretrained: Path) -> dict:
    return json.loads((pretrained / "config.json").read_text(encoding="utf-8"))


def mean_and_deviation(values: Sequence[float]) -> str:
    """
    Example
    -------
    >>> mean_and_deviation([66.0, 68.0])
    '67.0 ± 1.4'
    """
    mean = np.mean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {np.std(values, ddof=1):.1f}"


def table_of(rows: Sequence[Mapping[str, str]], by: Sequence[str], columns: Sequence[str]) -> str:
    """Markdown: one line per group of rows, mean and deviation over its seeds.

    Arguments
    ---------
    rows : sequence of mappings
        As in scores.csv.
    by : sequence of str
        Columns whose values make a group, in the order of their first appearance.
    columns : sequence of str
        Numbers to average. A group whose runs all failed says so.

    Example
    -------
    >>> rows = [{"recipe": "a", "status": "done", "test": t} for t in ("66.0", "68.0")]
    >>> print(table_of(rows, ["recipe"], ["test"]))
    | recipe | seeds | test |
    | --- | --- | --- |
    | a | 2 | 67.0 ± 1.4 |
    """
    groups: dict[tuple, list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in by), []).append(row)
    lines = [(*by, "seeds", *columns), ("---",) * (len(by) + 1 + len(columns))]
    for group, members in groups.items():
        done = [row for row in members if row["status"] == DONE]
        failed = next((row["status"] for row in members if row["status"] != DONE), "")
        cells = [
            mean_and_deviation([float(row[name]) for row in done if row.get(name)])
            if any(row.get(name) for row in done)
            else ""
            for name in columns
        ]
        if not done and cells:
            cells[0] = failed
        lines.append((*group, str(len(done)), *cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
