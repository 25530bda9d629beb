"""The loop, in this process; what needs a process of its own is in test_train.py."""

import csv
import logging

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

from speechbrain_jepa.brain import JEPABrain
from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.data import (
    CropDataset,
    CropSampler,
    SkippedFiles,
    crop_loader,
    scan_folder,
)
from speechbrain_jepa.evaluation.online_probe import OnlineProbe
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import UnstructuredMasking
from speechbrain_jepa.monitors import MetricsTable
from speechbrain_jepa.precision import default_precision
from speechbrain_jepa.regularizers import VarianceCovariance
from speechbrain_jepa.schedules import LinearRamp, WarmupCosine
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

CLIPS = 4  # of a batch: 24 files make 6 batches an epoch


@pytest.fixture
def loaders(audio_folder, tmp_path):
    manifest, _ = scan_folder(audio_folder, tmp_path / "scan", progress=False)
    dataset = CropDataset(manifest, audio_folder, crop_frames=64)
    train = crop_loader(dataset, CropSampler(len(dataset), CLIPS))
    valid = crop_loader(dataset, CropSampler(len(dataset), CLIPS, shuffle=False))
    return train, valid


@pytest.fixture
def make_brain(tmp_path):
    def make(loss=None, epochs=1, checkpointer=False, run_opts=(), regularizer=None, **hparams):
        torch.manual_seed(0)
        grid = PatchGrid(frames=64)
        jepa = JEPA(
            Encoder(grid, dim=24, depth=1, num_heads=3),
            Predictor(grid, encoder_dim=24, dim=24, depth=1, num_heads=3),
            loss or SmoothL1(),
            regularizer=regularizer,
        )
        modules = {
            "jepa": jepa,
            "features": LogMelSpectrogram(),
            "normalization": Normalization(-9.0, 4.0),
        }
        counter = EpochCounter(epochs)
        recoverables = {"jepa": jepa, "counter": counter}
        brain = JEPABrain(
            modules,
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
            {
                "masking": UnstructuredMasking(grid),
                "learning_rate_schedule": WarmupCosine(1e-3, warmup_share=0.0),
                "ema_schedule": LinearRamp(0.9, 0.99),
                "seed": 0,
                "batch_size": CLIPS,
                "log_interval": 1,
                "collapse_share": 0.1,
                "output_folder": str(tmp_path),
                "train_logger": FileTrainLogger(str(tmp_path / "train_log.txt")),
                **hparams,
            },
            {"device": "cpu", "noprogressbar": True, **dict(run_opts)},
            AtomicCheckpointer(tmp_path / "save", recoverables) if checkpointer else None,
        )
        brain.counter = counter
        return brain

    return make


def rows(tmp_path, prefix="train_"):
    with open(tmp_path / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row[f"{prefix}gradient_norm"]]


class Scaled(SmoothL1):
    """A loss whose chosen calls, counted from 0, are multiplied by a factor."""

    def __init__(self, factor, calls):
        super().__init__()
        self.factor, self.calls, self.count = factor, calls, -1

    def forward(self, *args):
        loss = super().forward(*args)
        if torch.is_grad_enabled():  # validation is not counted
            self.count += 1
            if self.count in self.calls:
                return loss * self.factor
        return loss


def test_one_step_is_adamw_on_the_clipped_gradient_and_one_ema_update(make_brain, loaders):
    """Against the same step written out, with every parameter in one list."""
    train, _ = loaders
    brain = make_brain(run_opts={"max_grad_norm": 0.01, "optimizer_step_limit": 1})
    mirror = make_brain().jepa  # same seed, same parameters
    brain.fit(brain.counter, *loaders)

    train.batch_sampler.set_epoch(1)
    batch = next(iter(train))
    brain.epoch, brain.step = 1, 1
    masks = brain.draw_masks(CLIPS, sb.Stage.TRAIN)
    spectrogram = Normalization(-9.0, 4.0)(LogMelSpectrogram()(batch.wav, margins=True))
    mirror(spectrogram, masks).loss.backward()
    parameters = [p for p in mirror.parameters() if p.requires_grad]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    assert norm > 0.1  # far above the limit: every group must be clipped
    for parameter in parameters:
        parameter.grad *= 0.01 / norm
    before = {name: p.clone() for name, p in mirror.target_encoder.named_parameters()}
    rate = 1e-3 * CLIPS / 256
    torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05).step()
    for (name, ours), theirs in zip(brain.jepa.context_encoder.named_parameters(), parameters):
        torch.testing.assert_close(ours, theirs, msg=name)
    for name, average in brain.jepa.target_encoder.named_parameters():
        context = dict(mirror.context_encoder.named_parameters())[name]
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * context, msg=name)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(make_brain, loaders, tmp_path, factor):
    brain = make_brain(loss=Scaled(factor, calls={2}))
    brain.fit(brain.counter, *loaders)
    assert all(parameter.isfinite().all() for parameter in brain.jepa.parameters())
    assert [row["train_nonfinite_steps"] for row in rows(tmp_path)] == list("001111")


