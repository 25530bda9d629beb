"""The recipe as users start it: real processes, real files, real checkpoints."""

import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scripts import load_script

from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.data import SkippedFiles
from speechbrain_jepa.features import LogMelSpectrogram, Normalization

REPOSITORY = Path(__file__).parents[1]
TRAIN = str(REPOSITORY / "train.py")
SMALL = {
    "--encoder_dim": "48",
    "--encoder_depth": "1",
    "--encoder_heads": "3",
    "--predictor_dim": "32",
    "--predictor_depth": "1",
    "--predictor_heads": "2",
    "--batch_size": "4",
    "--number_of_epochs": "3",
    "--warmup_epochs": "1",
    "--num_workers": "1",
    "--norm_crops": "16",
    "--log_interval": "1",
    "--device": "cpu",
    "--report": "False",
}


def command(output, data, *options, recipe="jepa_unstructured", launcher=(sys.executable,)):
    without = {*options, *(("--warmup_epochs",) if recipe == "quickstart" else ())}
    return [
        *launcher,
        TRAIN,
        str(REPOSITORY / "hparams" / f"{recipe}.yaml"),
        *("--output_folder", str(output), "--data_folder", str(data)),
        *itertools.chain(*(pair for pair in SMALL.items() if pair[0] not in without)),
        "--noprogressbar",
        *options,
    ]


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
    )


def metrics(output, prefix="train_"):
    """Rows that carry numbers of training (or validation), by optimiser step."""
    if not (output / "metrics.csv").exists():
        return {}
    with open(output / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[f"{prefix}loss"]]
    return {int(row["step"]): row for row in rows}


def reproducible(rows):
    """What a resumed run must repeat to the last digit; times and memory it cannot."""
    names = ("train_loss", "train_learning_rate", "train_ema_rate", "train_gradient_norm")
    names += ("valid_loss", "valid_target_deviation", "valid_embedding_rank")
    return {step: [row[name] for name in names] for step, row in rows.items()}


@pytest.fixture(scope="module")
def finished(audio_folder, tmp_path_factory):
    """An uninterrupted run of 3 epochs, 5 steps each."""
    output = tmp_path_factory.mktemp("finished")
    done = run(output, audio_folder, "--precision", "fp32", "--report", "True")
    assert done.returncode == 0, done.stdout
    return output, done


def test_training_leaves_logs_checkpoint_and_pretrained_folder(finished):
    output, done = finished
    assert sorted(metrics(output)) == list(range(1, 16))
    assert sorted(metrics(output, "valid_")) == [0, 5, 10, 15]
    config = json.loads((output / "pretrained" / "config.json").read_text())
    assert config["format_version"] == 1
    assert (output / "pretrained" / "model.safetensors").exists()
    assert "epoch: 3, step: 15" in (output / "train_log.txt").read_text()
    assert str(output / "pretrained") in done.stdout


def test_training_ends_with_a_report(finished):
    output, done = finished
    assert f"Report: {output / 'report.html'}" in done.stdout
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "15</b>" in page and "--report True" in page  # steps, and the command
    assert page.count('src="data:image/png;base64,') == 2  # curves and masks


def test_the_pretrained_folder_says_what_ran(finished):
    """Not the yaml's lines: --precision fp32 was given, and validation follows it."""
    output, _ = finished
    training = json.loads((output / "pretrained" / "config.json").read_text())["training"]
    expected = {
        "loss": {"class": "SmoothL1", "beta": 1.0},
        "masking": {"class": "UnstructuredMasking", "target_share": 0.6},
        "learning_rate_schedule": {
            "class": "WarmupCosine",
            "peak_rate": 0.0003,
            "warmup_share": 1 / 3,
            "final_rate": 0.0,
        },
        "ema_schedule": {"class": "LinearRamp", "start": 0.99995, "end": 0.99999},
        "precision": "fp32",
        "eval_precision": "fp32",
        "processes": 1,
        "global_batch": 4,
        "grad_accumulation_factor": 1,
        "max_grad_norm": 3.0,
        "optimizer_step_limit": None,
    }
    assert {name: training[name] for name in expected} == expected
    card = (output / "pretrained" / "README.md").read_text()
    assert "class: SmoothL1" in card and "processes: 1" in card
    assert "eval_precision: fp32" in (output / "hyperparams.yaml").read_text()


@pytest.fixture
def recipe():
    """train.py as a module."""
    return load_script(Path(TRAIN))


def settings(data, output, cache, **others):
    """What the functions of train.py before the brain read."""
    return {
        "data_folder": str(data),
        "train_csv": None,
        "output_folder": str(output),
        "cache_folder": str(cache),
        "min_seconds": 0.2,
        "valid_share": 0.02,
        "max_valid": 1024,
        "n_fft": 400,
        "mixed_frames": None,
        "crop_frames": 208,
        "decode_once": False,
        "passes_per_epoch": 1,
        "crops_per_file": 1,
        "log_interval": 50,
        "batch_size": 4,
        "num_workers": 0,
        "seed": 0,
        "norm_crops": 64,
        "norm_mean": None,
        "norm_std": None,
        **others,
    }


