"""`python -m speechbrain_jepa.s3prl superb`: tasks of SUPERB one after another, and one table.

Each task is trained and evaluated by s3prl's own run_downstream.py, in a process of its own, in the
folder of the script. What is done is not done again; a training that was interrupted goes on from
its last checkpoint; what fails is listed at the end, and the rest goes on.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from speechbrain_jepa.files import folder_lock, whole_file, write_text
from speechbrain_jepa.s3prl.scores import RESULT, Score, write_tables
from speechbrain_jepa.s3prl.tasks import RUNNER, SAMPLE_RATE, TASKS, Task

SCORER = "score-TWV-Cnxe.sh"  # of QUESST 2014, in its folder scoring
# s3prl keeps the lists of VoxCeleb1's files here, whichever folder they were found in
CACHES = "downstream/voxceleb1/.cache"
CORPORA = "downstream/ctc/corpus"


@dataclass(frozen=True)
class Upstream:
    """What is evaluated.

    Arguments
    ---------
    name : str
        In the table, and of the folder of its results.
    source : str or None
        What -k takes; None for an upstream of s3prl itself, named by `name`.
    step_seconds : float
        Of a time step; 0 if it is s3prl's.
    num_layers : int
        Hidden states; 0 if it is s3prl's.
    """

    name: str
    source: str | None
    step_seconds: float = 0.0
    num_layers: int = 0

    def arguments(self, task: Task) -> list[str]:
        """-u and -k, with time steps that the task can do with.

        Example
        -------
        >>> Upstream("mine", "mine", 0.16, 13).arguments(TASKS["ASR"])
        ['-u', 'audio_jepa_40ms', '-k', 'mine']
        """
        if self.source is None:
            return ["-u", self.name]
        fits = task.longest_step is None or self.step_seconds <= task.longest_step * (1 + 1e-9)
        entry = "audio_jepa" if fits else task.entry
        return ["-u", entry, "-k", self.source]


class Failure(RuntimeError):
    """A task that cannot be run, or whose command failed."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; an error says what is wrong before anything runs."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.s3prl superb",
        description="Train and evaluate tasks of SUPERB with s3prl, and write one table.",
        epilog="; ".join(f"{task.name}: {task.data}" for task in TASKS.values()),
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="TASK=FOLDER")
    add("--tasks", nargs="+", metavar="TASK", help="only these; default: all that have data")
    add(
        *("--encoders", "-k"),
        nargs="+",
        required=True,
        help="whatever -k takes, or the name of an upstream of s3prl, such as fbank",
    )
    add("--output_folder", type=Path, default=Path("results/superb"))
    add("--s3prl", type=Path, help="the folder of run_downstream.py; default: here, or installed")
    add("--device", default="cuda", help="as run_downstream.py takes it; default cuda")
    add("--config", nargs="+", default=[], metavar="TASK=YAML", help="in place of s3prl's own")
    add("--override", "-o", default="", help="of run_downstream.py, for every task: a=b,,c=d")
    add("--options", "-g", help="a yaml file with options of AudioJEPA")
    options = parser.parse_args(arguments)
    options.data = _pairs(parser, "--data", options.data)
    options.config = _pairs(parser, "--config", options.config)
    options.tasks = options.tasks or list(options.data)
    for name in [*options.tasks, *options.config]:
        if name not in TASKS:
            parser.error(f"{name} is no task: there are {', '.join(TASKS)}")
        if name not in options.data:
            parser.error(f"{name} has no data: --data {name}=FOLDER, with {TASKS[name].data}")
    for folder in options.data.values():
        if not Path(folder).is_dir():
            parser.error(f"--data {folder}: there is no such folder")
        if "=" in folder or ",," in folder:
            parser.error(f"--data {folder}: s3prl's -o takes no path with = or ,,: use a link")
    options.s3prl = _find_s3prl(parser, options.s3prl)
    return options


