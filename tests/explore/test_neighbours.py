"""Neighbours are those that numpy finds, near-duplicates those that a slow loop links."""

import numpy as np
import pytest

from speechbrain_jepa import neighbours
from speechbrain_jepa.embedded import Embedded
from speechbrain_jepa.neighbours import ApproximateIndex, near_duplicates, nearest, unit


def cosines(vectors):
    vectors = vectors.astype(np.float64)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


@pytest.fixture
def vectors():
    return np.random.default_rng(1).normal(2, 1, size=(137, 24)).astype(np.float32)


def test_neighbours_are_those_that_numpy_finds(vectors, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 50)  # three blocks, the last one short
    index, cosine = nearest(unit(vectors), unit(vectors), 7, without_self=True)
    expected = cosines(vectors)
    np.fill_diagonal(expected, -np.inf)
    order = np.argsort(-expected, axis=1)[:, :7]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_allclose(cosine, np.take_along_axis(expected, order, 1), atol=1e-6)


def test_a_query_may_be_its_own_neighbour_unless_it_is_told_not_to(vectors):
    index, cosine = nearest(unit(vectors[5:6]), unit(vectors), 1)
    assert index.item() == 5 and cosine.item() == pytest.approx(1, abs=1e-6)


def test_unit_vectors_keep_zero_and_the_smallest_numbers():
    lengths = np.linalg.norm(unit(np.array([[0, 0], [3e-30, 4e-30], [3e30, 4e30]], "f4")), axis=1)
    np.testing.assert_allclose(lengths, [0, 1, 1], rtol=1e-6)


def test_near_duplicates_are_linked_through_each_other():
    angles = np.deg2rad([0, 1, 2, 40, 90, 90.5])  # neighbours of 1 degree and less are linked
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = nearest(vectors, vectors, 3, without_self=True)
    groups = near_duplicates(*found, threshold=np.cos(np.deg2rad(1.1)))
    assert [clips for _, clips in groups] == [[4, 5], [0, 1, 2]]
    assert groups[0][0] == pytest.approx(np.cos(np.deg2rad(0.5)), abs=1e-6)
    assert near_duplicates(*found, threshold=1.0) == []


def test_the_approximate_search_finds_nearly_all_and_keeps_its_graph(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(40, 1, 16)) + 0.5 * rng.normal(size=(40, 50, 16))).reshape(-1, 16)
    path = tmp_path / "emb.npz"
    path.write_bytes(b"as it is")
    embedded = Embedded(path, [str(i) for i in range(2000)], vectors.astype(np.float32))
    queries = unit(embedded.vectors[:100])
    exact, _ = nearest(queries, unit(embedded.vectors), 10)
    index, cosine = ApproximateIndex(embedded).nearest(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, index)])
    assert recall > 0.95
    np.testing.assert_allclose(cosine[:, 0], 1, atol=1e-5)

    def fail(*args):
        raise AssertionError("made again")

    with monkeypatch.context() as patched:
        patched.setattr(ApproximateIndex, "_make", fail)
        again, _ = ApproximateIndex(embedded).nearest(queries, 10)
        np.testing.assert_array_equal(again, index)
        path.write_bytes(b"other embeddings")
        with pytest.raises(AssertionError, match="made again"):
            ApproximateIndex(embedded)