def test_losses_that_stay_not_finite_stop_the_run_with_the_fix(make_brain, loaders):
    brain = make_brain(
        loss=Scaled(float("nan"), calls=set(range(1, 99))), run_opts={"nonfinite_patience": 2}
    )
    with pytest.raises(RuntimeError, match=r"3 optimiser steps in a row .*base_learning_rate"):
        brain.fit(brain.counter, *loaders)
    assert brain.optimizer_step == 4  # one good step, two skipped ones and the one that stops


def test_accumulated_batches_weigh_as_much_as_one_large_batch(make_brain, loaders, tmp_path):
    brain = make_brain(run_opts={"grad_accumulation_factor": 3})
    assert brain.global_batch == 12
    brain.fit(brain.counter, *loaders)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    assert float(rows(tmp_path)[0]["train_learning_rate"]) == pytest.approx(1e-3 * 12 / 256)


def test_hooks_around_a_batch_are_called_as_in_speechbrain(make_brain, loaders, monkeypatch):
    calls = []
    brain = make_brain(run_opts={"grad_accumulation_factor": 2, "optimizer_step_limit": 1})
    monkeypatch.setattr(brain, "on_fit_batch_start", lambda *args: calls.append(("start", *args)))
    monkeypatch.setattr(brain, "on_fit_batch_end", lambda *args: calls.append(("end", *args)))
    brain.fit(brain.counter, *loaders)
    assert [(name, len(batch), rest[-1]) for name, batch, *rest in calls] == [
        ("start", CLIPS, False),
        ("end", CLIPS, False),
        ("start", CLIPS, True),
        ("end", CLIPS, True),
    ]
    _, _, output, loss, _ = calls[-1]
    assert loss is output.loss


@pytest.mark.parametrize("stage", [sb.Stage.TRAIN, sb.Stage.VALID])
def test_files_that_break_are_listed(stage, make_brain, loaders, tmp_path):
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    brain = make_brain(skipped_files=skipped)
    brain.train_set, brain.epoch, brain.step = loaders[0], 1, 1
    brain.on_stage_start(stage, epoch=1)
    batch = next(iter(loaders[0]))
    batch.failures.append(("a.flac", "lost sync"))
    with torch.no_grad():
        brain.compute_forward(batch, stage)
    assert skipped.path.read_text() == "file,reason\na.flac,lost sync\n"


def test_a_collapse_is_said_loudly(make_brain, loaders, caplog):
    train, valid = loaders
    brain = make_brain(epochs=2)
    with caplog.at_level(logging.WARNING):
        brain.fit(brain.counter, train, valid)
        assert "COLLAPSE" not in caplog.text
        with torch.no_grad():  # an encoder that tells nothing but the patch's place
            brain.jepa.context_encoder.patch_embed.weight.zero_()
        brain._fit_valid(valid, epoch=2, enable=False)
    assert "COLLAPSE? embedding_deviation fell from" in caplog.text
    assert "ema_start" in caplog.text
    assert "speechbrain_jepa.regularizers.VarianceCovariance" in caplog.text


def test_metrics_show_the_parts_of_a_regularised_loss(make_brain, loaders, tmp_path):
    brain = make_brain(regularizer=VarianceCovariance(), run_opts={"optimizer_step_limit": 3})
    brain.fit(brain.counter, *loaders)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        split = "train" if row["train_loss"] else "valid"
        parts = [row[f"{split}_{name}"] for name in ("prediction", "variance", "covariance")]
        assert sum(map(float, parts)) == pytest.approx(float(row[f"{split}_loss"]), rel=1e-5)
        assert float(parts[2]) > 0
    assert "covariance" in (tmp_path / "train_log.txt").read_text()


