"""What a recipe teaches in so many minutes: pretrains, probes, and draws score over minutes.

    python benchmarks/time_to_score.py --data_folder my_audio --tasks_folder my_tasks \
        --minutes 2 5 15 60 --recipes quickstart plain

A recipe is a name below, or a yaml. Its steps a minute are measured first, its schedule is fitted
to each budget, and every run is a row of scores.csv, with the command that trains it again. Started
again, it goes on; a run that failed stays in the table. Recipes are chosen by the valid column.
One row by itself, trained and scored, wherever it was measured:

    python benchmarks/time_to_score.py --data_folder my_audio --tasks_folder my_tasks \
        --minutes 2 --recipes latent --seeds 1 --steps_a_minute 380
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from speechbrain_jepa.evaluation.comparison import (
    DONE,
    PAPER_FEATURES,
    PAPER_READ_OUT,
    SPLITS,
    UNTRAINED,
    Comparison,
    Run,
    clips_a_step,
    table_of,
)
from speechbrain_jepa.evaluation.logmel import LOG_MEL
from speechbrain_jepa.files import write_text

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "hparams" / "quickstart.yaml")
PLAIN = ("--regularizer", "null")
MANY_MASKS = ("--target_masking", "latent", "--masks_per_clip", "4", "--batch_size", "8")
RECIPES = {
    "quickstart": (QUICKSTART,),
    "plain": (QUICKSTART, *PLAIN),
    "last_layer": (QUICKSTART, *PAPER_READ_OUT),
    "windows_of_25_ms": (QUICKSTART, *PAPER_FEATURES),
    "windows_of_128_ms": (QUICKSTART, "--n_fft", "2048"),
    # features and read-out of the paper, with the regulariser and without
    "paper_regularized": (QUICKSTART, *PAPER_FEATURES, *PAPER_READ_OUT),
    "paper": (QUICKSTART, *PLAIN, *PAPER_FEATURES, *PAPER_READ_OUT),
    "light_weight": (QUICKSTART, "--regularizer_weight", "0.05"),
    "heavy_weight": (QUICKSTART, "--regularizer_weight", "0.8"),
    "light_sigreg": (
        *(QUICKSTART, "--regularizer"),
        "!new:speechbrain_jepa.regularizers.SIGReg {weight: 0.02}",
    ),
    "latent": (QUICKSTART, "--target_masking", "latent"),
    "all_target_layers": (QUICKSTART, "--target_layers", "all"),
    "many_masks": (QUICKSTART, *MANY_MASKS),
    "inverse_blocks": (
        *(QUICKSTART, *MANY_MASKS, "--target_share", "0.8", "--masking"),
        "!new:speechbrain_jepa.inverse_blocks.InverseBlockMasking "
        "{grid: !ref <grid>, target_share: !ref <target_share>, block: [2, 3]}",
    ),
    "cross_attention": (QUICKSTART, "--predictor_cross_attention", "True"),
    "half_predicted": (QUICKSTART, "--predicted_share", "0.5"),
    "mixed_durations": (QUICKSTART, "--mixed_frames", "[96, 208]"),
    "muon": (QUICKSTART, "--muon", "True"),
    "augmented": (QUICKSTART, "--mix_background", "0.3", "--random_gain_db", "6"),
    "eight_layers": (QUICKSTART, "--encoder_depth", "8"),
    "twice_as_wide": (QUICKSTART, "--encoder_dim", "384", "--encoder_heads", "6"),
    "narrow_patches": (QUICKSTART, "--patch_time", "8"),
    "eight_bands": (QUICKSTART, "--patch_frequency", "16"),
    "five_bands": (QUICKSTART, "--n_mels", "80", "--patch_frequency", "16"),
    "double_rate": (QUICKSTART, "--base_learning_rate", "0.016"),
    # the learning rate follows the batch
    "half_batch": (QUICKSTART, "--batch_size", "16"),
    "double_batch": (QUICKSTART, "--batch_size", "64"),
}
CALIBRATION_STEPS = 60  # enough for three log intervals, of which the first is not used


def arguments_of(recipe: str) -> tuple[str, ...]:
    """What train.py is told for a recipe of `RECIPES` or a yaml."""
    if recipe in RECIPES:
        return RECIPES[recipe]
    if Path(recipe).is_file():
        return (recipe,)
    sys.exit(f"--recipes {recipe}: neither a yaml nor one of {', '.join(RECIPES)}")


def steps_a_minute(comparison: Comparison, recipe: str) -> float:
    """Measured once and kept, so that a table that is gone on with keeps its steps."""
    path = comparison.output_folder / "steps_a_minute.json"
    rates = json.loads(path.read_text()) if path.exists() else {}
    if recipe not in rates:
        limits = (
            f"--optimizer_step_limit {CALIBRATION_STEPS} --log_interval {CALIBRATION_STEPS // 3}"
        )
        run = Run("calibration", (*arguments_of(recipe), *limits.split()), 0, {"of": recipe})
        folder = comparison.train_only(run)
        metrics = pd.read_csv(folder / "metrics.csv")["train_clips_per_second"].dropna()
        rates[recipe] = float(60 * metrics.iloc[1:].median() / clips_a_step(folder))
        write_text(path, json.dumps(rates, indent=2))
    return rates[recipe]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Mean and deviation of the test average over minutes; log-mel and untrained as lines."""
    table = pd.DataFrame([row for row in rows if row["status"] == DONE])
    table["test"] = table["test"].astype(float)
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = [name for name in table["recipe"].unique() if name.startswith((LOG_MEL, UNTRAINED))]
    for name, style in zip(lines, (":", "--", "-.")):  # of untrained shapes the first two
        level = table.loc[table["recipe"] == name, "test"].mean()
        axes.axhline(level, color="grey", linestyle=style, label=f"{name} {level:.1f}")
    runs = table[table["minutes"].fillna("") != ""]
    for name, of_recipe in runs.groupby("recipe", sort=False):
        seeds = of_recipe.groupby(of_recipe["minutes"].astype(float))["test"]
        mean, deviation = seeds.mean(), seeds.std().fillna(0.0)
        axes.errorbar(mean.index, mean, yerr=deviation, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    budgets = sorted(runs["minutes"].astype(float).unique())
    axes.set_xticks(budgets, [f"{minutes:g}" for minutes in budgets])
    axes.minorticks_off()
    axes.set_xlabel("minutes of pretraining")
    axes.set_ylabel("test accuracy, mean over the tasks, %")
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_folder", help="default: the demo corpus")
    parser.add_argument("--tasks_folder", required=True, help="of meta.csv files")
    parser.add_argument("--minutes", nargs="+", type=float, default=[2, 5, 15, 60])
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["quickstart", "plain"],
        help=f"yamls, or {', '.join(RECIPES)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--steps_a_minute", type=float, help="of every recipe, in place of measuring it"
    )
    parser.add_argument("--output_folder", default="results/time_to_score")
    parser.add_argument("--overrides", nargs=argparse.REMAINDER, default=[], help="of every recipe")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for recipe in options.recipes:
        arguments_of(recipe)
    comparison = Comparison(
        options.output_folder, options.data_folder, options.tasks_folder, ROOT / "train.py"
    )
    runs, rows = [], []
    # one seed everywhere before the second, short budgets before long ones
    for seed in options.seeds:
        for minutes in sorted(options.minutes):
            for recipe in options.recipes:
                rate = options.steps_a_minute or steps_a_minute(comparison, recipe)
                steps = max(1, round(minutes * rate))
                limit = ("--optimizer_step_limit", str(steps), *options.overrides)
                keys = {"minutes": f"{minutes:g}"}
                runs.append(Run(Path(recipe).stem, (*arguments_of(recipe), *limit), seed, keys))
                rows += comparison.run(runs[-1:])
    if any(row["status"] == DONE for row in rows):
        like = {f"{UNTRAINED}, as {run.recipe}": run for run in comparison.shapes(runs)}
        rows = comparison.baselines(like) + rows
        draw(rows, comparison.output_folder / "score_over_minutes.png")
    columns = [*SPLITS, *comparison.label_sets]
    table = table_of(rows, ["recipe", "minutes"], columns)
    write_text(comparison.output_folder / "scores.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
