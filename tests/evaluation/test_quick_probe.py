"""The probe measures what it says, on label sets of both forms, and bad files do not stop it."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa.data.demo import make_demo_corpus
from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.evaluation.logmel import logmel_statistics
from speechbrain_jepa.evaluation.quick_probe import (
    ProbeTable,
    embed_files,
    probe,
    probe_table,
    quick_probe,
    read_label_sets,
)
from speechbrain_jepa.features import LogMelSpectrogram


def clusters(rows, dims, classes, distance, seed=0):
    """Gaussian clouds, one a class, at fixed random centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, distance, (classes, dims))
    y = rng.integers(classes, size=rows)
    return (centres[y] + rng.normal(size=(rows, dims))).astype(np.float32), y


# -- the regression ----------------------------------------------------------------------------


def test_probe_equals_plain_regression_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = clusters(300, 160, 5, 0.1)
    test_x, test_y = clusters(400, 160, 5, 0.1, seed=1)
    scaler = StandardScaler().fit(x)
    plain = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(x), y)
    expected = plain.score(scaler.transform(test_x), test_y)
    assert 0.3 < expected < 0.95  # neither chance, 0.2, nor saturated
    assert probe(x, y, test_x, test_y) == pytest.approx(expected, abs=0.006)


def test_more_dims_than_rows_is_the_same_regression():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = clusters(120, 480, 4, 0.06)
    test_x, test_y = clusters(400, 480, 4, 0.06, seed=1)
    scaler = StandardScaler().fit(x)
    plain = LogisticRegression(C=16 / 480, max_iter=1000).fit(scaler.transform(x), y)
    expected = plain.score(scaler.transform(test_x), test_y)
    assert 0.3 < expected < 0.95
    assert probe(x, y, test_x, test_y) == pytest.approx(expected, abs=0.006)


def test_scale_and_offset_of_features_do_not_matter():
    x, y = clusters(200, 30, 4, 0.4)
    test_x, test_y = clusters(200, 30, 4, 0.4, seed=1)
    scale, offset = np.geomspace(1e-3, 1e3, 30), np.linspace(-5, 5, 30)
    plain = probe(x, y, test_x, test_y)
    assert probe(x * scale + offset, y, test_x * scale + offset, test_y) == pytest.approx(plain)


def test_constant_features_are_ignored():
    x, y = clusters(200, 30, 4, 0.5)
    constant = np.full((200, 3), 7.0)
    wide = np.concatenate([x, constant], 1)
    assert probe(wide[:100], y[:100], wide[100:], y[100:]) > 0.5


def test_a_label_that_train_lacks_counts_as_an_error():
    x = np.array([[0.0], [1.0], [0.0], [1.0]])
    assert probe(x, list("abab"), x, list("abac")) == 0.75


def test_features_that_are_not_finite_are_an_error():
    x, y = clusters(20, 5, 2, 1.0)
    bad = x.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 20 test embeddings"):
        probe(x, y, bad, y)


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match="one class"):
        probe(np.zeros((3, 2)), list("aaa"), np.zeros((1, 2)), ["a"])


# -- label sets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo_corpus(tmp_path_factory.mktemp("demo") / "demo", clips_per_sound=8)


def test_demo_corpus_has_four_label_sets_without_their_empty_rows(demo):
    sets = read_label_sets(demo)
    assert list(sets) == ["sound", "pitch", "melody", "rhythm"]
    assert len(sets["sound"].files) == 16 * 8
    assert all(all(task.labels) and len(task.files) == len(task.splits) for task in sets.values())
    assert not set(sets["pitch"].files) & set(sets["melody"].files)


def test_a_folder_of_tasks_gives_one_label_set_each_named_after_its_folder(tmp_path):
    for name in ("music", "birds"):
        (tmp_path / name).mkdir()
        rows = "file,label,split\nx.wav,a,train\ny.wav,b,valid\nz.wav,a,test\n"
        (tmp_path / name / "meta.csv").write_text(rows)
    sets = read_label_sets(tmp_path)
    assert list(sets) == ["birds", "music"]
    assert sets["birds"].files[0] == str(tmp_path / "birds" / "x.wav")
    assert sets["birds"].splits == ["train", "valid", "test"]


def test_two_label_sets_of_one_name_and_folds_are_errors(tmp_path):
    for name in ("music", "birds"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.csv").write_text("file,pitch,split\nx,a,train\nz,a,test\n")
    with pytest.raises(ValueError, match="one name, pitch"):
        read_label_sets(tmp_path)
    (tmp_path / "meta.csv").write_text("file,pitch,fold\nx,a,0\nz,a,1\n")
    with pytest.raises(ValueError, match="has folds"):
        read_label_sets(tmp_path)


def test_a_folder_without_tables_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no meta\.csv"):
        read_label_sets(tmp_path)


# -- audio and embeddings ----------------------------------------------------------------------


def test_files_that_cannot_be_read_are_skipped_with_a_line_each(tmp_path, caplog):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "good.wav", rng.normal(0, 0.1, 16_000), 16_000)
    soundfile.write(tmp_path / "short.wav", rng.normal(0, 0.1, 100), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(16_000, np.nan), 16_000, "FLOAT")
    (tmp_path / "text.wav").write_text("no audio")
    names = ["good.wav", "short.wav", "nan.wav", "text.wav", "missing.wav"]
    files = [tmp_path / name for name in names]
    with caplog.at_level(logging.WARNING):
        features, read = embed_files(files, {"log-mel": [logmel_statistics]})
    assert read == files[:1] and features["log-mel"][0].shape == (1, 160)
    skipped = [record.getMessage() for record in caplog.records]
    assert len(skipped) == 4
    assert all(str(file) in line for file, line in zip(files[1:], skipped))


