"""HEAR's tasks, embedded and scored by heareval's two runners, unedited (hear.py's `run`).

    <embeddings>/<checkpoint>-<id>/
      results.csv                       one row a task
      own_step/ , event_0.04/ ...        the encoder's time step, or that of event tasks
        speechbrain_jepa.hear.../<task>/  embeddings, predictors and scores as heareval keeps them

heareval keeps embeddings under the name of the module and skips a task that it finds there: another
checkpoint would be given the scores of the first, so each has a folder of its own.
"""

import contextlib
import csv
import importlib
import io
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import soundfile
import torch

from speechbrain_jepa.checkpoints import find_folder
from speechbrain_jepa.data.audio import read_whole
from speechbrain_jepa.data.resampling import resample
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import HOP_LENGTH, SAMPLE_RATE
from speechbrain_jepa.files import folder_lock, whole_folder, write_text
from speechbrain_jepa.suites import checkpoint_id, checkpoint_name
from speechbrain_jepa.vit import PatchGrid
from speechbrain_jepa.windows import count_shifts

logger = logging.getLogger(__name__)

MODULE = "speechbrain_jepa.hear"
EVENT_STEP = 0.05  # seconds: HEAR's validator warns of time steps further apart
METADATA = "task_metadata.json"
SCORES = "test.predicted-scores.json"
# what lightning's checkpoints of heareval's predictors hold beside tensors: settings of its grid
GRID_VALUES: list[Any] = [
    torch.nn.BatchNorm1d,
    torch.nn.Identity,
    torch.nn.init.xavier_normal_,
    torch.nn.init.xavier_uniform_,
    torch.optim.Adam,
]


@dataclass
class HearScore:
    """A row of results.csv.

    Arguments
    ---------
    task : str
        Name of its folder.
    kind : str
        "scene" or "event".
    step_seconds : float
        Of the embeddings' time steps.
    metric : str
        The task's first, by which heareval chooses hyperparameters.
    test, valid : float
        Its value; with folds, the mean over them (of valid: NaN).
    """

    task: str
    kind: str
    step_seconds: float
    metric: str
    test: float
    valid: float


def find_tasks(tasks_dir, names=()) -> list[Path]:
    """HEAR's task folders.

    Arguments
    ---------
    tasks_dir : str or Path
    names : iterable of str
        Those to take, by name. Default: all.

    Returns
    -------
    list of Path
        Sorted.

    Raises
    ------
    FileNotFoundError
        If there is none, or one of the names is not among them.
    """
    folder = Path(tasks_dir)
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{METADATA}"))}
    if not found:
        raise FileNotFoundError(
            f"{folder}: no task of HEAR in it, a folder with {METADATA}; unpacked tasks are in a "
            "folder named tasks"
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"{folder} has no task {missing[0]}: it has {', '.join(found)}")
    return [found[name] for name in names or found]


def event_step(grid: PatchGrid) -> float | None:
    """The longest time step that HEAR's validator lets pass, or None: a time patch as it is.

    Example
    -------
    >>> event_step(PatchGrid(frames=208))
    0.04
    """
    for shifts in range(1, grid.patch_time + 1):
        step = grid.patch_time / shifts * HOP_LENGTH / SAMPLE_RATE
        if step <= EVENT_STEP and grid.patch_time % shifts == 0:  # a step is whole frames
            return step if shifts > 1 else None
    return None


def resample_task(task: Path, splits: list[str]) -> None:
    """Supply a task's copy at 16 kHz, where it has only others: HEAR's downloads are at 48 kHz.

    Arguments
    ---------
    task : Path
        `<task>/<rate>/<split>/*.wav`. `<task>/16000` is written, whole or not at all.
    splits : list of str

    Raises
    ------
    FileNotFoundError
        If it has no audio at all.
    """
    target = task / str(SAMPLE_RATE)
    if target.is_dir():
        return
    rates = sorted((int(path.name) for path in task.iterdir() if path.name.isdigit()), reverse=True)
    if not rates:
        raise FileNotFoundError(f"{task} has no folder of audio, such as {target.name}")
    source = task / str(rates[0])
    logger.warning("%s: resampling from %d Hz, once", task, rates[0])
    with whole_folder(target) as partial:
        for split in splits:
            (partial / split).mkdir()
            for file in sorted((source / split).iterdir()):
                wav, rate = read_whole(file)
                subtype = soundfile.info(file).subtype
                soundfile.write(
                    partial / split / file.name, resample(wav, rate), SAMPLE_RATE, subtype
                )