def test_runs_that_share_a_cache_folder_keep_splits_of_their_own(recipe, audio_folder, tmp_path):
    few = settings(audio_folder, tmp_path / "few", tmp_path / "cache")
    half = settings(audio_folder, tmp_path / "half", tmp_path / "cache", valid_share=0.5)
    recipe.prepare_manifests(few)
    before = [len(loader.dataset) for loader in recipe.make_loaders(few)]
    recipe.prepare_manifests(half)
    assert [len(loader.dataset) for loader in recipe.make_loaders(few)] == before
    assert len(recipe.make_loaders(half)[0].dataset) < before[0]


def test_a_file_that_breaks_while_the_normalisation_is_measured_is_listed(
    recipe, audio_folder, tmp_path, caplog
):
    """It is met again in training, by loader processes that would not say it a second time."""
    shutil.copytree(audio_folder, tmp_path / "data")
    wav = np.full(48_000, np.nan, "float32")
    soundfile.write(tmp_path / "data" / "nan.wav", wav, 16_000, subtype="FLOAT")
    options = settings(tmp_path / "data", tmp_path / "out", tmp_path / "cache")
    recipe.prepare_manifests(options)
    options["skipped_files"] = SkippedFiles(tmp_path / "cache" / "skipped.csv")
    options["checkpointer"] = AtomicCheckpointer(tmp_path / "out" / "save", {})
    options["features"], options["normalization"] = LogMelSpectrogram(), Normalization()
    train, _ = recipe.make_loaders(options)
    with torch.no_grad():
        recipe.find_normalization(options, train.dataset)
    assert (tmp_path / "cache" / "skipped.csv").read_text().splitlines()[1:] == [
        "nan.wav,holds NaN or infinite samples"
    ]
    assert "Skipped nan.wav: holds NaN or infinite samples" in caplog.text


def test_learning_rate_follows_the_global_batch(finished):
    output, _ = finished
    # warm-up over the first of three epochs of five steps, then 3e-4 * 4 / 256
    peak = float(metrics(output)[5]["train_learning_rate"])
    assert peak == pytest.approx(3e-4 * 4 / 256)