def test_metrics_of_a_plain_loss_have_no_parts(make_brain, loaders, tmp_path):
    brain = make_brain(run_opts={"optimizer_step_limit": 1})
    brain.fit(brain.counter, *loaders)
    assert "prediction" not in (tmp_path / "metrics.csv").read_text()


def test_tensorboard_gets_what_the_table_gets(make_brain, loaders, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorboardLogger(str(tmp_path / "tensorboard"))
    brain = make_brain(tensorboard_logger=logger)
    brain.fit(brain.counter, *loaders)
    logger.writer.flush()
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    losses = {event.step: event.value for event in accumulator.Scalars("loss/train")}
    table = {int(row["step"]): float(row["train_loss"]) for row in rows(tmp_path)}
    assert losses == pytest.approx(table, rel=1e-5)
    assert accumulator.Scalars("embedding_rank/valid")


def test_online_probe_is_logged_with_the_losses(make_brain, loaders, audio_folder, tmp_path):
    """Labels that the log-mel tells apart: silence and tones."""
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    lines = ["file,split,label"]
    for number in range(12):
        split = "train" if number < 8 else "test"
        silence = labelled / f"{number}.wav"
        soundfile.write(silence, 1e-4 * np.random.default_rng(number).normal(size=8_000), 16_000)
        tone = audio_folder / f"tone_{number:02d}.flac"
        lines += [f"{silence},{split},silence", f"{tone},{split},tone"]
    (labelled / "labels.csv").write_text("\n".join(lines))
    brain = make_brain(epochs=3, online_probe=OnlineProbe(labelled / "labels.csv", every=2))
    brain.fit(brain.counter, *loaders)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["valid_loss"]]
    accuracy = {int(row["epoch"]): row["valid_labelled_accuracy"] for row in table}
    assert accuracy == {0: "100.0", 1: "", 2: "100.0", 3: ""}
    with pytest.raises(ValueError, match="online_probe_every=0"):
        OnlineProbe(labelled / "labels.csv", every=0)


def test_the_first_row_after_a_resume_is_that_of_a_run_never_stopped(
    make_brain, loaders, tmp_path, monkeypatch
):
    """Rows of four steps, validation and a checkpoint after step 2 and a kill in step 4."""
    options = {"ckpt_interval_steps": 2, "ckpt_interval_minutes": 0}
    whole = make_brain(log_interval=4, valid_every=2)
    whole.fit(whole.counter, *loaders)

    def logged():
        table = MetricsTable(tmp_path / "metrics.csv", ["step"]).read()
        return [(row["step"], row["train_loss"], row["valid_loss"]) for row in table]

    expected = logged()
    # of steps 1 to 4, and of 5 and 6; validation before them, and after 2, 4 and 6
    assert [bool(loss) for _, loss, _ in expected] == [False, False, True, False, True, False]

    killed = make_brain(log_interval=4, valid_every=2, checkpointer=True, run_opts=options)

    def dies():
        if killed.optimizer_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        killed, "optimizers_step", lambda step=killed.optimizers_step: dies() or step()
    )
    with pytest.raises(KeyboardInterrupt):
        killed.fit(killed.counter, *loaders)
    resumed = make_brain(log_interval=4, valid_every=2, checkpointer=True, run_opts=options)
    resumed.fit(resumed.counter, *loaders)
    assert logged() == expected


