"""Segments in arrays that processes share, and that are whole or refused."""

import gc
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from scans import paths, synthetic

from speechbrain_jepa.data import (
    Manifest,
)


def test_manifest_survives_disk_and_subsets(tmp_path):
    manifest = synthetic(50)
    manifest.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert paths(loaded) == paths(manifest)
    items = np.array([3, 49, 0, 3])
    subset = loaded.subset(items)
    assert paths(subset) == [manifest.path(item) for item in items]
    assert subset.seconds.tolist() == [1.0] * 4
    subset.save(tmp_path)  # over the files that `loaded` maps
    assert paths(loaded) == paths(manifest)
    assert paths(Manifest.load(tmp_path)) == paths(subset)


def _private_kib():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))


def _touch(manifest):
    gc.collect()  # marks every object, and so copies pages of the parent's heap
    before = _private_kib()
    total = sum(
        len(manifest.path(item)) + int(manifest.length[item]) for item in range(len(manifest))
    )
    return total, _private_kib() - before


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_a_worker_shares_the_manifest_and_stays_flat(tmp_path):
    # 200 000 rows here; benchmarks/data.py measures two million
    rows = synthetic(2_000).subset(np.arange(200_000) % 2_000)
    rows.save(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert len(pickle.dumps(manifest)) < 500  # spawned workers get the folder, not the arrays
    expected = sum(len(manifest.path(item)) + 8_000 for item in range(len(manifest)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        total, private = pool.apply(_touch, (manifest,))
    assert total == expected
    assert private < 4096  # KiB; the paths alone as Python objects would be 20 MiB