def test_a_killed_run_continues_as_if_never_stopped(finished, audio_folder, tmp_path):
    options = ("--precision", "fp32", "--ckpt_interval_steps", "2", "--ckpt_interval_minutes", "0")
    process = subprocess.Popen(
        command(tmp_path, audio_folder, *options), cwd=REPOSITORY, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            # step 8 is in the middle of the second epoch, after a checkpoint in it
            if (tmp_path / "metrics.csv").exists() and max(metrics(tmp_path), default=0) >= 8:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert max(metrics(tmp_path)) < 15

    done = run(tmp_path, audio_folder, *options)
    assert done.returncode == 0, done.stdout
    assert "Resuming after optimiser step" in done.stdout
    whole, _ = finished
    for prefix in ("train_", "valid_"):
        assert reproducible(metrics(tmp_path, prefix)) == reproducible(metrics(whole, prefix))


def test_a_finished_run_started_again_does_nothing(finished, audio_folder):
    output, _ = finished
    before = (output / "metrics.csv").read_bytes()
    done = run(output, audio_folder, "--precision", "fp32")
    assert done.returncode == 0, done.stdout
    assert (output / "metrics.csv").read_bytes() == before


def test_two_processes_train_together(audio_folder, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    launcher += ("--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    done = run(tmp_path, audio_folder, "--grad_accumulation_factor", "1", launcher=launcher)
    assert done.returncode == 0, done.stdout
    assert "8 clips (4 x 1 accumulated x 2 processes)" in done.stdout
    rows = metrics(tmp_path)
    assert sorted(rows) == list(range(1, 7))  # 22 training files, 2 steps of 8 in an epoch
    assert float(rows[2]["train_learning_rate"]) == pytest.approx(3e-4 * 8 / 256)
    training = json.loads((tmp_path / "pretrained" / "config.json").read_text())["training"]
    assert (training["processes"], training["global_batch"]) == (2, 8)


def test_ranks_whose_launcher_was_killed_keep_a_second_run_out(audio_folder, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    launcher += ("--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    limit = ("--number_of_epochs", "1000", "--optimizer_step_limit")
    options = ("--ckpt_interval_steps", "2", "--ckpt_interval_minutes", "0", "--num_workers", "0")
    first = subprocess.Popen(
        command(tmp_path, audio_folder, *limit, "1000000", *options, launcher=launcher),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ranks = []
    try:
        deadline = time.monotonic() + 200
        while max(metrics(tmp_path), default=0) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        first.kill()
        steps = max(metrics(tmp_path))
        holder = json.loads((tmp_path / ".lock-holder.json").read_text())["pid"]
        second = run(tmp_path, audio_folder, *limit, "1", *options)
        assert second.returncode != 0
        assert f"{tmp_path} is in use by process {holder}" in second.stdout
        assert "after a torchrun that was killed" in second.stdout
        assert max(metrics(tmp_path)) > steps  # the ranks have gone on all the while
    finally:
        first.kill()
        first.wait()
        for rank in ranks:
            os.kill(int(rank), signal.SIGKILL)
    emptied = tmp_path / "save" / "CKPT+2020-01-01+00-00-00+00"
    emptied.mkdir()
    partial = tmp_path / "save" / ".partial-CKPT+2020-01-01+00-00-00+01"
    partial.mkdir()
    third = run(tmp_path, audio_folder, *limit, "1", *options)
    assert third.returncode == 0, third.stdout
    assert "Resuming after optimiser step" in third.stdout
    assert not emptied.exists() and not partial.exists()
    with open(tmp_path / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)


def test_files_added_to_a_run_leave_its_normalisation(audio_folder, tmp_path):
    """The quickstart's yaml, without what it does at the end, started again for one epoch more."""
    data, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(audio_folder, data)
    options = ("--after_training", "null", "--warmup_epochs", "0", "--passes_per_epoch", "1")
    done = run(output, data, *options, "--number_of_epochs", "1", recipe="quickstart")
    assert done.returncode == 0, done.stdout
    config = output / "pretrained" / "config.json"
    trained = json.loads(config.read_text())["normalization"]
    noise = np.random.default_rng(0).uniform(-1, 1, size=(24, 48_000))
    for number, wav in enumerate(noise):
        soundfile.write(data / f"loud_{number}.wav", wav, 16_000)
    done = run(output, data, *options, "--number_of_epochs", "2", recipe="quickstart")
    assert done.returncode == 0, done.stdout
    assert "Resuming after optimiser step" in done.stdout
    exported = json.loads(config.read_text())
    assert exported["training"]["checkpoint"]["epoch"] == 2
    assert exported["normalization"] == trained


@pytest.mark.parametrize("recipe", ["jepa_multiblock", "jepa_time"])
def test_block_strategies_train_with_latent_targets(recipe, audio_folder, tmp_path):
    options = ("--target_masking", "latent", "--grad_accumulation_factor", "2")
    done = run(tmp_path, audio_folder, *options, "--max_grad_norm", "1.5", recipe=recipe)
    assert done.returncode == 0, done.stdout
    assert sorted(metrics(tmp_path)) == list(range(1, 7))  # 5 batches of 4 an epoch, 2 a step
    training = json.loads((tmp_path / "pretrained" / "config.json").read_text())["training"]
    assert training["masking"]["target_share"] == [0.15, 0.2]
    assert training["masking"]["context_share"] == [0.85, 1.0]
    assert training["masking"].get("target_aspect") == (
        [0.75, 1.5] if recipe == "jepa_multiblock" else None
    )
    assert training["grad_accumulation_factor"] == 2
    assert (training["global_batch"], training["max_grad_norm"]) == (8, 1.5)


@pytest.mark.parametrize("name", ["VarianceCovariance", "SIGReg"])
def test_a_regularizer_is_an_option_of_the_command_line(name, audio_folder, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    launcher += ("--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    option = f"!new:speechbrain_jepa.regularizers.{name}"
    options = ("--regularizer", option)
    done = run(tmp_path, audio_folder, *options, recipe="jepa_multiblock", launcher=launcher)
    assert done.returncode == 0, done.stdout
    row = metrics(tmp_path)[2]
    assert float(row["train_loss"]) > float(row["train_prediction"]) > 0
    config = json.loads((tmp_path / "pretrained" / "config.json").read_text())
    assert config["training"]["regularizer"]["class"] == name


def test_debug_mode_is_short_and_leaves_nothing_to_resume(audio_folder, tmp_path):
    done = run(tmp_path, audio_folder, "--debug")
    assert done.returncode == 0, done.stdout
    assert max(metrics(tmp_path)) <= 4
    assert not list((tmp_path / "save").glob("CKPT*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--crop_frames", "200"), "crop_frames=200 is not a multiple of patch_time=16"),
        (("--target_masking", "sound"), "target_masking='sound': choose one of audio, latent"),
        (("--attention", "flash_attn"), "attention=flash_attn needs half precision on a CUDA"),
        (("--grad_accumulation_factor", "100"), "grad_accumulation_factor=100 is more than"),
        (
            ("--number_of_epochs", "10", "--warmup_epochs", "20"),
            "warmup_epochs=20 must be at least 0 and below number_of_epochs=10: "
            "--warmup_epochs 0.67",
        ),
    ],
)
def test_what_does_not_fit_fails_early_with_the_fix(options, message, audio_folder, tmp_path):
    done = run(tmp_path, audio_folder, *options)
    assert done.returncode != 0
    assert message in done.stdout
    assert not (tmp_path / "metrics.csv").exists()


def test_a_disk_that_is_full_from_the_start_is_named(audio_folder, small_disk):
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb") as file:
        file.write(bytes(2**20))
    done = run(small_disk / "out", audio_folder)
    assert done.returncode != 0
    assert f"the disk of {small_disk / 'out'} is full" in done.stdout


def test_a_missing_folder_is_said_at_once(tmp_path):
    done = run(tmp_path / "out", tmp_path / "nowhere")
    assert done.returncode != 0
    assert f"data_folder={tmp_path / 'nowhere'} does not exist" in done.stdout