def _pairs(parser, name: str, given: list[str]) -> dict[str, str]:
    wrong = [pair for pair in given if "=" not in pair]
    if wrong:
        parser.error(f"{name} {wrong[0]}: give TASK=PATH; the tasks are {', '.join(TASKS)}")
    pairs = dict(pair.split("=", 1) for pair in given)
    return {task: os.path.abspath(os.path.expanduser(path)) for task, path in pairs.items()}


def _find_s3prl(parser, folder: Path | None) -> Path:
    if folder is None:
        spec = find_spec("s3prl")
        installed = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates = [f for f in (Path(), *installed) if (f / RUNNER).is_file()]
        if not candidates:
            parser.error("s3prl is not installed, and this is no clone of it: docs/s3prl.md")
        folder = candidates[0]
    below = folder / "s3prl" / RUNNER  # a clone has its package one folder down
    folder = below.parent if below.is_file() else folder
    if not (folder / RUNNER).is_file():
        parser.error(f"--s3prl {folder}: there is no {RUNNER} in it")
    return folder.resolve()


def describe(source: str) -> Upstream:
    """The upstream that a name on the command line means.

    Arguments
    ---------
    source : str
        What -k takes, or an upstream of s3prl.
    """
    from speechbrain_jepa.checkpoints import packaged_encoders
    from speechbrain_jepa.s3prl import hubconf
    from speechbrain_jepa.s3prl.sources import is_url

    there = Path(source).expanduser()
    if not (there.exists() or is_url(source) or "/" in source or source in packaged_encoders()):
        return Upstream(source, None)
    path = os.path.abspath(there) if there.exists() else source
    model = hubconf.audio_jepa(path).model
    name = re.sub(r"[^\w.-]+", "_", there.resolve().name if there.exists() else source)
    return Upstream(name, path, model.downsample_rate / SAMPLE_RATE, model.num_layers)


