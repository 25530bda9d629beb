"""The page at the end of a pretraining run: all of it, as text, and never in the run's way."""

import json
import logging
import os
import re

import numpy as np
import pytest
from pages_seen import errors

from speechbrain_jepa import report
from speechbrain_jepa.description import COMMAND_FILE, command_line
from speechbrain_jepa.evaluation.pictures import draw_masks

HEADER = (
    "step,epoch,train_loss,train_learning_rate,train_ema_rate,train_clips_per_second,valid_loss,"
    "valid_embedding_rank,valid_embedding_deviation,valid_target_deviation,valid_<b>_accuracy"
)
ROWS = (
    "0,0,,,,,0.5,90,0.4,0.5,20.5",
    "10,1,0.4,0.001,0.99,50,,,,,",
    "10,1,,,,,0.3,40,0.3,0.4,31.5",
    "20,2,0.3,0.001,0.99,70,,,,,",
    "20,2,,,,,0.2,45.4,0.3,0.4,30",
)
NAME = "<img src=x onerror='window.hacked = 1'>"


@pytest.fixture
def run(tmp_path):
    """What a run leaves, in a folder with a hostile name."""
    output = tmp_path / NAME
    (output / "pretrained").mkdir(parents=True)
    (output / "metrics.csv").write_text("\n".join((HEADER, *ROWS)) + "\n")
    config = {
        "format_version": 1,
        "training": {"global_batch": 8, "loss": {"beta": 1.0, "class": "<i>"}},
    }
    (output / "pretrained" / "config.json").write_text(json.dumps(config))
    (output / "hyperparams.yaml").write_text("seed: 1 # <script>window.hacked = 1</script>\n")
    (output / COMMAND_FILE).write_text("python train.py x.yaml --data_folder '<my> audio'\n")
    table = "features,seed,pitch,music\nlog-mel statistics,0,50,60\nuntrained,0,40,50\n"
    (output / "probe.csv").write_text(table + "untrained,1,44,52\ntrained,0,70,80\n")
    spectrogram = np.random.default_rng(0).normal(size=(80, 208))
    draw_masks(
        spectrogram, {"unstructured": (range(26), range(26, 65))}, (16, 16), output / "masks.png"
    )
    return output


def plain(page):
    """The text of a page as people read it."""
    body = page.read_text(encoding="utf-8").partition("<main>")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_has_all_of_the_run(run):
    page = report.write_report(run)
    assert page == run / "report.html"
    text = plain(page)
    for part in (
        "20 optimiser steps",
        "160 clips seen",
        "60.0 clips a second",
        "0.500 → 0.200 validation loss",
        "90 → 45 effective rank",
        "75.0 / 46.5 probe, trained / untrained, %",
        "untrained (2) 42.0 ± 2.8 51.0 ± 1.4 46.5 ± 2.1",
        "trained 70.0 80.0 75.0",
        "log-mel statistics 50.0 60.0 55.0",
        "trained over untrained: +28.5 points",
        "20.5 31.5 10 30.0",  # online probe: start, best, its step, end
        "loss.beta 1.0",
        "python train.py x.yaml --data_folder &#x27;&lt;my&gt; audio&#x27;",
        "the whole recipe seed: 1",
    ):
        assert part in text, part
    assert page.read_text().count('src="data:image/png;base64,') == 2
    assert "Collapse?" not in text


def test_the_page_opens_in_a_browser_and_runs_no_name(run, browser):
    page = report.write_report(run)
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert errors(browser) == []
    assert browser.find_element("css selector", "h1").text == NAME
    assert browser.execute_script(
        "return window.hacked === undefined && [...document.images].length === 2 && "
        "[...document.images].every((image) => image.complete && image.naturalWidth > 100)"
    )
    assert browser.execute_script("return performance.getEntriesByType('resource').length") <= 2


def test_a_collapse_is_said(run):
    with open(run / "metrics.csv", "a") as file:
        file.write("30,3,,,,,0.1,3,0.3,0.4,20\n")
    assert "Collapse? At the end embedding_rank fell from 90 to 3." in plain(
        report.write_report(run)
    )


def test_a_run_in_the_middle_has_a_page(run, capsys):
    for name in ("probe.csv", "masks.png", "hyperparams.yaml", COMMAND_FILE):
        (run / name).unlink()
    (run / "pretrained" / "config.json").unlink()
    report.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = plain(run / "report.html")
    assert "No labelled set was given" in text and "Masks" not in text


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(
        SystemExit, match=r"report: .*metrics.csv: not there, so .* is no pretraining run"
    ):
        report.main([str(tmp_path)])


def test_a_report_that_fails_is_a_warning(run, caplog, monkeypatch):
    hparams = {"output_folder": str(run), "online_probe_csv": None}
    assert report.report_run(hparams, run / "pretrained") == run / "report.html"

    def fail(*args):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(report, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        assert report.report_run(hparams, run / "pretrained") is None
    assert "No report: RuntimeError: no picture today. The run itself is complete" in caplog.text


def test_masks_that_cannot_be_drawn_are_left_out(run, caplog, monkeypatch):
    def fail(*args):
        raise ValueError("these blocks do not fit the grid")

    (run / "masks.png").unlink()
    monkeypatch.setattr(report, "draw_strategies", fail)
    hparams = {"output_folder": str(run), "online_probe_csv": None}
    with caplog.at_level(logging.WARNING):
        page = report.report_run(hparams, run / "pretrained")
    assert "No masks: ValueError: these blocks do not fit the grid" in caplog.text
    assert "Curves" in plain(page) and "Masks" not in plain(page)


def test_the_command_is_one_for_a_shell(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "a.yaml", "--data_folder", "my audio"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command_line() == "python train.py a.yaml --data_folder 'my audio'\n"
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert command_line().startswith("torchrun --nproc_per_node=16 train.py a.yaml")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert command_line().startswith("torchrun --nproc_per_node=8 --nnodes=2 train.py a.yaml")


def test_an_encoder_is_probed_once_after_it_was_exported(run, monkeypatch):
    probed = []
    monkeypatch.setattr(report, "probe_run", lambda *arguments: probed.append(arguments))
    hparams = {"output_folder": str(run), "online_probe_csv": "labelled.csv"}
    report.report_run(hparams, run / "pretrained")
    assert probed == []
    os.utime(run / "probe.csv", (1, 1))  # that of an earlier end of the run
    report.report_run(hparams, run / "pretrained")
    assert probed == [(hparams, run / "pretrained", "labelled.csv")]