@contextlib.contextmanager
def heareval_runners() -> Iterator[tuple[Callable, Callable]]:
    """heareval's commands that embed and that predict, with what they lack of today's packages.

    It imports tensorflow, for models made with it. It sets the epoch of lightning's loop, which
    lightning keeps under another name since 1.6. And lightning's checkpoints hold settings of
    heareval's grid, which torch.load refuses unless it is told that they are harmless; nothing
    else is unpickled from them.

    Raises
    ------
    ImportError
        If heareval, or a package that it needs, is not installed.
    """
    is_tensorflow_loaded = "tensorflow" in sys.modules
    if not is_tensorflow_loaded:
        sys.modules["tensorflow"] = _no_tensorflow()
    try:
        embed = importlib.import_module("heareval.embeddings.runner").runner
        predict = importlib.import_module("heareval.predictions.runner").runner
        loop = importlib.import_module("pytorch_lightning.loops").FitLoop
    except ImportError as error:
        raise ImportError(
            f"HEAR's runners cannot be loaded ({error}): pip install '.[hear]' in a clone, then "
            "pip install --no-deps heareval (docs/hear.md)"
        ) from error
    finally:
        if not is_tensorflow_loaded:
            del sys.modules["tensorflow"]  # heareval keeps it; other packages look for the real one
    if not hasattr(loop, "current_epoch"):
        loop.current_epoch = property(_completed_epochs, _set_completed_epochs)
    is_deterministic = torch.are_deterministic_algorithms_enabled()  # lightning turns it on
    try:
        with torch.serialization.safe_globals(GRID_VALUES):
            yield (
                lambda *arguments: embed.main(list(arguments), standalone_mode=False),
                lambda *arguments: predict.main(list(arguments), standalone_mode=False),
            )
    finally:
        torch.use_deterministic_algorithms(is_deterministic)


def _no_tensorflow() -> types.ModuleType:
    """The two names of tensorflow that heareval looks at: no model of ours is a tf.Module."""
    module = types.ModuleType("tensorflow")
    module.Module = type("Module", (), {})  # type: ignore[attr-defined]
    module.test = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_gpu_available=lambda **_: torch.cuda.is_available()
    )
    return module


def _completed_epochs(loop) -> int:
    return loop.epoch_progress.current.completed


def _set_completed_epochs(loop, epoch: int) -> None:
    loop.epoch_progress.current.completed = epoch


def run(
    model,
    tasks_dir,
    embeddings_dir,
    tasks=(),
    options: dict | None = None,
    step_seconds: float | None = None,
    predict_options=(),
) -> tuple[list[HearScore], dict[str, Exception], Path]:
    """Embed and score tasks; an interrupted call is continued by the same call.

    Arguments
    ---------
    model : str, Path or None
        What `AudioJEPA` takes as source.
    tasks_dir, embeddings_dir : str or Path
    tasks : iterable of str
        Names of their folders. Default: all.
    options : dict or None
        For `AudioJEPA`.
    step_seconds : float or None
        Of event tasks. Default: `event_step`.
    predict_options : iterable of str
        For heareval's predictions.runner: "--grid", "fast".

    Returns
    -------
    scores : list of HearScore
    failed : dict of str: Exception
        What each task ended with that has no score: the others go on.
    results : Path
        results.csv.

    Raises
    ------
    FileNotFoundError, ValueError
        If model, tasks or options do not fit.
    FolderInUse
        If another process is running the same checkpoint to the same place.
    ImportError
        If heareval is not installed.
    """
    options = dict(sorted((options or {}).items()))  # heareval names a folder after them
    folders = find_tasks(tasks_dir, tasks)
    encoder = AudioJEPA(model, **options)
    own_step = encoder.step_seconds
    if step_seconds is None:
        step_seconds = options.get("step_seconds") or event_step(encoder.encoder.grid)
    elif count_shifts(encoder.encoder.grid, step_seconds) == 1:
        step_seconds = None
    # absolute: heareval's logs go beside them, not into the folder where this was started
    out = Path(embeddings_dir).absolute() / f"{checkpoint_name(model)}-{checkpoint_id(encoder)}"
    del encoder
    scores, failed = [], {}
    with (
        folder_lock(out, "wait for it, or name another --embeddings-dir"),
        heareval_runners() as (
            embed,
            predict,
        ),
    ):
        for task in folders:
            try:
                metadata = json.loads((task / METADATA).read_text(encoding="utf-8"))
                kind = metadata["embedding_type"]
                step = step_seconds if kind == "event" else None
                its = options if step is None else {**options, "step_seconds": step}
                place = out / ("own_step" if step is None else f"event_{step:g}")
                resample_task(task, metadata["splits"])
                embed(
                    *(MODULE, "--model", str(find_folder(model)), "--task", task.name),
                    *("--tasks-dir", str(task.parent), "--embeddings-dir", str(place)),
                    *("--model-options", json.dumps(its)),
                )
                (done,) = place.glob(f"{MODULE}*/{task.name}")
                predict(str(done), *predict_options)
                scores.append(_score(done, task.name, kind, own_step if step is None else step))
            except Exception as error:
                logger.exception("%s", task)
                failed[task.name] = error
        results = out / "results.csv"
        write_text(results, _csv(scores))
    return scores, failed, results


def _score(folder: Path, task: str, kind: str, step: float) -> HearScore:
    scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    if "aggregated_scores" in scores:
        test, valid = scores["aggregated_scores"]["test_score_mean"], float("nan")
    else:
        (one,) = (value for key, value in scores.items() if key == "test")
        test, valid = one["test_score"], one["validation_score"]
    return HearScore(task, kind, step, metadata["evaluation"][0], test, valid)


def _csv(scores: list[HearScore]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(HearScore))
    writer.writerows(astuple(score) for score in scores)
    return text.getvalue()
