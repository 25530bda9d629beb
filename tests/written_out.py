"""A small pretraining run that keeps a diary, and the same optimiser steps written out by hand."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_jepa.brain import JEPABrain
from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import PatchMasks, UnstructuredMasking
from speechbrain_jepa.recipe import resolve_recipe
from speechbrain_jepa.schedules import LinearRamp, WarmupCosine
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

REPOSITORY = Path(__file__).parents[1]
CROP_FRAMES = 64
CLIPS = 3  # of a batch
BASE_RATE = 0.5  # 0.5 * 9 / 256 is 0.018: large, so that a wrong step ends far from the right one
BETAS = (0.9, 0.95)
EPS = 0.01  # as large as the gradients: with a small one AdamW would hide a gradient's scale
WEIGHT_DECAY = 0.5

# of a run of four optimiser steps: half of them warm-up, then a cosine to 0; a ramp of the EMA rate
STEPS = 4
RATE_SHARES = (0.5, 1.0, 1.0, 0.5)
EMA_RATES = (0.9, 0.93, 0.96, 0.99)


@dataclass
class Diary:
    """What a run read, drew and reached; the lists run over batches or optimiser steps."""

    items: list = field(default_factory=list)  # per batch: rows of the manifest
    wavs: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    epochs: list = field(default_factory=list)
    synchronised: list = field(default_factory=list)  # per batch: does DDP average its gradients
    weights: list = field(default_factory=list)  # per step: the JEPA's parameters by name
    rates: list = field(default_factory=list)
    skipped: list = field(default_factory=list)  # per step: skipped steps so far
    valid_masks: list = field(default_factory=list)  # per validation batch


class DiaryBrain(JEPABrain):
    """Writes a diary in SpeechBrain's hooks around a batch."""

    def on_fit_batch_start(self, batch, should_step):
        self.diary.items.append(batch.item)
        self.diary.wavs.append(batch.wav)
        self.diary.epochs.append(self.epoch)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        if should_step:
            self.diary.weights.append(weights_of(self.jepa))
            (rate,) = {group["lr"] for group in self.optimizer.param_groups}
            self.diary.rates.append(rate)
            self.diary.skipped.append(self.nonfinite_total)


class DiaryMasking(UnstructuredMasking):
    """Unstructured masks; those of training and of validation are kept apart."""

    def __call__(self, *args, **kwargs):
        masks = super().__call__(*args, **kwargs)
        diary = self.brain.diary
        if torch.is_grad_enabled():  # training
            diary.masks.append(masks)
            wrapped = self.brain.modules["jepa"]
            diary.synchronised.append(getattr(wrapped, "require_backward_grad_sync", None))
        else:
            diary.valid_masks.append(masks)
        return masks


class Broken(SmoothL1):
    """A loss that is not finite in chosen batches of training, though its gradient is.

    A gradient that is not finite would stop the step by itself.

    Arguments
    ---------
    values : dict of int to float
        What is added to the loss of a batch, counted from 0.
    """

    def __init__(self, values):
        super().__init__()
        self.values, self.count = values, -1

    def forward(self, *args):
        self.count += torch.is_grad_enabled()
        loss = super().forward(*args)
        return loss + self.values.get(self.count, 0.0) if torch.is_grad_enabled() else loss


def trained(jepa) -> dict:
    """What has a gradient, by name."""
    parts = ("context_encoder.", "predictor.")
    return {name: p for name, p in jepa.named_parameters() if name.startswith(parts)}


def weights_of(jepa) -> dict:
    """Copies of everything trained or averaged, by name."""
    averages = jepa.target_encoder.named_parameters(prefix="target_encoder")
    return {name: p.detach().clone() for name, p in {**trained(jepa), **dict(averages)}.items()}