def test_one_validation_clip_makes_the_collapse_alarm_say_that_it_is_blind(
    make_brain, loaders, caplog
):
    train, valid = loaders
    dataset = torch.utils.data.Subset(valid.dataset, [0])
    dataset.__getitems__ = lambda keys: valid.dataset.__getitems__(keys[:1])
    alone = crop_loader(dataset, CropSampler(1, CLIPS, shuffle=False))
    brain = make_brain(run_opts={"optimizer_step_limit": 1})
    with caplog.at_level(logging.WARNING):
        brain.fit(brain.counter, train, alone)
    assert "alarm is blind" in caplog.text
    assert "embedding_rank started at 1" in caplog.text
    assert "embedding_deviation started at 0" in caplog.text
    assert "1 validation clips: raise valid_share" in caplog.text
    caplog.clear()
    brain = make_brain(run_opts={"optimizer_step_limit": 1})
    with caplog.at_level(logging.WARNING):
        brain.fit(brain.counter, train, valid)
    assert "blind" not in caplog.text


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "limit", "expected"),
    [
        (True, True, "", "bf16"),
        (True, False, "", "bf16"),
        (False, True, "", "bf16"),
        (False, False, "", "fp32"),  # AVX-512 alone: oneDNN says yes and converts
        (True, True, "AVX512_CORE_AMX", "bf16"),
        (True, True, "avx512_core_bf16", "bf16"),
        (True, True, "AVX512_CORE", "fp32"),
        (True, True, "AVX512_CORE_VNNI", "fp32"),
    ],
)
def test_a_cpu_trains_in_bf16_only_where_it_multiplies_it_natively(
    avx512_bf16, amx, limit, expected, monkeypatch
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert default_precision("cpu") == expected


def test_a_disk_too_full_for_the_log_is_named(make_brain, loaders, small_disk):
    logger = FileTrainLogger(str(small_disk / "train_log.txt"))
    brain = make_brain(train_logger=logger, output_folder=str(small_disk))
    brain.epoch = 1
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    with pytest.raises(OSError, match=f"the disk of {small_disk} is full"):
        brain._log("train", {"loss": 1.0})


def steps_with(tmp_path, column):
    with open(tmp_path / "metrics.csv", newline="") as file:
        return [
            (int(row["epoch"]), int(row["step"])) for row in csv.DictReader(file) if row[column]
        ]


def test_validation_and_checkpoints_come_every_so_many_steps(make_brain, loaders, tmp_path):
    """Two epochs of six steps; both come at the end of the run as well."""
    options = {"ckpt_interval_minutes": 0}
    brain = make_brain(
        epochs=2, checkpointer=True, run_opts=options, valid_every=4, checkpoint_every=5
    )
    saved = []
    begin = brain.checkpointer._begin
    brain.checkpointer._begin = lambda meta, *args: (
        saved.append(brain.optimizer_step) or begin(meta, *args)
    )
    brain.fit(brain.counter, *loaders)
    assert steps_with(tmp_path, "valid_loss") == [(0, 0), (1, 4), (2, 8), (2, 12)]
    assert saved == [5, 10, 12]
    assert brain.checkpointer.find_checkpoint().meta["step"] == 12
    whole = [p.clone() for p in brain.jepa.parameters()]
    plain = make_brain(epochs=2)
    plain.fit(plain.counter, *loaders)  # validation changes nothing
    assert all(map(torch.equal, plain.jepa.parameters(), whole))


@pytest.mark.parametrize("name", ["valid_every", "checkpoint_every"])
def test_an_interval_of_no_steps_is_refused(make_brain, name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1 optimiser step"):
        make_brain(**{name: 0})


def test_validation_clips_are_decoded_once(make_brain, loaders, monkeypatch):
    train, valid = loaders
    read = []
    getitems = CropDataset.__getitems__
    monkeypatch.setattr(
        CropDataset, "__getitems__", lambda self, keys: read.append(keys) or getitems(self, keys)
    )
    brain = make_brain(epochs=2)
    brain.fit(brain.counter, train, valid)
    assert len(read) == len(valid) + 2 * len(train)


def test_processes_agree_on_a_checkpoint_at_log_intervals_only(make_brain, loaders, monkeypatch):
    """Rank 0's clock decides, and asking it makes all wait."""
    asked = []
    brain = make_brain(
        epochs=1, checkpointer=True, log_interval=3, run_opts={"ckpt_interval_minutes": 1e-9}
    )
    monkeypatch.setattr("speechbrain.core.is_distributed_initialized", lambda: True)
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list",
        lambda decision, src: asked.append((brain.optimizer_step, *decision)),
    )
    saves = []
    monkeypatch.setattr(brain, "_save_intra_epoch_ckpt", lambda: saves.append(brain.optimizer_step))
    brain.fit(brain.counter, *loaders)
    assert asked == [(3, True), (6, True)]
    assert saves == [3, 6]
