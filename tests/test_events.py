"""Events: their csv, targets of steps, decoding, and a detector that learns."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter as scipy_median

from speechbrain_jepa.classifier import Decoding
from speechbrain_jepa.events import Event, EventTargets, decode, median_filter, read_events

HEADER = "file,onset,offset,label,split\n"
GOOD = "a.wav,0.5,1.25,dog,train\nb.wav,,,,valid\nc.wav,0,0.1,cat,test\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD + "a.wav,2,1,dog,train\n", r"line 5 \(a.wav\): onset '2' and offset '1'"),
        (GOOD + "a.wav,x,1,dog,train\n", "onset 'x'"),
        (GOOD + "a.wav,-1,1,dog,train\n", "onset '-1'"),
        (GOOD + "a.wav,0,inf,dog,train\n", "offset 'inf'"),
        (GOOD + "a.wav,0,1,,train\n", "either all there, or all empty"),
        (GOOD + "a.wav,2,3,dog,test\n", "split 'test', but 'train' further up"),
        (GOOD + "d.wav,2,3,dog,dev\n", "split 'dev' is none of"),
        ("a.wav,0,1,dog,train\nb.wav,0,1,dog,test\n", "no file of split valid"),
        ("a.wav,,,,train\nb.wav,,,,test\nc.wav,,,,valid\n", "no event in any file"),
    ],
)
def test_a_csv_that_cannot_be_meant_so_is_an_error_that_names_the_line(rows, message, tmp_path):
    path = tmp_path / "events.csv"
    path.write_text(HEADER + rows)
    with pytest.raises(ValueError, match=message):
        read_events(path)
    path.write_text(rows)
    with pytest.raises(ValueError, match="has no column file, onset, offset, label, split"):
        read_events(path)


def test_targets_are_what_sounds_at_each_step_to_the_nearest_edge():
    events = [Event(0.103, 0.52, "a"), Event(0.45, 0.9, "a"), Event(0.801, 0.803, "b")]
    targets = EventTargets([events], ["a", "b"], downsample_rate=1_600)
    whole = targets(0, 0.0, 1.05)
    assert whole.shape == (11, 2)
    edges = {"a": [(1, 5), (4, 9)], "b": [(8, 9)]}  # 0.1 s steps
    for label, runs in edges.items():
        expected = [float(any(i <= step < j for i, j in runs)) for step in range(11)]
        assert whole[:, "ab".index(label)].tolist() == expected
    for start in (0.2, 0.5):  # a crop at whole steps has the targets of its part
        crop = targets(0, start, start + 0.4)
        assert torch.equal(crop, whole[round(start * 10) : round(start * 10) + 4])
    assert not targets(0, 0.95, 1.05).any()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_median_filter_is_scipys(steps):
    scores = np.random.default_rng(0).random((40, 3))
    width = 2 * (steps // 2) + 1
    expected = scipy_median(scores, size=(width, 1), mode="nearest")
    np.testing.assert_array_equal(median_filter(scores, steps * 0.04, 0.04), expected)


def test_decoding_is_the_inverse_of_targets():
    rng = np.random.default_rng(1)
    truth = []
    for label in ("a", "b"):
        edges = np.sort(rng.choice(np.arange(0, 250), 12, replace=False)) * 0.04
        truth += [Event(float(i), float(j), label) for i, j in edges.reshape(-1, 2)]
    targets = EventTargets([truth], ["a", "b"], downsample_rate=640)(0, 0.0, 10.0)
    found = decode(targets.numpy(), ["a", "b"], 0.04, Decoding(), seconds=10.0)
    assert len(found) == len(truth) == 12
    for event, known in zip(found, sorted(truth)):
        assert event.label == known.label
        assert event[:2] == pytest.approx(known[:2])


def test_each_label_has_its_threshold():
    scores = np.array([[0.3, 0.3], [0.6, 0.6]])
    found = decode(scores, ["a", "b"], 1.0, Decoding([0.2, 0.5]), seconds=2.0)
    assert found == [Event(0.0, 2.0, "a"), Event(1.0, 2.0, "b")]
