"""The loop: a plain one with everything off, the same weights after a resume, the right scores."""

from pathlib import Path

import pytest
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger
from torch import nn

from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.classifier import AudioClassifier
from speechbrain_jepa.data import SkippedFiles
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.finetuning.augment import Mixup, PatchDrop, SpecAugment
from speechbrain_jepa.finetuning.brain import FinetuningBrain, write_predictions
from speechbrain_jepa.finetuning.data import (
    ClipTargets,
    LabelledDataset,
    balanced_weights,
    make_loader,
)
from speechbrain_jepa.finetuning.encoder import FinetunedJEPA
from speechbrain_jepa.schedules import WarmupCosine

LABELS = ["low", "middle", "high"]
ALL_ON = dict(
    encoder=dict(spec_augment=SpecAugment(20, 10), patch_drop=PatchDrop(0.3)),
    classifier=dict(dropout=0.2),
    hparams=dict(mixup=Mixup(0.5), label_smoothing=0.1, layer_decay=0.7),
    balanced=True,
)


class Run:
    """A brain with its loaders, on the first 16 tones; the others validate."""

    def __init__(
        self, parts, tones, folder, epochs=2, encoder=None, classifier=None, hparams=None,
        balanced=False, multilabel=False, optimizer=torch.optim.AdamW, **run_opts,
    ):  # fmt: skip
        files, targets = tones
        folder.mkdir(exist_ok=True)
        if multilabel:
            targets = torch.nn.functional.one_hot(targets).float()
        torch.manual_seed(3)
        self.model = AudioClassifier(
            FinetunedJEPA(parts, **(encoder or {})), LABELS, multilabel, **(classifier or {})
        )
        self.train, self.valid = (
            make_loader(
                LabelledDataset(files[part], ClipTargets(targets[part]), 0.5 if shuffle else None),
                batch_size=4,
                shuffle=shuffle,
                weights=balanced_weights(targets[part]) if balanced and shuffle else None,
            )
            for part, shuffle in ((slice(0, 16), True), (slice(16, 24), False))
        )
        self.counter = EpochCounter(epochs)
        checkpointer = AtomicCheckpointer(
            folder / "save", {"classifier": self.model, "counter": self.counter}
        )
        self.brain = FinetuningBrain(
            {"classifier": self.model},
            lambda groups: optimizer(groups, lr=0.01, weight_decay=0.1),
            {
                "learning_rate_schedule": WarmupCosine(0.01, warmup_share=0.25),
                "layer_decay": 1.0,
                "mixup": Mixup(0.0),
                "label_smoothing": 0.0,
                "seed": 7,
                "train_logger": FileTrainLogger(str(folder / "train_log.txt")),
                "skipped_files": SkippedFiles(folder / "skipped.csv"),
                **(hparams or {}),
            },
            {"device": "cpu", "noprogressbar": True, "max_grad_norm": 0.5, **run_opts},
            checkpointer,
        )

    def fit(self):
        self.brain.fit(self.counter, self.train, self.valid)
        return self

    def state(self):
        return {name: part.clone() for name, part in self.model.state_dict().items()}