class Run:
    """One task with one upstream.

    Arguments
    ---------
    task : Task
    upstream : Upstream
    options : Namespace
        Of `parse`.
    """

    def __init__(self, task: Task, upstream: Upstream, options: argparse.Namespace):
        self.task, self.upstream, self.options = task, upstream, options
        self.data = options.data[task.name]
        self.folder = (options.output_folder / task.name / upstream.name).resolve()
        self.config = Path(options.config.get(task.name) or options.s3prl / task.config)

    def score(self) -> Score:
        """Train and evaluate, or read what was done before.

        Raises
        ------
        Failure
            If something is missing, or a command fails.
        """
        command = self.command()
        if (done := self.folder / RESULT).exists():
            score = Score.load(done)
            if score.command != command:
                raise Failure(
                    f"{done} is of other settings: give another --output_folder, or remove "
                    f"{self.folder}.\n  then: {score.command}\n  now:  {command}"
                )
            return score
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder, "wait for it, or give another --output_folder"):
            values, checkpoint = self.run(command)
            score = Score(self.task.name, self.upstream.name, values, checkpoint, command)
            write_text(done, json.dumps(asdict(score), indent=1))
        return score

    def command(self) -> list[str]:
        """What is the same in all calls of run_downstream.py: the upstream, task and overrides."""
        overrides = self.task.overrides(self.data)
        if self.task.name == "ASR":
            lengths = self.folder / "lengths"
            overrides["config.downstream_expert.datarc.bucket_file"] = str(lengths)
        told = [
            f"{key}={value if value.startswith('[') else repr(value)}"
            for key, value in overrides.items()
        ]
        command = [*self.upstream.arguments(self.task), "-d", self.task.downstream]
        if self.options.options and self.upstream.source:
            command += ["-g", os.path.abspath(self.options.options)]
        override = ",,".join(filter(None, [*told, self.options.override]))
        return [*command, "-c", os.fspath(self.config), "-o", override]

    def check(self) -> None:
        """What would fail only after hours."""
        if not self.config.is_file():
            raise Failure(
                f"{self.config} does not exist; s3prl on PyPI has no yaml files: clone "
                f"https://github.com/s3prl/s3prl and give --s3prl, or --config {self.task.name}=..."
            )
        missing = [name for name in self.task.needs if find_spec(name) is None]
        if missing:
            raise Failure(f"{self.task.name} needs {', '.join(missing)}: pip install '.[superb]'")
        if self.task.downstream == "ctc" and not (self.options.s3prl / CORPORA).is_dir():
            raise Failure(
                f"{self.task.name} needs {CORPORA}, which s3prl on PyPI lacks: clone "
                "https://github.com/s3prl/s3prl and give --s3prl"
            )
        if self.task.name == "SID":
            for file in sorted((self.options.s3prl / CACHES).glob("*.pkl")):
                if os.fsencode(self.data) not in file.read_bytes():
                    raise Failure(
                        f"{file} lists the files of another folder than {self.data}: remove it"
                    )

    def run(self, command: list[str]) -> tuple[dict[str, float], str]:
        """The values and the checkpoint that they are of."""
        if self.task.name == "QbE":
            return self.query_by_example(command)
        if self.task.name == "ASR":
            write_lengths(self.data, self.config, self.folder / "lengths")
        if not self.task.folds:
            return self.train_and_evaluate(command, self.folder)
        values = []
        for fold in self.task.folds:
            told = f"{command[-1]},,config.downstream_expert.datarc.test_fold={fold!r}"
            folder = self.folder / fold
            values.append(self.train_and_evaluate([*command[:-1], told], folder)[0])
        names = [metric.name for metric in self.task.metrics]
        return {name: sum(v[name] for v in values) / len(values) for name in names}, self.task.best

    def train_and_evaluate(self, command, folder: Path) -> tuple[dict[str, float], str]:
        """The values of the best checkpoint, and its name."""
        folder.mkdir(exist_ok=True)
        self.call(folder / "train", "-m", "train", "-a", *command, "-p", folder)
        checkpoints = sorted(folder.glob(self.task.best), key=_step)
        if not checkpoints:
            raise Failure(
                f"{folder} has no {self.task.best}: training never came to an evaluation that was "
                "better than nothing; see train.log there"
            )
        results = []
        for checkpoint in checkpoints:
            given = ("-m", "evaluate", "-t", self.task.split, "-e", checkpoint)
            printed = self.call(folder / f"evaluate-{checkpoint.stem}", *given)
            results.append((self.values(printed), checkpoint.name))
        first = self.task.metrics[0]
        best = max if first.higher_is_better else min
        return best(results, key=lambda result: result[0][first.name])

    def query_by_example(self, command) -> tuple[dict[str, float], str]:
        """Every layer on the development queries, the best of them on the others."""
        scorer = Path(self.data, "scoring", SCORER)
        if not scorer.is_file():
            raise Failure(f"{scorer} does not exist: it comes with QUESST 2014, and gives the MTWV")

        def evaluate(layer: int | None, split: str, truth: str) -> dict[str, float]:
            folder = self.folder / f"layer-{'mean' if layer is None else layer}-{split}"
            folder.mkdir(exist_ok=True)
            selected = () if layer is None else ("-l", layer)
            given = ("-m", "evaluate", "-t", split, *selected, *command, "-p", folder)
            self.call(folder / "evaluate", *given)
            scored = subprocess.run(
                ["bash", scorer, folder, f"groundtruth_quesst14_{truth}", "-10"],
                cwd=scorer.parent,
                capture_output=True,
                text=True,
            )
            report = folder / "score.out"
            found = report.read_text(errors="replace") if report.exists() else ""
            return self.values(f"{scored.stdout}\n{found}\n{scored.stderr}")

        layers: list[int | None] = [*range(self.upstream.num_layers)] or [None]
        name = self.task.metrics[0].name
        best = max(layers, key=lambda layer: evaluate(layer, "dev", "dev")[name])
        return evaluate(best, "test", "eval"), f"layer {'mean' if best is None else best}"

    def values(self, printed: str) -> dict[str, float]:
        """What the metrics' patterns find last."""
        values = {}
        for metric in self.task.metrics:
            found = re.findall(rf"^{metric.pattern}", printed, re.MULTILINE)
            if not found:
                raise Failure(f"no line {metric.pattern!r} was printed, but:\n{printed[-2000:]}")
            values[metric.name] = metric.scale * float(found[-1])
        return values

    def call(self, log: Path, *arguments) -> str:
        """run_downstream.py with its output in files; gives what it printed."""
        words = [*map(str, arguments), "--device", self.options.device]
        command = [sys.executable, "-m", "speechbrain_jepa.s3prl", RUNNER, *words]
        out, err = log.with_name(f"{log.name}.log"), log.with_name(f"{log.name}.err")
        mode = "evaluate" if "evaluate" in words else "train"
        print(f"{self.task.name}, {self.upstream.name}: {mode} ({out})", flush=True)
        with ExitStack() as files:
            streams = [files.enter_context(open(path, "ab")) for path in (out, err)]
            started = streams[0].tell()
            code = subprocess.run(
                command, cwd=self.options.s3prl, stdout=streams[0], stderr=streams[1]
            ).returncode
        if code:
            said = err.read_text(errors="replace").replace("\r", "\n").splitlines()
            raise Failure(f"exit status {code}, see {err}\n" + "\n".join(said[-15:]))
        with open(out, "rb") as file:
            file.seek(started)
            return file.read().decode(errors="replace")


