"""Runs are trained, scored and kept; a failure is a row; a row can be had again by its command."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hyperpyyaml import load_hyperpyyaml
from scripts import load_script

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation.comparison import (
    Comparison,
    Run,
    table_of,
    training_of,
    untrained_like,
)
from speechbrain_jepa.evaluation.online_probe import embed_with
from speechbrain_jepa.recipe import resolve_recipe

ROOT = Path(__file__).parents[2]
SMALL = (
    *(str(ROOT / "hparams" / "quickstart.yaml"), "--encoder_dim", "24", "--encoder_depth", "1"),
    *("--predictor_dim", "24", "--predictor_depth", "1", "--batch_size", "4", "--norm_crops", "8"),
    *("--num_workers", "0", "--log_interval", "1", "--optimizer_step_limit", "2"),
)
READ_OUT = ("--embedding_layers", "last", "--embedding_pooling", "mean")


def test_a_run_is_a_row_once_and_a_failure_is_tried_again(
    noise_tasks, tmp_path, audio_folder, capfd, monkeypatch
):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(tmp_path / "out", audio_folder, noise_tasks, ROOT / "train.py")
    runs = [
        Run("small", SMALL, 3, {"minutes": "0.1"}),
        Run("broken", (*SMALL, "--loss", "!new:speechbrain_jepa.losses.NoSuchLoss"), 3),
    ]
    good, bad = comparison.run(runs)
    assert good["status"] == "done" and good["steps"] == "2" and good["minutes"] == "0.1"
    assert float(good["test"]) == 100.0  # noises that any encoder tells apart
    assert float(good["valid"]) == 0.0  # of which valid is labelled the other way round
    assert bad["status"].startswith("failed: ") and "NoSuchLoss" in bad["status"]
    with open(comparison.csv, newline="") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == ["small", "broken"]
    started = []
    monkeypatch.setattr(comparison, "train_only", lambda run: started.append(run.recipe) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        comparison.run(runs)
    assert started == ["broken"]
    # the same training for another question is not trained again
    (same,) = comparison.run([Run("other", SMALL, 3, {"duration": "2.1 s"})])
    assert started == ["broken"] and same["command"] == good["command"]
    assert same["recipe"] == "other" and "minutes" not in same and same["test"] == good["test"]
    with pytest.raises(ZeroDivisionError):
        comparison.run([Run("other", SMALL, 4, {"duration": "2.1 s"})])
    # nor is one whose embedding is taken from elsewhere: it is scored anew
    narrow = (*SMALL, *READ_OUT)
    scored = []
    monkeypatch.setattr(comparison, "score", lambda embed: scored.append(embed(noise).shape) or {})
    noise = [np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)]
    (read,) = comparison.run([Run("narrow", narrow, 3)])
    assert started == ["broken", "other"]
    assert read["recipe"] == "narrow" and "--embedding_layers last" in read["command"]
    assert scored == [(1, 24 * 4)]  # a mean for each of four rows of patches
    assert read["folder"] == good["folder"]
    # the row can be had again by its command
    command = shlex.split(good["command"])
    assert command[:3] == ["python", "train.py", "hparams/quickstart.yaml"]
    again = tmp_path / "again"
    command[command.index("--output_folder") + 1] = str(again)
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    pair = [tmp_path / "out" / good["folder"], again]
    first, second = ((folder / "pretrained/model.safetensors").read_bytes() for folder in pair)
    assert first == second


@pytest.mark.parametrize("mixed, clips", [("null", 32), ("[112, 208, 640]", (182 + 98 + 32) / 3)])
def test_minutes_of_training_are_those_of_the_rows_of_training(tmp_path, mixed, clips):
    (tmp_path / "metrics.csv").write_text(
        "step,train_clips_per_second,valid_embedding_rank\n"
        "0,,20\n10,32,\n30,16,\n30,,25.4\n"  # 10 steps of 32 at 32 a second, 20 at 16
    )
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text(
        f'{{"training": {{"global_batch": 32, "mixed_frames": {mixed}}}}}'
    )
    trained = training_of(tmp_path)
    assert trained["steps"] == "30" and trained["rank"] == "25"
    assert float(trained["minutes_trained"]) == pytest.approx((10 + 40) / 60 * clips / 32, abs=0.01)


def test_label_sets_without_valid_rows_stop_before_training(noise_tasks, tmp_path):
    text = (noise_tasks / "meta.csv").read_text().replace(",valid,", ",train,")
    for file in noise_tasks.glob("*.wav"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(ValueError, match="has no valid rows"):
        Comparison(tmp_path / "out", None, tmp_path, ROOT / "train.py")


def test_untrained_encoders_have_the_shape_and_other_weights():
    trained = AudioJEPA()
    fresh, same, other = (untrained_like(AudioJEPA(), seed) for seed in (0, 0, 1))
    wav = [np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)]
    embeddings = [embed_with(encoder)(wav) for encoder in (trained, fresh, same, other)]
    assert len({x.shape for x in embeddings}) == 1
    np.testing.assert_array_equal(embeddings[1], embeddings[2])
    assert not np.allclose(embeddings[1], embeddings[3])
    assert not np.allclose(embeddings[0], embeddings[1])


def test_a_table_averages_over_seeds_and_names_what_failed():
    rows = [
        {"recipe": "a", "status": "done", "test": "60"},
        {"recipe": "b", "status": "failed: out of memory"},
        {"recipe": "a", "status": "done", "test": "64"},
        {"recipe": "a", "status": "failed: killed"},
    ]
    assert table_of(rows, ["recipe"], ["test"]).splitlines()[2:] == [
        "| a | 2 | 62.0 ± 2.8 |",
        "| b | 0 | failed: out of memory |",
    ]


def test_time_to_score_fits_steps_to_the_budget_and_draws(
    noise_tasks, tmp_path, audio_folder, capsys, monkeypatch
):
    script = load_script(ROOT / "benchmarks" / "time_to_score.py")
    monkeypatch.setitem(script.RECIPES, "small", SMALL[:-2])
    monkeypatch.setattr(script, "CALIBRATION_STEPS", 3)
    (tmp_path / "steps_a_minute.json").write_text('{"small": 30}')
    arguments = f"--data_folder {audio_folder} --tasks_folder {noise_tasks} --minutes 0.1 --seeds 0"
    script.main([*arguments.split(), "--recipes", "small", "--output_folder", str(tmp_path)])
    table = capsys.readouterr().out
    assert "| small | 0.1 | 1 | 0.0 | 100.0 | 100.0 |" in table
    assert "| log-mel statistics |  | 1 | 0.0 | 100.0 | 100.0 |" in table
    rows = Comparison(tmp_path, audio_folder, noise_tasks, ROOT / "train.py").rows
    assert [row["steps"] for row in rows if row["recipe"] == "small"] == ["3"]
    assert (tmp_path / "score_over_minutes.png").stat().st_size > 10_000
    assert "| untrained, as small |  | 3 | 0.0 ± 0.0 | 100.0 ± 0.0 |" in table
    # a rate that is given is not measured; each shape and read-out has its untrained encoders
    monkeypatch.setitem(script.RECIPES, "mean", (*SMALL[:-2], *READ_OUT))
    options = ["--recipes", "small", "mean", "--output_folder", str(tmp_path)]
    script.main([*arguments.split(), *options, "--steps_a_minute", "30"])
    table = capsys.readouterr().out
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == [
        "| log-mel statistics",
        "| untrained, as small",
        "| untrained, as mean",
        "| small",
        "| mean",
    ]
    assert json.loads((tmp_path / "steps_a_minute.json").read_text()) == {"small": 30}


def test_an_untrained_encoder_is_that_of_the_run_it_is_called_after(
    noise_tasks, tmp_path, audio_folder, monkeypatch
):
    comparison = Comparison(tmp_path / "out", audio_folder, noise_tasks, ROOT / "train.py")
    runs = [Run("small", SMALL), Run("same", SMALL, 1), Run("mean", (*SMALL, *READ_OUT))]
    comparison.run(runs)
    assert comparison.shapes(runs) == [runs[0], runs[2]]
    scored = []
    monkeypatch.setattr(comparison, "score", lambda embed: scored.append(embed(noise)) or {})
    noise = [np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)]
    comparison.baselines({"all": runs[0], "mean only": runs[2]}, seeds=[5])
    fresh = AudioJEPA(tmp_path / "out" / runs[0].folder / "pretrained")
    np.testing.assert_array_equal(scored[1], embed_with(untrained_like(fresh, 5))(noise))
    assert scored[1].shape == (1, 2 * 2 * 24 * 4) and scored[2].shape == (1, 24 * 4)


SMALL_LINES = dict(zip((flag[2:] for flag in SMALL[1::2]), SMALL[2::2]))


def hparams_of(yaml, *flags):
    lines = SMALL_LINES | {flag[2:]: value for flag, value in zip(flags[::2], flags[1::2])}
    overrides = "\n".join(f"{name}: {value}" for name, value in lines.items())
    return load_hyperpyyaml(resolve_recipe(yaml, overrides, {}))


def test_every_named_recipe_differs_from_the_others_in_what_it_builds():
    script = load_script(ROOT / "benchmarks" / "time_to_score.py")
    told = {}
    for name, arguments in script.RECIPES.items():
        hparams = hparams_of(*arguments)
        plain = {
            key: value for key, value in hparams.items() if isinstance(value, str | int | float)
        }
        told[name] = str(plain) + str(hparams["jepa"]) + str(hparams["mixed_frames"])
    assert len(set(told.values())) == len(told) > 10


def test_every_cell_of_the_study_is_a_recipe_that_the_yaml_takes():
    script = load_script(ROOT / "recipes" / "pretraining" / "study.py")
    counts = {}
    for question, cells in script.QUESTIONS.items():
        seen = set()
        for keys, choices in cells():
            hparams = hparams_of(script.QUICKSTART, *choices)
            jepa = hparams["jepa"]
            masking = type(hparams["masking"]).__name__
            regularizer = type(jepa.regularizer).__name__
            ema = (hparams["ema_schedule"].start, hparams["ema_schedule"].end)
            frames = (hparams["grid"].frames, str(hparams["mixed_frames"]))
            seen.add((masking, jepa.target_masking, regularizer, frames, ema))
            if keys.get("masking") == "multi-block":
                assert masking == "MultiBlockMasking"
        counts[question] = len(seen)
    assert counts == {"strategies": 12, "durations": 4, "ema": 15}
