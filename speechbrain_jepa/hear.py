"""The HEAR 2021 API: `heareval` and its kin load this module by name.

    hear-validator speechbrain_jepa.hear --model <pretrained folder>

HEAR's path of a model is whatever `AudioJEPA` takes as source: a pretrained folder, an experiment
folder or a Hugging Face repo id. As a command it embeds and scores tasks with heareval's runners:

    python -m speechbrain_jepa.hear run --model <pretrained folder> --tasks-dir <tasks>
"""

import argparse
import logging

from torch import Tensor

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.files import FolderInUse
from speechbrain_jepa.hear_runner import run
from speechbrain_jepa.suites import parse_options


class HearModel(AudioJEPA):
    """An `AudioJEPA` with the attributes that HEAR asks of a model; `sample_rate` it has."""

    @property
    def scene_embedding_size(self) -> int:
        return self.embedding_dim

    @property
    def timestamp_embedding_size(self) -> int:
        return self.get_output_dim()


def load_model(model_file_path: str = "", **options) -> HearModel:
    """Load an encoder.

    Arguments
    ---------
    model_file_path : str
        A pretrained folder, an experiment folder or a Hugging Face repo id. Default: the encoder
        that comes with the package.
    **options
        For `AudioJEPA`: layers, pooling, step_seconds, flat, normalization, ...

    Returns
    -------
    HearModel

    Raises
    ------
    FileNotFoundError
        If there is no such folder or repo.
    ValueError
        If an option does not fit.

    Example
    -------
    >>> import torch
    >>> from speechbrain_jepa.checkpoints import save_pretrained
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> model = load_model(
    ...     save_pretrained(getfixture("tmp_path") / "tiny", encoder, Normalization(-7.06, 4.19))
    ... )
    >>> audio = torch.randn(3, 2 * model.sample_rate).clamp(-1, 1)
    >>> get_scene_embeddings(audio, model).shape
    torch.Size([3, 240])
    >>> embeddings, timestamps = get_timestamp_embeddings(audio, model)
    >>> embeddings.shape, timestamps[0, :3]
    (torch.Size([3, 13, 240]), tensor([ 75., 235., 395.]))
    """
    if options.get("output_all_hiddens"):
        raise ValueError("output_all_hiddens=True: HEAR takes the embeddings of one layer only")
    return HearModel(model_file_path if str(model_file_path) else None, **options)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One embedding a sound, read out as the model's folder or its options say.

    Arguments
    ---------
    audio : Tensor [n_sounds, n_samples]
        Mono, from -1 to 1, at `model.sample_rate`, on the model's device.
    model : HearModel

    Returns
    -------
    Tensor [n_sounds, scene_embedding_size], float32
    """
    return model.embed(audio)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """One embedding a time step.

    Arguments
    ---------
    audio, model
        As in `get_scene_embeddings`.

    Returns
    -------
    embeddings : Tensor [n_sounds, n_timestamps, timestamp_embedding_size], float32
    timestamps : Tensor [n_sounds, n_timestamps], float32
        The centres of the time patches, in milliseconds.
    """
    embeddings = model(audio).float()
    # the centres are whole milliseconds: rounding removes the float32 error of the seconds
    milliseconds = (model.timestamps(embeddings.shape[1]) * 1000).round()
    return embeddings, milliseconds.to(embeddings.device).expand(len(embeddings), -1)


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.hear", description="HEAR's tasks with heareval's runners."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser(
        "run",
        help="embed and score tasks",
        description="Embed and score HEAR's tasks; started again, it goes on where it was.",
    )
    add = running.add_argument
    add(
        "--model",
        help="pretrained folder, experiment folder, Hugging Face repo id, or name of an encoder "
        "that comes with the package (default: tiny)",
    )
    add("--tasks-dir", default="tasks", help="folder of HEAR's tasks (default: tasks)")
    add("--task", action="append", default=[], help="one of them (default: all); repeatable")
    add("--embeddings-dir", default="embeddings", help="results go here (default: embeddings)")
    add("--step", type=float, help="seconds of a time step in event tasks (default: at most 0.05)")
    add("--model-options", help="of AudioJEPA, a JSON object such as '{\"flat\": true}'")
    add("--grid", default="default", choices=("default", "fast", "faster"), help="heareval's")
    add("--grid-points", type=int, default=8, help="points of the grid to try (default: 8)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        scores, failed, results = run(
            options.model,
            options.tasks_dir,
            options.embeddings_dir,
            options.task,
            parse_options(options.model_options),
            options.step,
            ("--grid", options.grid, "--grid-points", str(options.grid_points)),
        )
    except (OSError, ValueError, ImportError, FolderInUse) as error:
        raise SystemExit(f"hear: {error}") from error
    print(f"\n{results}:\n{results.read_text(encoding='utf-8')}")
    if failed:
        reasons = "".join(f"\n{task}: {error!r}" for task, error in failed.items())
        count = f"{len(failed)} of {len(scores) + len(failed)} tasks"
        raise SystemExit(f"hear: no score for {count}{reasons}")


if __name__ == "__main__":
    main()