def _step(checkpoint: Path) -> int:
    """Of states-<step>.ckpt; 0 of another name."""
    return int((re.findall(r"-(\d+)$", checkpoint.stem) or [0])[0])


def write_lengths(data: str, config: Path, folder: Path) -> None:
    """What preprocess/generate_len_for_bucket.py writes of LibriSpeech, which asks on the terminal.

    Arguments
    ---------
    data : str
        The root of LibriSpeech.
    config : Path
        ASR's yaml; its lines train, dev-clean and test-clean name the parts.
    folder : Path
        Where <part>.csv goes, the longest file first.
    """
    import soundfile
    import yaml

    datarc = yaml.safe_load(config.read_text(encoding="utf-8"))["downstream_expert"]["datarc"]
    folder.mkdir(exist_ok=True)
    for part in [*datarc["train"], *datarc["dev-clean"], *datarc["test-clean"]]:
        files = [f for f in Path(data, part).rglob("*") if f.suffix in (".flac", ".wav")]
        if not files:
            raise Failure(f"{Path(data, part)} has no .flac or .wav")
        if (out := folder / f"{part}.csv").exists():
            continue
        rows = sorted(((soundfile.info(str(file)).frames, file) for file in files), reverse=True)
        with whole_file(out) as partial, open(partial, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["", "file_path", "length", "label"])
            for number, (length, file) in enumerate(rows):
                writer.writerow([number, file.relative_to(data).as_posix(), length, ""])


def main(arguments: Sequence[str]) -> int:
    """All pairs of task and encoder.

    Returns
    -------
    int
        How many failed.
    """
    options = parse(arguments)
    upstreams = [describe(source) for source in options.encoders]
    names = [upstream.name for upstream in upstreams]
    if len(set(names)) < len(names):
        sys.exit(f"--encoders: two of {', '.join(names)} have one name: rename a folder")
    scores, failures = [], []
    for name in options.tasks:
        for upstream in upstreams:
            try:
                scores.append(Run(TASKS[name], upstream, options).score())
            except Exception as error:  # the other tasks and encoders go on
                failures.append(f"{name}, {upstream.name}: {error}")
    if scores:
        print(f"\n{write_tables(scores, options.output_folder)}\n\n{options.output_folder}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return len(failures)