def test_no_readable_file_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="none of 1 files"):
        embed_files([tmp_path / "missing.wav"], {"log-mel": [logmel_statistics]})


def test_each_file_is_embedded_once_by_every_embedder(demo):
    calls = []

    def count(wavs):
        calls.append(len(wavs))
        return np.zeros((len(wavs), 1))

    files = [file for task in read_label_sets(demo).values() for file in task.files]
    features, read = embed_files(files, {"a": [count, count]})
    assert len(files) > len(read) == 16 * 8
    assert sum(calls) == 2 * len(read)
    assert [x.shape for x in features["a"]] == [(128, 1)] * 2


def test_logmel_statistics_are_over_the_clips_own_frames():
    long, short = torch.randn(16_000), torch.randn(8_000)
    spectrogram = LogMelSpectrogram()(short[None])[0].numpy()
    expected = np.concatenate([spectrogram.mean(1), spectrogram.std(1)])
    rows = logmel_statistics([long.numpy(), short.numpy()])
    np.testing.assert_allclose(rows[1], expected, rtol=1e-4, atol=1e-5)


# -- the table ---------------------------------------------------------------------------------


def two_tasks():
    files = [f"{i}.wav" for i in range(8)]
    splits = ["train"] * 4 + ["test"] * 4
    parity = LabelledClips(files, files, list("abababab"), splits, [None] * 8)
    half = LabelledClips(files, files, list("aabbaabb"), splits, [None] * 8)
    return files, {"parity": parity, "half": half}


def test_table_averages_seeds_and_label_sets():
    files, tasks = two_tasks()
    parity = np.array([[0.0], [1.0]] * 4)
    half = np.array([[0.0], [0.0], [1.0], [1.0]] * 2)
    features = {"untrained": [parity, parity], "trained": [np.hstack([parity, half])] * 2}
    table = probe_table(features, files, tasks)
    average = table.with_average["average"].groupby(level=0).mean()
    assert table.accuracy.loc[("trained", 0)].tolist() == [100, 100]
    assert average["trained"] == 100 and average["untrained"] == 75
    assert table.gain() == (25, 0)


def table_of(untrained, trained):
    import pandas as pd

    index = pd.MultiIndex.from_tuples(
        [("untrained", i) for i in range(len(untrained))]
        + [("trained", i) for i in range(len(trained))]
    )
    return ProbeTable(pd.DataFrame({"sound": [*untrained, *trained]}, index=index))


def test_verdict_is_in_units_of_the_larger_deviation_between_seeds():
    table = table_of([49.0, 50.0, 51.0], [58.0, 60.0, 62.0])  # deviations 1 and 2
    assert table.gain() == (pytest.approx(10), pytest.approx(2))
    assert "+10.0 points" in table.verdict() and "5.0 times" in table.verdict()


def test_the_deviation_is_of_the_row_that_has_seeds():
    gain, deviation = table_of([49.0, 51.0], [60.0]).gain()
    assert gain == pytest.approx(10) and deviation == pytest.approx(2**0.5)


def test_a_single_seed_says_that_it_has_no_deviation():
    table = table_of([50.0], [60.0])
    assert "single seed" in table.verdict()
    assert "60.0" in str(table) and "nan" not in str(table).lower()


def test_rows_of_files_that_could_not_be_read_are_left_out():
    files, tasks = two_tasks()
    table = probe_table(
        {"x": [np.array([[0.0], [1.0]] * 3)]}, files[:6], {"parity": tasks["parity"]}
    )
    assert table.accuracy.loc[("x", 0), "parity"] == 100
    with pytest.raises(ValueError, match="parity: no test file"):
        probe_table({"x": [np.zeros((4, 1))]}, files[:4], {"parity": tasks["parity"]})


def test_quick_probe_of_the_demo_corpus_beats_chance_and_reads_no_valid_file(demo, tmp_path):
    seen = []

    def level(wavs):
        seen.append(len(wavs))
        return np.array([[np.std(wav)] for wav in wavs])

    table = quick_probe(demo, {"level": [level]})
    assert list(table.accuracy) == ["sound", "pitch", "melody", "rhythm"]
    assert table.accuracy.loc[("log-mel statistics", 0), "sound"] > 3 * 100 / 16
    assert sum(seen) == sum(split != "valid" for split in read_label_sets(demo)["sound"].splits)
