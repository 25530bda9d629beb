"""The recipe from a folder of labelled audio to the table."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hyperpyyaml import load_hyperpyyaml

from speechbrain_jepa.evaluation.results import TASKS, collect
from speechbrain_jepa.recipe import resolve_recipe

CLIP_SECONDS = {  # EVAR's unit_sec
    "esc50": 5.0,
    "urbansound8k": 4.0,
    "speech_commands": 1.0,
    "voxceleb1": 8.2,
    "cremad": 2.5,
    "gtzan": 30.0,
    "nsynth": 4.0,
    "surge": 4.0,
}
RECIPE = Path(__file__).parents[2] / "recipes" / "linear_evaluation"
FAST = ["--seeds", "[0,1]", "--learning_rate", "0.01", "--probe_epochs", "30"]
FAST += ["--encoder_seed", "1", "--num_workers", "1", "--map_clips", "0", "--precision", "fp32"]


@pytest.fixture
def recipe(monkeypatch):
    """A module of the recipe by name, imported as when it is run."""
    monkeypatch.syspath_prepend(RECIPE)
    yield importlib.import_module
    for name in ("train", "run_all"):  # names that other folders have as well
        sys.modules.pop(name, None)


@pytest.fixture
def pitches(tmp_path):
    """Two pitches, folds 0 to 2, clips of about a second."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pitches"
    folder.mkdir()
    with open(folder / "meta.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "fold"])
        for number in range(36):
            label, time = ("low", "high")[number % 2], np.arange(15_000 + 100 * number) / 16_000
            tone = 0.2 * np.sin(2 * np.pi * (300 if label == "low" else 1500) * time)
            wav = tone + 0.01 * rng.standard_normal(len(time))
            soundfile.write(folder / f"{number}.wav", wav, 16_000)
            table.writerow([f"{number}.wav", label, number // 2 % 3])
    return folder


def test_yaml_of_every_task_says_what_its_module_says(recipe):
    for name in TASKS:
        module = recipe(f"prepare.{name}")
        given = {"data_folder": "x", "encoder": "logmel"}
        hparams = load_hyperpyyaml(resolve_recipe(RECIPE / "hparams" / f"{name}.yaml", given))
        assert hparams["task"] == hparams["task_name"] == name == module.TASK.name
        assert hparams["clip_seconds"] == CLIP_SECONDS[name]
        assert hparams["multilabel"] == module.TASK.multilabel
        protocol = hparams["protocol"]
        assert (protocol.probe, protocol.learning_rate, protocol.batch_size) == ("paper", 3e-5, 200)
        assert (protocol.epochs, protocol.patience) == (200, 20)
        # scores that are published do not depend on what the machine multiplies fast
        assert hparams["precision"] == protocol.precision == "fp32"
        assert hparams["normalization"] == "dataset" and hparams["layer"] == "last"


def test_run_all_goes_from_audio_to_the_table_and_goes_on_after_a_failure(
    recipe, pitches, tmp_path
):
    run_all = recipe("run_all")
    output = tmp_path / "results"
    arguments = ["--data", f"pitches={pitches}", "--output_folder", str(output), *FAST]
    arguments += ["--probe", "logistic"]
    failed = run_all.main([*arguments, "--encoders", "logmel", "no_such_encoder"])
    assert failed == 1
    (result,) = collect(output)
    assert (result.task, result.encoder, result.best.mean) == ("pitches", "logmel", 100.0)
    assert result.counts["clips"] == 36 and np.sum(result.confusion) == 2 * 36
    drawn = {path.name for path in output.rglob("*.png")}
    assert drawn == {"profiles.png", "confusion.png", "classes.png"}
    assert "| logmel | 100.0 ± 0.0 |" in (output / "results.md").read_text()


def test_what_is_done_is_not_done_again_and_another_probe_takes_the_embeddings(
    recipe, pitches, tmp_path, monkeypatch
):
    train = recipe("train")
    arguments = [str(RECIPE / "hparams" / "custom.yaml"), "--data_folder", str(pitches), *FAST]
    arguments += [
        "--output_folder",
        str(tmp_path / "out"),
        "--encoder",
        "logmel",
        "--figures",
        "False",
    ]
    arguments += ["--features_folder", str(tmp_path / "features")]
    first, folder = train.evaluate(*train.load_hparams(arguments))

    def must_not_run(*_):
        raise AssertionError("was called again")

    with monkeypatch.context() as patch:
        patch.setattr(train, "probe", must_not_run)
        assert train.evaluate(*train.load_hparams(arguments)) == (first, folder)
    other, place = train.evaluate(*train.load_hparams([*arguments, "--probe", "sweep"]))
    assert other.best.mean > 80 and place != folder
    assert len(list((tmp_path / "features").iterdir())) == 1
