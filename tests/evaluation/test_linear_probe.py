"""The probe against known answers, against scikit-learn and against itself one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from speechbrain_jepa.evaluation.labelled import Features, LabelledClips
from speechbrain_jepa.evaluation.linear_probe import Protocol, adam, logistic, metrics, probe

SPLITS = ["train"] * 6 + ["valid"] + ["test"] * 3
FAST = Protocol(learning_rate=3e-3, batch_size=32, epochs=40, neighbours=0, precision="fp32")


def task(count, dims, classes, distance, folds=0, seed=0, layers=1, multilabel=False):
    """Gaussian clouds at random centres: features and clips."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % classes
    centres = rng.normal(0, distance, (classes, dims))
    x = np.stack([centres[label] + rng.normal(size=(count, dims)) for _ in range(layers)])
    names = np.arange(count).astype(str).tolist()
    order = rng.permutation(count)
    clips = LabelledClips(
        names,
        names,
        [f"c{number}" for number in label],
        [""] * count if folds else [SPLITS[place % 10] for place in order],
        (order % folds).tolist() if folds else [None] * count,
        multilabel,
    )
    features = Features(x.astype(np.float32), np.ones(count, bool), list(range(layers)), None)
    return features, clips


def scores(outcomes):
    return [outcome.score for outcome in outcomes]


# -- known answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["paper", "sweep", "logistic"])
def test_separable_classes_are_told_apart_without_an_error(kind):
    features, clips = task(200, 12, 4, distance=10.0)
    protocol = replace(FAST, probe=kind, neighbours=5, learning_rates=(1e-3, 1e-2))
    for outcome in probe(features, clips, [0, 1], protocol):
        assert outcome.score == 1 and outcome.neighbours_score == 1
        assert outcome.class_scores.tolist() == [1] * 4


@pytest.mark.parametrize("kind", ["paper", "logistic"])
def test_random_labels_are_told_apart_by_chance(kind):
    features, clips = task(2000, 10, 4, distance=0.0, folds=5)
    found = scores(probe(features, clips, [0], replace(FAST, probe=kind, epochs=10)))
    # 2000 clips are tested: the deviation of chance is sqrt(0.25 * 0.75 / 2000) = 0.0097
    assert np.mean(found) == pytest.approx(0.25, abs=4 * 0.0097)


def plain_loop(features, clips, outcome, protocol, dims=12):
    """EVAR's training, written out: its state when it ends, best score, epochs."""
    rows, x = outcome.trial.rows, features.array[0]
    mean, deviation = x[rows.train].mean(0), x[rows.train].std(0)
    x = torch.from_numpy((x - mean) / deviation)
    model = torch.nn.Linear(dims, len(clips.classes))
    bound, shape = 1 / dims**0.5, (len(clips.classes), dims + 1)
    start = adam._random(outcome.trial, adam.INIT).uniform(-bound, bound, shape)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start[:, :-1]))
        model.bias.copy_(torch.from_numpy(start[:, -1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.learning_rate)
    best, waited, scores = 0.0, 0, []
    while len(scores) < protocol.epochs and waited < protocol.patience:
        order = adam._random(outcome.trial, adam.ORDER, len(scores))
        order = rows.train[order.permutation(len(rows.train))]
        for part in np.array_split(
            order, range(protocol.batch_size, len(order), protocol.batch_size)
        ):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), clips.targets[part]).backward()
            optimizer.step()
        hits = model(x[rows.valid]).argmax(1) == clips.targets[rows.valid]
        scores.append(hits.float().mean().item())
        waited += 1
        if scores[-1] >= best:  # EarlyStopping of EVAR's torch_mlp_clf2.py: ties count
            best, waited = scores[-1], 0
            state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, best, scores