def test_with_everything_off_it_is_a_plain_loop(parts, tones, tmp_path):
    # not Adam, which makes steps of rounding errors where a gradient is nearly zero
    options = dict(optimizer=torch.optim.SGD, remove_vector_weight_decay=True)
    run = Run(parts, tones, tmp_path / "run", **options)
    encoder = AudioJEPA(parts, freeze=False).train()
    norm, linear = nn.BatchNorm1d(120, affine=False), nn.Linear(120, 3)
    linear.load_state_dict(run.model.head["linear"].state_dict())
    parameters = [*encoder.parameters(), *linear.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer, schedule = torch.optim.SGD(groups, lr=0.01), WarmupCosine(0.01, warmup_share=0.25)
    step = 0
    for epoch in (1, 2):
        run.train.batch_sampler.set_epoch(epoch)
        for batch in run.train:
            steps = encoder.num_steps((batch.wav_lens * batch.wav.shape[1]).round())
            mean = encoder(batch.wav, batch.wav_lens).sum(1) / steps[:, None].float()
            logits = linear(norm(mean))
            nn.functional.cross_entropy(logits, batch.targets).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            for group in groups:
                optimizer.param_groups[groups.index(group)]["lr"] = schedule(step, 8)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    before = run.state()
    run.fit()
    assert step == run.brain.optimizer_step == 8
    expected = {f"encoder.{name}": part for name, part in encoder.state_dict().items()}
    expected |= {f"head.linear.{name}": part for name, part in linear.state_dict().items()}
    expected |= {f"head.norm.{name}": part for name, part in norm.state_dict().items()}
    for name, part in run.state().items():
        torch.testing.assert_close(part, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    moved = before["encoder.encoder.blocks.0.mlp.fc1.weight"]
    assert (moved - expected["encoder.encoder.blocks.0.mlp.fc1.weight"]).abs().max() > 1e-4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batch", [2, 6])  # before the first epoch's end, and in the second
def test_a_run_that_was_killed_ends_with_the_same_weights(parts, tones, tmp_path, batch):
    options = dict(**ALL_ON, ckpt_interval_steps=1)
    whole = Run(parts, tones, tmp_path / "whole", **options).fit()

    killed = Run(parts, tones, tmp_path / "killed", **options)
    seen = []

    def die(*args):
        seen.append(args)
        if len(seen) > batch:  # a checkpoint is written after each batch
            raise Killed

    killed.brain.on_fit_batch_start = lambda *args: (
        die(),
        FinetuningBrain.on_fit_batch_start(killed.brain, *args),
    )
    with pytest.raises(Killed):
        killed.fit()
    killed.brain.checkpointer.finish()  # its thread, which a kill would have ended
    again = Run(parts, tones, tmp_path / "killed", **options)
    torch.rand(17)  # the state of torch's generator is not that of the killed run
    again.fit()
    for name, part in again.state().items():
        assert torch.equal(part, whole.state()[name]), name
    logs = [
        Path(tmp_path / name / "train_log.txt").read_text().splitlines()[-1]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


def test_other_seeds_are_other_runs(parts, tones, tmp_path):
    runs = [
        Run(
            parts,
            tones,
            tmp_path / str(seed),
            1,
            **{**ALL_ON, "hparams": {**ALL_ON["hparams"], "seed": seed}},
        ).fit()
        for seed in (1, 2)
    ]
    assert not torch.equal(*(run.model.head["linear"].weight for run in runs))


@pytest.mark.parametrize("multilabel", [False, True])
def test_score_is_that_of_scikit_learn_and_the_best_checkpoint_is_taken(
    parts, tones, tmp_path, multilabel
):
    from sklearn.metrics import accuracy_score, average_precision_score

    run = Run(parts, tones, tmp_path / "run", 6, multilabel=multilabel).fit()
    run.brain.evaluate(run.valid, max_key="score")
    files, targets = tones
    with torch.no_grad():
        run.model.eval()
        logits = [run.model(batch.wav, batch.wav_lens).clip for batch in run.valid]
    logits, truth = torch.cat(logits), targets[16:].numpy()
    if multilabel:
        hits = torch.nn.functional.one_hot(targets[16:]).numpy()
        expected = average_precision_score(hits, logits.numpy(), average="macro")
    else:
        expected = accuracy_score(truth, logits.argmax(1).numpy())
    assert run.brain.test_score == pytest.approx(expected)
    assert run.brain.best_score == pytest.approx(expected)  # the same clips
    lines = (tmp_path / "run/train_log.txt").read_text().splitlines()
    name = "mAP" if multilabel else "accuracy"
    scores = [float(line.split(f"valid {name}: ")[1].split(",")[0]) for line in lines[:-1]]
    assert max(scores) == pytest.approx(expected, abs=1e-4)
    assert expected > 0.6  # of three pitches

    write_predictions(tmp_path / "p.csv", run.brain, files[16:])
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    assert rows[0] == ["file", "target", *LABELS]
    assert [row[1] for row in rows[1:]] == [LABELS[target] for target in truth]
    scores = torch.tensor([[float(value) for value in row[2:]] for row in rows[1:]])
    torch.testing.assert_close(scores, run.model.scores(logits), rtol=0, atol=1e-4)


def test_a_step_that_is_not_finite_is_skipped(parts, tones, tmp_path):
    run = Run(parts, tones, tmp_path / "run", 1, nonfinite_patience=9)
    before = run.state()
    original = run.brain.clip_loss
    run.brain.clip_loss = lambda *args: original(*args) * float("nan")
    run.fit()
    parameters = dict(run.model.named_parameters())
    assert all(torch.equal(before[name], part) for name, part in parameters.items())


def test_settings_that_cannot_be_are_refused(parts, tones, tmp_path):
    options = dict(encoder=dict(patch_drop=PatchDrop(0.3)), classifier=dict(pooling="attention"))
    with pytest.raises(ValueError, match="patch_drop_steps=True"):
        Run(parts, tones, tmp_path / "a", **options)
    with pytest.raises(ValueError, match="grad_accumulation_factor=9 is more than the 4 batches"):
        Run(parts, tones, tmp_path / "b", grad_accumulation_factor=9).fit()
