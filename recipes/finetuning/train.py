"""Fine-tune an encoder, with a classifier on it, on labelled clips.

    python train.py hparams/esc50.yaml --data_folder /data/ESC-50-master --encoder_source my_encoder
    python train.py hparams/speech_commands_m2d.yaml --data_folder /data/speech_commands
    python train.py hparams/custom.yaml --data_folder /my/audio --csv my_labels.csv
    torchrun --nproc_per_node=4 train.py hparams/audioset20k.yaml --data_folder ... --batch_size 12

Every line of the yaml is an option; SpeechBrain's run options (--device, --precision, --debug, ...)
work as everywhere. Started again with the same command, a run goes on where it was stopped.
"""

import contextlib
import importlib
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.utils.distributed import if_main_process, main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.data import SkippedFiles
from speechbrain_jepa.evaluation.labelled import LabelledClips, Rows, read_labelled
from speechbrain_jepa.files import folder_lock, full_disk_named, write_text
from speechbrain_jepa.finetuning.brain import FinetuningBrain, write_predictions
from speechbrain_jepa.finetuning.data import (
    ClipTargets,
    LabelledDataset,
    balanced_weights,
    make_loader,
)
from speechbrain_jepa.recipe import parse_arguments, resolve_recipe

logger = get_logger("finetuning")

# the data sets are those of the linear evaluation
sys.path.append(str(Path(__file__).resolve().parents[1] / "linear_evaluation"))
RESULTS = "results.json"


def prepare_clips(hparams) -> LabelledClips:
    """Find the data set's clips, their labels, and who trains and who tests."""
    manifest_folder = Path(hparams["output_folder"]) / "manifest"
    prepare = importlib.import_module(f"prepare.{hparams['task']}")
    run_on_main(
        prepare.prepare,
        [hparams["data_folder"], manifest_folder],
        {"allow_missing": hparams["allow_missing"], **hparams["prepare"]},
    )
    manifest = manifest_folder / "manifest.csv"
    return read_labelled(manifest, hparams["data_folder"], hparams["multilabel"])["label"]


def divisions(hparams, clips: LabelledClips) -> list[Rows]:
    """One division into training, validation and test, or one for each fold asked for."""
    rows = clips.divide(hparams["seed"])
    if hparams["fold"] is None:
        return rows
    found = [part for part in rows if part.fold == hparams["fold"]]
    if not found:
        known = ", ".join(str(part.fold) for part in rows)
        raise ValueError(f"fold={hparams['fold']}: this data set has {known}")
    return found


def make_loaders(hparams, clips: LabelledClips, rows: Rows) -> dict:
    """Loaders of the training, validation and test clips."""
    loaders = {}
    for name in ("train", "valid", "test"):
        train, part = name == "train", getattr(rows, name)
        targets = clips.targets[torch.from_numpy(part)]
        dataset = LabelledDataset(
            [clips.files[row] for row in part],
            ClipTargets(targets),
            hparams["clip_seconds"] if train else None,
            hparams["seed"],
            hparams["keep_in_memory"],
        )
        weights = balanced_weights(targets) if train and hparams["balanced_sampling"] else None
        loaders[name] = make_loader(
            dataset,
            hparams["batch_size"],
            hparams["seed"],
            shuffle=train,
            weights=weights,
            passes=hparams["passes_per_epoch"] if train else 1,
            num_workers=hparams["num_workers"],
        )
    return loaders


def finetune(hparams, recipe: str, run_opts, clips: LabelledClips, rows: Rows) -> dict:
    """One run, on one division of the clips; what has been done before is not done again."""
    output_folder = Path(hparams["output_folder"])
    done = read_results(output_folder, recipe)
    if done is not None:
        return done
    with full_disk_named(output_folder):
        sb.create_experiment_directory(output_folder)
    run_on_main(write_text, [output_folder / "hyperparams.yaml", recipe])

    loaders = make_loaders(hparams, clips, rows)
    hparams["skipped_files"] = SkippedFiles(output_folder / "skipped.csv")
    train_files = loaders["train"].dataset.files
    brain = FinetuningBrain.of_recipe(hparams, run_opts, clips.classes, train_files)
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    brain.evaluate(loaders["test"], max_key="score")
    results = {
        "task": hparams["task_name"],
        "score": brain.score_name,
        "test": brain.test_score,
        "valid": brain.best_score,
        "epoch": brain.best_epoch,
        "fold": rows.fold,
        "clips": {name: len(getattr(rows, name)) for name in ("train", "valid", "test")},
        "recipe": recipe,
    }
    write_predictions(
        output_folder / "predictions.csv", brain, [clips.ids[row] for row in rows.test]
    )
    finish(hparams, brain, results)
    return results


@main_process_only
def finish(hparams, brain, results: dict) -> None:
    """Write the classifier's folder, then the results."""
    output_folder = Path(hparams["output_folder"])
    if hparams["export"]:
        facts = {name: value for name, value in results.items() if name != "recipe"}
        folder = brain.classifier.save(output_folder / "classifier", {"fine_tuned": facts})
        logger.info(f"Classifier: {folder}")
    write_text(output_folder / RESULTS, json.dumps(results, indent=2))


def read_results(output_folder: Path, recipe: str) -> dict | None:
    """What a complete run of the same recipe left."""
    path = output_folder / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results.get("recipe") == recipe else None


def summary(results: list[dict]) -> str:
    """The score in per cent, of several folds with their mean and deviation."""
    scores = [100 * result["test"] for result in results]
    line = f"{results[0]['task']}: test {results[0]['score']} {np.mean(scores):.2f} %"
    if len(scores) > 1:
        listed = ", ".join(f"{score:.2f}" for score in scores)
        line += f" ± {statistics.stdev(scores):.2f} over {len(scores)} folds ({listed})"
    return line


def main(arguments: list[str]) -> list[dict]:
    """All folds of a data set, or the one division that it has."""
    hparams_file, run_opts, overrides, given = parse_arguments(arguments)
    overrides = YAML().load(overrides) or {}
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams = load_hyperpyyaml(resolve_recipe(hparams_file, overrides, given))
    output_folder = Path(hparams["output_folder"])
    results = []
    with contextlib.ExitStack() as stack:
        if if_main_process():
            fix = "wait for that run, end it, or name another --output_folder"
            stack.enter_context(folder_lock(output_folder, fix))
        clips = prepare_clips(hparams)
        for rows in divisions(hparams, clips):
            place = {} if rows.fold is None else {"output_folder": f"{output_folder}/{rows.fold}"}
            recipe = resolve_recipe(hparams_file, {**overrides, **place}, given)
            own = load_hyperpyyaml(recipe)  # every fold begins with the same weights
            own["checkpointer"].remove_leftovers()
            results.append(finetune(own, recipe, run_opts, clips, rows))
    return results


if __name__ == "__main__":
    print(f"\n{summary(main(sys.argv[1:]))}")
