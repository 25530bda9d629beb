"""A detector of events learns where they are."""

import numpy as np
import pytest
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.classifier import AudioClassifier
from speechbrain_jepa.events import Event, EventTargets, decode
from speechbrain_jepa.finetuning.augment import Mixup, PatchDrop
from speechbrain_jepa.finetuning.data import LabelledDataset, make_loader
from speechbrain_jepa.finetuning.encoder import FinetunedJEPA
from speechbrain_jepa.finetuning.events import EventBrain
from speechbrain_jepa.schedules import WarmupCosine

LABELS = ["high", "low"]


@pytest.fixture(scope="module")
def bursts(tmp_path_factory):
    """20 clips of 1.2 s to 2 s with a burst of each of two tones, and where."""
    import soundfile

    folder = tmp_path_factory.mktemp("bursts")
    rng = np.random.default_rng(0)
    files, events = [], []
    for number in range(20):
        wav = 0.01 * rng.standard_normal(int(rng.uniform(1.2, 2.0) * 16_000))
        found = []
        for label, frequency in zip(LABELS, (2500, 300)):
            onset = rng.uniform(0.0, 0.7)
            place = np.arange(int(onset * 16_000), int((onset + 0.4) * 16_000))
            wav[place] += 0.3 * np.sin(2 * np.pi * frequency / 16_000 * place)
            found.append(Event(onset, onset + 0.4, label))
        files.append(str(folder / f"{number}.wav"))
        events.append(sorted(found))
        soundfile.write(files[-1], wav, 16_000)
    return files, events


def make_brain(parts, bursts, folder, epochs, encoder=None, **options):
    files, events = bursts
    torch.manual_seed(0)
    model = AudioClassifier(
        FinetunedJEPA(parts, step_seconds=0.04, **(encoder or {})), LABELS, level="step", **options
    )
    loaders = [
        make_loader(
            LabelledDataset(
                files[part],
                EventTargets(events[part], LABELS, model.encoder.downsample_rate),
                1.0 if shuffle else None,
            ),
            batch_size=4,
            shuffle=shuffle,
        )
        for part, shuffle in ((slice(0, 12), True), (slice(12, 16), False), (slice(16, 20), False))
    ]
    counter = EpochCounter(epochs)
    brain = EventBrain(
        {"classifier": model},
        lambda groups: torch.optim.AdamW(groups, lr=0.01),
        {
            "learning_rate_schedule": WarmupCosine(0.01, warmup_share=0.1),
            "layer_decay": 1.0,
            "mixup": Mixup(0.0),
            "label_smoothing": 0.0,
            "seed": 7,
            "median_seconds": 0.12,
            "clip_loss_weight": 0.5,
            "events": {"valid": events[12:16], "test": events[16:20]},
            "train_logger": FileTrainLogger(str(folder / "train_log.txt")),
            "skipped_files": None,
        },
        {"device": "cpu", "noprogressbar": True},
        AtomicCheckpointer(folder / "save", {"classifier": model, "counter": counter}),
    )
    return brain, counter, loaders


def test_loss_is_that_of_the_steps_that_count(parts, bursts, tmp_path):
    """Binary cross-entropy over each clip's own steps, and half of that of the clips' labels."""
    brain, _, (_, valid, _) = make_brain(parts, bursts, tmp_path, 1, pooling="attention")
    brain.on_stage_start(None)
    brain.modules.eval()
    batch = next(iter(valid))
    with torch.no_grad():
        found = brain.compute_objectives(brain.compute_forward(batch, None), batch, None)
        terms, clip_terms = [], []
        for row, events in enumerate(bursts[1][12:16]):
            length = round(float(batch.wav_lens[row] * batch.wav.shape[1]))
            logits = brain.classifier(batch.wav[row : row + 1, :length])
            for step, values in enumerate(logits.steps[0]):
                for label, value in zip(LABELS, values):
                    (event,) = (event for event in events if event.label == label)
                    hit = round(event.onset / 0.04) <= step < round(event.offset / 0.04)
                    terms.append(-(value if hit else -value).sigmoid().log())
            clip_terms += [-value.sigmoid().log() for value in logits.clip[0]]  # both are in all
    expected = torch.stack(terms).mean() + 0.5 * torch.stack(clip_terms).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_learns_where_events_are_and_keeps_its_thresholds(parts, bursts, tmp_path):
    encoder = dict(patch_drop=PatchDrop(0.2, whole_steps=True))
    brain, counter, (train, valid, test) = make_brain(parts, bursts, tmp_path, 16, encoder)
    brain.fit(counter, train, valid)
    brain.on_evaluate_start(max_key="score")
    brain.tune(valid)
    assert brain.thresholds == brain.classifier.decoding.thresholds
    brain.evaluate(test, max_key="score")
    assert brain.test_scores["event_f1"] > 0.7
    assert brain.test_scores["psds2"] > 0.5
    # the classifier's folder finds the same events, file by file
    model = AudioClassifier.load(brain.classifier.save(tmp_path / "classifier"))
    from speechbrain_jepa.data.clips import read_audio

    for file, events in zip(bursts[0][16:], brain.detected(brain.thresholds)):
        wav = read_audio(file)
        scores = model.scores(model(wav[None]).steps)[0].numpy()
        found = decode(scores, LABELS, 0.04, model.decoding, len(wav) / 16_000)
        assert [event.label for event in found] == [event.label for event in events]
        np.testing.assert_allclose([e[:2] for e in found], [e[:2] for e in events], atol=1e-6)
