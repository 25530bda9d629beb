"""The scores of two libraries against each other, and by hand."""

import numpy as np
import pytest

from speechbrain_jepa.classifier import Decoding
from speechbrain_jepa.evaluation.event_scores import EventScores
from speechbrain_jepa.events import Event, EventTargets, decode

LABELS, STEP = ["a", "b", "c"], 0.05


@pytest.fixture
def detector():
    """Noisy scores of 12 clips of 4 s, and their truth."""
    rng = np.random.default_rng(0)
    truth, scores = [], []
    for clip in range(12):
        events = []
        for label in LABELS[: 1 + clip % 3]:
            onset = rng.uniform(0, 2)
            events.append(Event(onset, onset + rng.uniform(0.3, 1.8), label))
        targets = EventTargets([events], LABELS, 800)(0, 0.0, 4.0).numpy()
        scores.append(np.clip(0.5 * targets + rng.normal(0.3, 0.12, targets.shape), 0, 1))
        truth.append(events)
    return EventScores(truth, [4.0] * 12, LABELS, STEP), truth, scores


def test_f1_of_the_best_thresholds_is_the_same_in_both_libraries(detector):
    judge, _, scores = detector
    best, thresholds = judge.best_event_f1(scores)
    found = [decode(values, LABELS, STEP, Decoding(thresholds), 4.0) for values in scores]
    assert judge.event_f1(found)["macro"] == pytest.approx(best, abs=1e-9)
    assert 0.05 < best < 1
    for other in (0.4, 0.6, 0.8):
        found = [decode(values, LABELS, STEP, Decoding([other] * 3), 4.0) for values in scores]
        assert judge.event_f1(found)["macro"] <= best


def test_event_f1_by_hand():
    """One hit; an onset 0.3 s off; a long one whose offset may be 20 % of its length off."""
    truth = [[Event(1.0, 2.0, "a"), Event(0.0, 3.0, "b")], [Event(1.0, 2.0, "a")]]
    judge = EventScores(truth, [4.0, 4.0], LABELS, STEP)
    found = [[Event(1.1, 2.1, "a"), Event(0.1, 3.5, "b")], [Event(1.3, 2.0, "a"), Event(0, 1, "c")]]
    scores = judge.event_f1(found)
    assert scores["a"] == pytest.approx(0.5) and scores["b"] == 1.0
    assert np.isnan(scores["c"])  # is nowhere
    assert scores["macro"] == pytest.approx(0.75)
    assert judge.event_f1([[], []])["macro"] == 0.0


def test_events_of_one_label_that_overlap_are_one():
    truth = [[Event(1.0, 2.0, "a"), Event(1.5, 3.0, "a")]]
    judge = EventScores(truth, [4.0], ["a"], STEP)
    assert judge.event_f1([[Event(1.0, 3.0, "a")]])["macro"] == 1.0


def test_psds_of_the_truth_is_1_and_of_its_contrary_0(detector):
    judge, truth, noisy = detector
    exact = [EventTargets([events], LABELS, 800)(0, 0.0, 4.0).numpy() for events in truth]
    good, middle = judge.psds(exact), judge.psds(noisy)
    assert good["psds1"] > 0.9 and good["psds2"] > 0.9
    assert 0 < middle["psds1"] < middle["psds2"] <= good["psds2"]  # scenario 2 is the lenient one
    assert middle["psds1"] < good["psds1"]
    bad = judge.psds([1 - values for values in exact])
    assert bad["psds1"] < 0.05