def make_brain(
    folder, epochs, broken=None, model_seed=0, checkpoints=False, kind=DiaryBrain, **run_opts
):
    """A brain with a diary; `brain.start` is its JEPA before training."""
    torch.manual_seed(model_seed)
    grid = PatchGrid(frames=CROP_FRAMES)
    jepa = JEPA(
        Encoder(grid, dim=24, depth=1, num_heads=3),
        Predictor(grid, encoder_dim=24, dim=24, depth=1, num_heads=3),
        SmoothL1() if broken is None else Broken(broken),
    )
    with torch.no_grad():  # biases and norms too are worth a weight decay that must not be
        for parameter in [*trained(jepa).values(), *jepa.target_encoder.parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    counter = EpochCounter(epochs)
    masking = DiaryMasking(grid)
    modules = {
        "jepa": jepa,
        "features": LogMelSpectrogram(),
        "normalization": Normalization(-9.0, 4.0),
    }
    hparams = {
        "masking": masking,
        "learning_rate_schedule": WarmupCosine(BASE_RATE, warmup_share=0.5),
        "ema_schedule": LinearRamp(EMA_RATES[0], EMA_RATES[-1]),
        "seed": 0,
        "batch_size": CLIPS,
        "log_interval": 1,
        "collapse_share": 0.0,
        "output_folder": str(folder),
        "train_logger": FileTrainLogger(str(folder / "train_log.txt")),
    }
    brain = kind(
        modules,
        lambda groups: torch.optim.AdamW(
            groups, lr=123.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        ),
        hparams,
        {"device": "cpu", "noprogressbar": True, "remove_vector_weight_decay": True, **run_opts},
        AtomicCheckpointer(folder / "save", {"jepa": jepa, "counter": counter})
        if checkpoints
        else None,
    )
    brain.diary, brain.counter, masking.brain = Diary(), counter, brain
    brain.start = copy.deepcopy(jepa)
    brain.start.loss = SmoothL1()
    return brain


def joined(diaries) -> list:
    """The batches of several processes as those of one: waveforms and masks, batch by batch."""
    batches = []
    for parts in zip(*(zip(diary.wavs, diary.masks) for diary in diaries)):
        masks = PatchMasks(
            torch.cat([masks.context_index for _, masks in parts]),
            torch.cat([masks.target_index for _, masks in parts]),
        )
        batches.append((torch.cat([wav for wav, _ in parts]), masks))
    return batches


def written_out(jepa, steps, max_grad_norm, skipped=()):
    """Optimiser steps without the loop, an optimiser or a schedule.

    Arguments
    ---------
    jepa : JEPA
        Before the first step; it is changed.
    steps : list of lists of (wav, masks)
        The accumulated batches of each step.
    max_grad_norm : float
    skipped : steps that must leave everything as it is, counted from 0

    Returns
    -------
    list of dicts, list of float
        After each step the parameters by name, and the norm of its gradient.
    """
    jepa.train()
    own = trained(jepa)
    first = {name: torch.zeros_like(p) for name, p in own.items()}
    second = {name: torch.zeros_like(p) for name, p in own.items()}
    taken, trace, norms = 0, [], []
    for number, batches in enumerate(steps):
        gradient = {name: torch.zeros_like(p) for name, p in own.items()}
        for wav, masks in batches:
            spectrogram = Normalization(-9.0, 4.0)(LogMelSpectrogram()(wav, margins=True))
            loss = jepa(spectrogram, masks).loss
            for name, part in zip(own, torch.autograd.grad(loss, list(own.values()))):
                gradient[name] += part / len(batches)
        norm = math.sqrt(sum((part.double() ** 2).sum().item() for part in gradient.values()))
        norms.append(norm)
        if number not in skipped:
            taken += 1
            clips = sum(len(wav) for wav, _ in batches)
            rate = BASE_RATE * clips / 256 * RATE_SHARES[number]
            with torch.no_grad():
                for name, p in own.items():
                    g = gradient[name] * min(1.0, max_grad_norm / norm)
                    is_matrix = name.endswith("weight") and "norm" not in name
                    p *= 1 - rate * (WEIGHT_DECAY if is_matrix else 0.0)
                    first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
                    second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g * g
                    mean = first[name] / (1 - BETAS[0] ** taken)
                    deviation = (second[name] / (1 - BETAS[1] ** taken)).sqrt()
                    p -= rate * mean / (deviation + EPS)
                ema = EMA_RATES[number]
                contexts = dict(jepa.context_encoder.named_parameters())
                for name, average in jepa.target_encoder.named_parameters():
                    average.copy_(ema * average + (1 - ema) * contexts[name])
        trace.append(weights_of(jepa))
    return trace, norms


def in_steps(batches, per_step, per_epoch) -> list:
    """Batches grouped into optimiser steps; an epoch's last, incomplete group takes no step."""
    epochs = [batches[start : start + per_epoch] for start in range(0, len(batches), per_epoch)]
    whole = per_epoch - per_epoch % per_step
    return [
        epoch[start : start + per_step] for epoch in epochs for start in range(0, whole, per_step)
    ]


def assert_same_weights(ours, theirs):
    """After every step, each parameter by name: weights up to about 1, moved by 0.01 and more.

    Both sides are float32 and round 1e-7 of a weight, step by step: 2.4e-7 apart on one process.
    """
    assert len(ours) == len(theirs)
    for step, (our, their) in enumerate(zip(ours, theirs)):
        assert our.keys() == their.keys()
        for name in our:
            torch.testing.assert_close(
                our[name],
                their[name],
                rtol=0,
                atol=3e-6,
                msg=lambda text, at=f"step {step}, {name}": f"{at}: {text}",
            )


def run_two_ranks(script: str, folder, audio_folder, timeout: float) -> None:
    """Both ranks of a script beside this file, until they are done."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), str(folder), str(audio_folder)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


def recipe_hparams(recipe, folder, **options) -> dict:
    """A recipe's yaml, with the smallest encoders."""
    small = {
        f"{part}_{size}": 1 for part in ("encoder", "predictor") for size in ("depth", "heads")
    }
    small |= {"encoder_dim": 24, "predictor_dim": 24, "output_folder": str(folder)}
    yaml = REPOSITORY / "hparams" / f"{recipe}.yaml"
    return load_hyperpyyaml(resolve_recipe(yaml, {**small, **options}))