def test_paper_probe_equals_a_plain_torch_loop():
    features, clips = task(200, 12, 4, distance=0.5)
    protocol = replace(FAST, epochs=15, patience=15)
    outcome = probe(features, clips, [3], protocol)[0]
    state, best, scores = plain_loop(features, clips, outcome, protocol)
    torch.testing.assert_close(outcome.weight, state["weight"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcome.bias, state["bias"], rtol=1e-4, atol=1e-5)
    assert outcome.valid_score == pytest.approx(best) and outcome.epochs == len(scores)


def test_a_tie_resets_the_patience_and_the_last_of_the_best_is_kept():
    features, clips = task(200, 12, 4, distance=0.1)
    protocol = replace(FAST, epochs=60, patience=5)
    outcome = probe(features, clips, [0], protocol)[0]
    state, best, scores = plain_loop(features, clips, outcome, protocol)
    last = len(scores) - 1 - scores[::-1].index(best)
    assert scores.index(best) < last < 60 - 1 - 5  # it ties and it stops
    assert outcome.epochs == len(scores) == last + 1 + 5
    torch.testing.assert_close(outcome.weight, state["weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [20, 400])  # fewer and more than clips
def test_logistic_probe_is_within_a_point_of_scikit_learn(dims):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, clips = task(600, dims, 5, distance=0.9 / dims**0.5, folds=3)
    protocol = Protocol("logistic", inverse_penalties=(0.01,), neighbours=0)
    outcomes = probe(features, clips, [0], protocol)
    expected = []
    for outcome in outcomes:
        rows, x, y = outcome.trial.rows, features.array[0], clips.targets.numpy()
        scaler = StandardScaler().fit(x[rows.train])
        model = LogisticRegression(C=0.01, max_iter=1000)
        model.fit(scaler.transform(x[rows.train]), y[rows.train])
        expected.append(model.score(scaler.transform(x[rows.test]), y[rows.test]))
        torch.testing.assert_close(
            outcome.weight, torch.from_numpy(model.coef_).float(), rtol=0.05, atol=2e-3
        )
    assert 0.25 < np.mean(expected) < 0.95
    assert np.mean(scores(outcomes)) == pytest.approx(np.mean(expected), abs=0.01)


def test_features_of_any_scale_and_constant_ones_make_no_difference():
    features, clips = task(300, 10, 3, distance=0.5, folds=3)
    x = features.array[0]
    scaled = x * np.geomspace(1e-2, 1e2, 10) + 7
    wide = np.concatenate([scaled, np.full((300, 2), 3.0)], 1).astype(np.float32)
    protocol = Protocol("logistic", inverse_penalties=(0.01,), neighbours=0)
    plain = scores(probe(features, clips, [0], protocol))
    again = scores(probe(replace(features, array=wide[None]), clips, [0], protocol))
    assert again == pytest.approx(plain, abs=0.011)  # one clip of a hundred


# -- together and one by one -------------------------------------------------------------------


def test_trials_come_out_the_same_together_and_one_by_one():
    features, clips = task(230, 16, 3, distance=0.4, folds=3, layers=2)
    together = probe(features, clips, [0, 1], FAST)
    alone = [
        outcome
        for layer in range(2)
        for seed in (0, 1)
        for outcome in probe(
            replace(features, array=features.array[layer][None]), clips, [seed], FAST
        )
    ]
    assert len(together) == 12
    assert len({outcome.epochs for outcome in together}) > 1  # they stop at different times
    for mine, other in zip(together, alone):
        assert (mine.score, mine.epochs) == (other.score, other.epochs)
        torch.testing.assert_close(mine.weight, other.weight, rtol=0, atol=1e-6)


def test_learning_rates_come_out_the_same_together_and_one_by_one():
    features, clips = task(200, 16, 3, distance=0.4)
    sweep = replace(FAST, probe="sweep", learning_rates=(1e-4, 1e-2), weight_decays=(0.0, 0.1))
    together = probe(features, clips, [0], sweep)[0]
    alone = [
        probe(features, clips, [0], replace(sweep, learning_rates=[rate], weight_decays=[decay]))[0]
        for rate in (1e-4, 1e-2)
        for decay in (0.0, 0.1)
    ]
    (best,) = [outcome for outcome in alone if outcome.variant == together.variant]
    assert best.valid_score == max(outcome.valid_score for outcome in alone)
    torch.testing.assert_close(together.weight, best.weight, rtol=0, atol=1e-6)


def test_features_read_from_the_disk_give_what_those_in_memory_give():
    features, clips = task(200, 16, 3, distance=0.4, folds=2)
    in_memory = probe(features, clips, [0], FAST)
    streamed = probe(features, clips, [0], replace(FAST, memory_gb=1e-6))
    for mine, other in zip(in_memory, streamed):
        torch.testing.assert_close(mine.weight, other.weight, rtol=0, atol=1e-5)
    logistic = Protocol("logistic", neighbours=0)
    mine, other = (
        probe(features, clips, [0], replace(logistic, memory_gb=size)) for size in (None, 1e-6)
    )
    assert scores(mine) == pytest.approx(scores(other), abs=0.011)


def test_products_in_bf16_change_little():
    features, clips = task(1000, 64, 4, distance=0.2, folds=2)
    exact = scores(probe(features, clips, [0], FAST))
    rough = scores(probe(features, clips, [0], replace(FAST, precision="bf16")))
    assert rough == pytest.approx(exact, abs=0.02)


def test_threads_of_the_process_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        features, clips = task(100, 8, 2, distance=1.0, folds=2)
        threaded = probe(features, clips, [0, 1], FAST)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert scores(threaded) == scores(probe(features, clips, [0, 1], FAST))


# -- stopping, labels, errors ------------------------------------------------------------------


def test_several_labels_of_a_clip_are_scored_by_mean_average_precision():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    truth = rng.random((300, 3)) < 0.4
    truth[~truth.any(1), 0] = True
    x = (truth @ rng.normal(size=(3, 12)) + rng.normal(0, 0.8, (300, 12))).astype(np.float32)
    names = np.arange(300).astype(str).tolist()
    labels = [";".join(f"c{k}" for k in np.flatnonzero(row)) for row in truth]
    clips = LabelledClips(
        names, names, labels, [SPLITS[i % 10] for i in range(300)], [None] * 300, True
    )
    features = Features(x[None], np.ones(300, bool), [-1], None)
    for kind in ("paper", "logistic"):
        outcome = probe(features, clips, [0], replace(FAST, probe=kind))[0]
        rows = outcome.trial.rows
        mean, deviation = x[rows.train].mean(0), x[rows.train].std(0)
        logits = (
            torch.from_numpy((x[rows.test] - mean) / deviation) @ outcome.weight.T + outcome.bias
        )
        expected = average_precision_score(truth[rows.test], logits.numpy(), average=None)
        np.testing.assert_allclose(outcome.class_scores, expected, atol=1e-4)
        assert 0.6 < outcome.score < 1
    assert outcome.neighbours_score is None


def test_average_precision_and_recall_of_a_class_without_a_clip_are_nan():
    logits = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    found = metrics.average_precisions(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert found[0] == 0.5 and np.isnan(found[1])
    found = metrics.recalls(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]), 2)
    assert found[0] == pytest.approx(2 / 3) and np.isnan(found[1])


def test_a_penalty_comes_out_the_same_from_zero_and_from_the_optimum_of_another():
    features, clips = task(200, 12, 4, distance=0.5)
    blocks = [(torch.from_numpy(features.array[0]), clips.targets)]
    zero = logistic.regress(blocks, 4, 0.1)
    other = logistic.regress(blocks, 4, 0.1, start=logistic.regress(blocks, 4, 0.001))
    torch.testing.assert_close(zero[0], other[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"probe": "mlp"}, "choose one of paper, sweep, logistic"),
        ({"precision": "int8"}, "choose one of fp32, bf16, auto"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_a_protocol_that_is_none_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**wrong)


def test_one_class_is_an_error():
    features, clips = task(20, 4, 1, distance=1.0, folds=2)
    with pytest.raises(ValueError, match="two or more"):
        probe(features, clips)
