"""The fine-tuning recipes on small data: a killed run, folds, and what tagging says afterwards."""

import csv
import json
import sys
from pathlib import Path

import pytest
import trees

from speechbrain_jepa import tag
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.finetuning.brain import FinetuningBrain
from speechbrain_jepa.vit import Encoder, PatchGrid

RECIPE = Path(__file__).parents[2] / "recipes" / "finetuning"
OPTIONS = "--num_workers 0 --noprogressbar --device cpu --precision fp32 --learning_rate 0.003"


@pytest.fixture
def train(monkeypatch):
    """The recipe's module, whatever other recipe's `train` was imported before."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("train", "prepare")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(RECIPE)
    import train

    yield train
    for name in [name for name in sys.modules if name.partition(".")[0] in ("train", "prepare")]:
        del sys.modules[name]


@pytest.fixture
def encoder(tmp_path):
    small = Encoder(PatchGrid(frames=64), dim=48, depth=1, num_heads=3)
    return save_pretrained(tmp_path / "encoder", small, Normalization(-7.0, 4.0))


def test_a_killed_cross_validation_goes_on_in_its_fold(train, encoder, tmp_path, monkeypatch):
    data = trees.esc50(tmp_path / "data").folder

    def run(name):
        return train.main(
            (
                f"{RECIPE}/hparams/esc50.yaml --output_folder {tmp_path / name} {OPTIONS} "
                f"--data_folder {data} --encoder_source {encoder} --allow_missing True "
                "--number_of_epochs 1 --warmup_epochs 0 --batch_size 8"
            ).split()
        )

    whole = run("whole")
    assert [result["fold"] for result in whole] == [1, 2, 3, 4, 5]
    seen, original = [], FinetuningBrain.on_fit_batch_start

    def count(self, *args):
        seen.append(self.epoch)
        if len(seen) == stop:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(FinetuningBrain, "on_fit_batch_start", count)
    steps = 29 // 8  # of a fold: 32 clips less a tenth, 8 at once
    stop = steps + 2  # in the second fold
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    seen.clear()
    stop = -1
    again = run("killed")
    assert len(seen) == 4 * steps  # that fold from its beginning, and three more

    def facts(results):
        return [{name: r[name] for name in ("test", "valid", "epoch", "fold")} for r in results]

    assert facts(again) == facts(whole)
    for fold in "12345":
        for file in ("predictions.csv", "classifier/model.safetensors"):
            first, second = (tmp_path / name / fold / file for name in ("whole", "killed"))
            assert first.read_bytes() == second.read_bytes(), (fold, file)
    seen.clear()
    assert facts(run("killed")) == facts(whole) and not seen  # all is done
    assert "over 5 folds" in train.summary(again)


def test_tagging_says_what_the_test_said(train, encoder, tmp_path):
    data = trees.custom(tmp_path / "data").folder
    (result,) = train.main(
        (
            f"{RECIPE}/hparams/custom.yaml --output_folder {tmp_path / 'run'} {OPTIONS} "
            f"--data_folder {data} --encoder_source {encoder} --batch_size 6 --number_of_epochs 8"
        ).split()
    )
    assert result["test"] == 1.0  # two pitches
    assert json.loads((tmp_path / "run/results.json").read_text())["test"] == 1.0
    with open(tmp_path / "run/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    files = [str(data / row["file"]) for row in rows]
    out = tmp_path / "tags.csv"
    tag.main([str(tmp_path / "run/classifier"), *files, "--out", str(out), "--device", "cpu"])
    with open(out, newline="") as file:
        tags = list(csv.DictReader(file))
    assert [row["file"] for row in tags] == files
    for row, tagged in zip(rows, tags):
        assert tagged["label"] == row["target"] == max(("low", "high"), key=lambda n: float(row[n]))
        assert float(tagged["score"]) == pytest.approx(float(row[tagged["label"]]), abs=2e-4)


def test_a_fold_that_is_not_there_is_an_error(train, encoder, tmp_path):
    data = trees.custom(tmp_path / "data", folds=True).folder
    with pytest.raises(ValueError, match="fold=9: this data set has 0, 1, 2, 3, 4"):
        train.main(
            (
                f"{RECIPE}/hparams/custom.yaml --output_folder {tmp_path / 'run'} {OPTIONS} "
                f"--data_folder {data} --encoder_source {encoder} --fold 9"
            ).split()
        )
