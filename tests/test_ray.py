"""Embedding and preparing on a Ray cluster of two nodes, one of which is lost midway."""

import contextlib
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa import embed
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.shares import share_folders
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.prepare import main as prepare_main
from speechbrain_jepa.vit import Encoder, PatchGrid

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
FILES = 96


@pytest.fixture
def cluster():
    """A head with two CPUs and a node with two more, as Ray counts them."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    try:
        cluster = Cluster(
            initialize_head=True, head_node_args={**size, "include_dashboard": False}, connect=False
        )
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.second = cluster.add_node(**size)
        cluster.wait_for_nodes()
    except Exception as error:  # Ray's nodes have half a minute to start
        ray.shutdown()
        pytest.skip(f"Ray does not start here: {error}")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_lost_midway_loses_nothing_and_doubles_nothing(cluster, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    folder = save_pretrained(tmp_path / "model", encoder, Normalization(-7, 4))
    audio = tmp_path / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for number in range(FILES):
        soundfile.write(audio / f"{number:03d}.wav", rng.normal(0, 0.1, 30_000), 16_000)
    (audio / "bad.wav").write_bytes(b"RIFF, or so it says")
    whole, out = tmp_path / "whole.npy", tmp_path / "emb.npy"
    command = [str(folder), str(audio), "--out"]
    embed.main([*command, str(whole)])

    lost = []

    def lose_a_node():
        parts = tmp_path / "emb.npy.parts"
        with contextlib.suppress(FileNotFoundError):
            while not list(parts.glob("part-*.npz")):
                if out.exists():
                    return
                time.sleep(0.01)
        cluster.remove_node(cluster.second, allow_graceful=False)
        lost.append(not out.exists())

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    embed.main([*command, str(out), "--engine", "ray", "--address", "auto"])
    thread.join()
    assert lost == [True]  # while it was at work
    joined, single = read_embedded(out), read_embedded(whole)
    assert joined.files == single.files and len(joined) == FILES
    np.testing.assert_allclose(joined.vectors, single.vectors, rtol=1e-4, atol=1e-5)
    skipped = out.with_suffix(".skipped.csv").read_text()
    assert skipped == whole.with_suffix(".skipped.csv").read_text() and "bad.wav" in skipped
    assert "bottleneck" in capsys.readouterr().out.splitlines()[-1]

    # what is left of the cluster prepares the same files
    prepared = tmp_path / "prepared"
    options = ["--num_threads", "1", "--shares", "3", "--engine", "ray", "--address", "auto"]
    prepare_main(["--data_folder", str(audio), "--out", str(prepared), *options])
    assert f"{prepared} is complete: {FILES} segments" in capsys.readouterr().out
    assert len(share_folders(prepared)) == 3
