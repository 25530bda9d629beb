"""The paper's questions, asked again on a small scale: which choices change what is learnt?

    python recipes/pretraining/study.py --data_folder free_audio/audio --tasks_folder my_tasks

Small encoders (the quickstart's) trained for --steps steps, every choice with every seed:

- strategies: three masking strategies x two domains of target masking x plain and regularised
- durations: crops of 2.1, 3.2 and 6.4 s, and of several in one run
- ema: EMA rates at the start x plain, VarianceCovariance, SIGReg (docs/collapse.md)

One csv, a row a run, and a table for each question. Started again, it goes on.
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from speechbrain_jepa.evaluation.comparison import (
    PAPER_FEATURES,
    PAPER_READ_OUT,
    SPLITS,
    UNTRAINED,
    Comparison,
    Run,
    table_of,
)
from speechbrain_jepa.files import write_text

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "hparams" / "quickstart.yaml")
PAPER = (*PAPER_FEATURES, *PAPER_READ_OUT)
STRATEGIES = {
    "unstructured": (),
    "multi-block": (
        "--masking",
        "!new:speechbrain_jepa.masking.MultiBlockMasking {grid: !ref <grid>}",
    ),
    "time": ("--masking", "!new:speechbrain_jepa.masking.TimeMasking {grid: !ref <grid>}"),
}
REGULARIZERS = {
    "none": ("--regularizer", "null"),
    "VarianceCovariance": (),
    "SIGReg": (*("--regularizer", "!new:speechbrain_jepa.regularizers.SIGReg {weight: 0.1}"),),
}
# what is as in the quickstart is not said: runs of two questions are then one, trained once
DURATIONS = {
    "2.1 s": (),
    "3.2 s": ("--crop_frames", "320"),
    "6.4 s": ("--crop_frames", "640"),
    # one encoder on all of them: batches of the longest's tokens
    "1.1, 2.1 and 6.4 s": ("--crop_frames", "640", "--mixed_frames", "[112, 208, 640]"),
}
EMA_RATES = {
    "0": ("--ema_start", "0", "--ema_end", "0"),
    "0.9": ("--ema_start", "0.9"),
    "0.99": ("--ema_start", "0.99"),
    "0.999": (),
    "0.9999": ("--ema_start", "0.9999"),
}
TARGET_MASKING = {"audio": (), "latent": ("--target_masking", "latent")}


def strategies() -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    for regularizer in ("VarianceCovariance", "none"):
        for target_masking, target in TARGET_MASKING.items():
            for strategy, masking in STRATEGIES.items():
                keys = {
                    "masking": strategy,
                    "target masking": target_masking,
                    "regularizer": regularizer,
                }
                yield keys, (*masking, *target, *REGULARIZERS[regularizer])


def durations() -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    for duration, frames in DURATIONS.items():
        yield {"duration": duration}, frames


def ema() -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    for rate, start in EMA_RATES.items():
        for regularizer, arguments in REGULARIZERS.items():
            keys = {"EMA at the start": rate, "regularizer": regularizer}
            yield keys, (*start, *arguments)


QUESTIONS = {"strategies": strategies, "durations": durations, "ema": ema}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_folder", help="default: the demo corpus")
    parser.add_argument("--tasks_folder", required=True, help="of meta.csv files")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_folder", default="results/study")
    parser.add_argument("--overrides", nargs=argparse.REMAINDER, default=[], help="of every run")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comparison = Comparison(
        options.output_folder, options.data_folder, options.tasks_folder, ROOT / "train.py"
    )
    runs: list[Run] = []
    rows: dict[str, list] = {question: [] for question in options.questions}
    for seed in options.seeds:  # one seed everywhere before the second
        for question, found in rows.items():
            for keys, choices in QUESTIONS[question]():
                limit = ("--optimizer_step_limit", str(options.steps), *options.overrides)
                runs.append(Run(question, (QUICKSTART, *PAPER, *choices, *limit), seed, keys))
                found += comparison.run(runs[-1:])
    columns = [*SPLITS, *comparison.label_sets]
    shapes = comparison.shapes(runs)
    like = {UNTRAINED: shapes[0]} if shapes else {}
    text = table_of(comparison.baselines(like), ["recipe"], columns) + "\n"
    for question, found in rows.items():
        by = list(next(QUESTIONS[question]())[0])
        text += f"\n## {question}\n\n{table_of(found, by, ['rank', *columns])}\n"
    write_text(comparison.output_folder / "study.md", text)
    print(text)


if __name__ == "__main__":
    main()
