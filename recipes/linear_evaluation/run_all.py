"""Linear evaluation of several encoders on several tasks, and the table at the end.

    python run_all.py --data esc50=/data/ESC-50-master gtzan=/data/gtzan \
        --encoders my_encoder logmel random --output_folder results/linear_evaluation
    python run_all.py --data birds=/my/birds music=/my/music --encoders my_encoder --layer all

A task is one of hparams/; any other name is a data set with a meta.csv (hparams/custom.yaml). What
is done is not done again; what fails is listed at the end, and the rest goes on. Further options
(--seeds [0,1,2], --probe sweep, ...) are overrides of every task's yaml.
"""

import argparse
import sys
import traceback
from pathlib import Path

from speechbrain_jepa.evaluation.figures import draw_profiles
from speechbrain_jepa.evaluation.results import PAPER_ROWS, REFERENCE, TASKS, write_tables
from train import evaluate, load_hparams

HPARAMS = Path(__file__).parent / "hparams"


def options_for(task: str, data_folder: str, encoder: str, output: Path) -> list[str]:
    """The yaml of a task and what it is told."""
    path = HPARAMS / f"{task}.yaml"
    named = [] if path.exists() else ["--task_name", task]
    return [
        *(str(path if path.exists() else HPARAMS / "custom.yaml"), *named),
        *("--data_folder", data_folder, "--encoder", encoder),
        *("--output_folder", str(output / task), "--features_folder", str(output / "features")),
    ]


def main(arguments: list[str]) -> int:
    """All pairs of task and encoder; gives the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=FOLDER")
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument("--output_folder", type=Path, default=Path("results/linear_evaluation"))
    options, overrides = parser.parse_known_args(arguments)
    wrong = [pair for pair in options.data if "=" not in pair]
    if wrong:
        parser.error(f"--data {wrong[0]}: give TASK=FOLDER; tasks are {', '.join(TASKS)} or a name")
    results, failures = [], []
    for task, folder in (pair.split("=", 1) for pair in options.data):
        for encoder in options.encoders:
            try:
                given = options_for(task, folder, encoder, options.output_folder)
                result, place = evaluate(*load_hparams([*given, *overrides]))
            except Exception as error:  # the other tasks and encoders go on
                traceback.print_exc()
                failures.append(f"{task}, {encoder}: {error}")
                continue
            results.append(result)
            print(f"{task}, {encoder}: {result.best.mean:.1f} ({place})", flush=True)
    if results:
        profiles: dict[str, dict[str, float]] = {}
        for result in results:
            task = TASKS.get(result.task, result.task)
            profiles.setdefault(result.encoder, {})[task] = result.best.mean
        comparable = {result.task for result in results if not result.own_split}
        known = [task for task in TASKS if task in comparable]
        if known:
            row = dict(zip(TASKS, PAPER_ROWS[REFERENCE]))
            profiles[f"{REFERENCE[1]} (paper)"] = {TASKS[task]: row[task] for task in known}
        draw_profiles(profiles, options.output_folder / "profiles.png")
        print(f"\n{write_tables(results, options.output_folder)}\n\n{options.output_folder}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return len(failures)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
