"""Detect events in time: an encoder with a classifier of its time steps.

    python train.py hparams/events.yaml --data_folder /my/audio --csv my_events.csv
    python train.py hparams/events.yaml --data_folder /my/audio --step_seconds 0.02 \
        --pooling attention

Every line of the yaml is an option; SpeechBrain's run options (--device, --precision, --debug, ...)
work as everywhere. Started again with the same command, a run goes on where it was stopped.
"""

import contextlib
import json
import sys
from pathlib import Path

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import if_main_process, main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.data import SkippedFiles
from speechbrain_jepa.data.skipped import csv_line
from speechbrain_jepa.events import SPLITS, EventTable, EventTargets, read_events
from speechbrain_jepa.files import folder_lock, full_disk_named, whole_file, write_text
from speechbrain_jepa.finetuning.data import LabelledDataset, make_loader
from speechbrain_jepa.finetuning.events import EventBrain
from speechbrain_jepa.recipe import parse_arguments, resolve_recipe

logger = get_logger("event_detection")

RESULTS = "results.json"
DETECTED = "detected.csv"


def make_loaders(hparams, table: EventTable) -> dict:
    """Loaders of the training, validation and test clips, with targets for each time step."""
    loaders = {}
    for name in SPLITS:
        rows, train = table.rows(name), name == "train"
        dataset = LabelledDataset(
            [table.files[row] for row in rows],
            EventTargets(
                [table.events[row] for row in rows],
                table.labels,
                hparams["encoder"].downsample_rate,
            ),
            hparams["clip_seconds"] if train else None,
            hparams["seed"],
            hparams["keep_in_memory"],
        )
        loaders[name] = make_loader(
            dataset,
            hparams["batch_size"],
            hparams["seed"],
            shuffle=train,
            passes=hparams["passes_per_epoch"] if train else 1,
            num_workers=hparams["num_workers"],
        )
    return loaders


def detect(hparams, recipe: str, run_opts) -> dict:
    """The whole run; what has been done before is not done again."""
    output_folder = Path(hparams["output_folder"])
    table = read_events(hparams["csv"], hparams["data_folder"])
    with full_disk_named(output_folder):
        sb.create_experiment_directory(output_folder)
    run_on_main(write_text, [output_folder / "hyperparams.yaml", recipe])

    loaders = make_loaders(hparams, table)
    hparams["skipped_files"] = SkippedFiles(output_folder / "skipped.csv")
    hparams["events"] = {
        name: [table.events[row] for row in table.rows(name)] for name in ("valid", "test")
    }
    train_files = loaders["train"].dataset.files
    brain = EventBrain.of_recipe(hparams, run_opts, table.labels, train_files)
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    brain.on_evaluate_start(max_key="score")
    brain.tune(loaders["valid"])
    brain.evaluate(loaders["test"], max_key="score")
    results = {
        "task": hparams["task_name"],
        "test": brain.test_scores,
        "valid": {"best_event_f1": brain.best_score},
        "epoch": brain.best_epoch,
        "step_seconds": brain.classifier.encoder.step_seconds,
        "thresholds": dict(zip(table.labels, brain.classifier.decoding.thresholds)),
        "clips": {name: len(table.rows(name)) for name in SPLITS},
    }
    finish(hparams, brain, results, [table.names[row] for row in table.rows("test")])
    return results


@main_process_only
def finish(hparams, brain, results: dict, names: list[str]) -> None:
    """Write the test clips' events, the classifier's folder, then the results."""
    output_folder = Path(hparams["output_folder"])
    found = brain.detected(brain.classifier.decoding.thresholds)
    with (
        whole_file(output_folder / DETECTED) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        file.write(csv_line("file", "onset", "offset", "label"))
        for (row, _, _), events in zip(brain.collected, found):
            file.writelines(
                csv_line(names[row], f"{onset:.3f}", f"{offset:.3f}", label)
                for onset, offset, label in events
            )
    if hparams["export"]:
        folder = brain.classifier.save(output_folder / "classifier", {"fine_tuned": results})
        logger.info(f"Classifier: {folder}")
    write_text(output_folder / RESULTS, json.dumps(results, indent=2))


def main(arguments: list[str]) -> dict:
    """One run, in an output folder that nobody else works in."""
    hparams_file, run_opts, overrides, given = parse_arguments(arguments)
    recipe = resolve_recipe(hparams_file, overrides, given)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams = load_hyperpyyaml(recipe)
    with contextlib.ExitStack() as stack:
        if if_main_process():
            fix = "wait for that run, end it, or name another --output_folder"
            stack.enter_context(folder_lock(hparams["output_folder"], fix))
            hparams["checkpointer"].remove_leftovers()
        return detect(hparams, recipe, run_opts)


if __name__ == "__main__":
    scores = main(sys.argv[1:])["test"]
    print(
        f"\nevent-based F1 {100 * scores['event_f1']:.2f} %, PSDS 1 {scores['psds1']:.3f}, "
        f"PSDS 2 {scores['psds2']:.3f}"
    )
