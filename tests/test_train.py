"""The recipe as users start it: real processes, real files, real checkpoints."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TRAIN = str(REPOSITORY / "train.py")
SMALL = [
    "--encoder_dim",
    "48",
    "--encoder_depth",
    "1",
    "--encoder_heads",
    "3",
    "--predictor_dim",
    "32",
    "--predictor_depth",
    "1",
    "--predictor_heads",
    "2",
    "--batch_size",
    "4",
    "--number_of_epochs",
    "3",
    "--warmup_epochs",
    "1",
    "--num_workers",
    "1",
    "--norm_crops",
    "16",
    "--log_interval",
    "1",
    "--device",
    "cpu",
    "--noprogressbar",
]


def command(output, data, *options, recipe="jepa_unstructured", launcher=(sys.executable,)):
    return [
        *launcher,
        TRAIN,
        str(REPOSITORY / "hparams" / f"{recipe}.yaml"),
        *("--output_folder", str(output), "--data_folder", str(data)),
        *SMALL,
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
    done = run(output, audio_folder, "--precision", "fp32")
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
    assert (tmp_path / "pretrained" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", ["jepa_multiblock", "jepa_time"])
def test_block_strategies_train_with_latent_targets(recipe, audio_folder, tmp_path):
    options = ("--target_masking", "latent", "--grad_accumulation_factor", "2")
    done = run(tmp_path, audio_folder, *options, recipe=recipe)
    assert done.returncode == 0, done.stdout
    assert sorted(metrics(tmp_path)) == list(range(1, 7))  # 5 batches of 4 an epoch, 2 a step


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
    assert config["training"]["regularizer"] == name


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
    ],
)
def test_what_does_not_fit_fails_early_with_the_fix(options, message, audio_folder, tmp_path):
    done = run(tmp_path, audio_folder, *options)
    assert done.returncode != 0
    assert message in done.stdout
    assert not (tmp_path / "metrics.csv").exists()


def test_a_missing_folder_is_said_at_once(tmp_path):
    done = run(tmp_path / "out", tmp_path / "nowhere")
    assert done.returncode != 0
    assert f"data_folder={tmp_path / 'nowhere'} does not exist" in done.stdout
