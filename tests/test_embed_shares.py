"""Embedding in shares: jobs of a queue, processes of torchrun; joined, they are the single run."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa import AudioJEPA, embed
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.clips import find_audio
from speechbrain_jepa.data.shares import Share
from speechbrain_jepa.embed_ray import EncoderActor, decode
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.embedding_parts import Embeddings
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.files import folder_lock
from speechbrain_jepa.throughput import STAGES, Spent
from speechbrain_jepa.vit import Encoder, PatchGrid

NUMBER = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    return save_pretrained(tmp_path_factory.mktemp("model") / "p", encoder, Normalization(-7, 4))


@pytest.fixture
def audio(tmp_path, monkeypatch):
    """Fourteen files of different lengths in two folders, and one that cannot be read.

    The folder's name is relative: which file is in which share follows from it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(14):
        place = tmp_path / "audio" / f"{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        wav = rng.normal(0, 0.1, int(rng.integers(300, 40_000)))
        soundfile.write(place / f"{number}.flac", wav, 16_000)
    (tmp_path / "audio" / "broken.flac").write_bytes(b"fLaC, or so it says")
    return Path("audio")


def run(folder, audio, out, *options):
    embed.main([str(folder), str(audio), "--out", str(out), *options])


def skipped_lines(out):
    with open(out.with_suffix(".skipped.csv"), newline="") as file:
        return list(csv.DictReader(file))


def assert_same(out, whole, audio):
    """The same files in the same order, each once, with the same rows."""
    joined, single = read_embedded(out), read_embedded(whole)
    assert joined.files == single.files and len(joined) == 14
    assert joined.files == [file for file in find_audio(audio) if "broken" not in file]
    np.testing.assert_allclose(joined.vectors, single.vectors, rtol=1e-4, atol=1e-5)
    assert skipped_lines(out) == skipped_lines(whole)
    assert joined.settings == single.settings


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_joined_shares_are_the_single_run(ending, level, folder, audio, tmp_path, capsys):
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"emb{ending}"
    options = ("--level", level, "--normalization", "dataset")
    run(folder, audio, whole, *options)
    files = find_audio(audio)
    for index in (2, 0, 1):
        capsys.readouterr()
        run(folder, audio, out, *options, "--shard", f"{index}/{NUMBER}")
        own = [file for file in files if Share(index, NUMBER).has(file) and "broken" not in file]
        assert 0 < len(own) < 14
        assert f"{len(own)} files embedded in share {index}/{NUMBER}" in capsys.readouterr().out
        assert not out.exists()
    run(folder, audio, out, *options, "--join")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"14 files, 0\.0 hours of audio in .*, 3 processes; bottleneck, \d+ %", last)
    assert any(last.endswith(text) for text in STAGES.values())
    assert_same(out, whole, audio)
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(SystemExit, match="exists already"):
        run(folder, audio, out, *options, "--shard", f"0/{NUMBER}")


class Interrupted(Exception):
    pass


def test_an_interrupted_share_goes_on_where_it_was(folder, audio, tmp_path, monkeypatch):
    out, encoded = tmp_path / "emb.npy", []
    own = [file for file in find_audio(audio) if Share(0, 2).has(file) and "broken" not in file]
    real = AudioJEPA.embed

    def encode(self, wav, wav_lens):
        if len(encoded) == 2:
            raise Interrupted
        encoded.extend(range(len(wav)))
        return real(self, wav, wav_lens)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(AudioJEPA, "embed", encode)
        run(folder, audio, out, "--shard", "0/2", "--batch_seconds", "0.001")
    with pytest.raises(SystemExit, match=r"of 2 shares 2 are missing .* --shard 0/2, 1/2$"):
        run(folder, audio, out, "--join")
    counted = []
    monkeypatch.setattr(AudioJEPA, "embed", lambda *args: counted.extend(args[1]) or real(*args))
    run(folder, audio, out, "--shard", "0/2")
    assert len(counted) == len(own) - 2
    run(folder, audio, out, "--shard", "0/2")  # complete: nothing is embedded again
    assert len(counted) == len(own) - 2


def test_join_names_what_is_not_there(folder, audio, tmp_path):
    out = tmp_path / "emb.npy"
    with pytest.raises(SystemExit, match="holds no shares: embed them with --shard 0/n"):
        run(folder, audio, out, "--join")
    run(folder, audio, out, "--shard", "1/2")
    with pytest.raises(SystemExit, match=r"of 2 shares 1 are missing or unfinished.*--shard 0/2$"):
        run(folder, audio, out, "--join")
    with pytest.raises(SystemExit, match="was begun in shares: embed each"):
        run(folder, audio, out)
    with pytest.raises(SystemExit, match="begun with flat=False, not True"):
        run(folder, audio, out, "--shard", "1/2", "--flat")
    run(folder, audio, out, "--shard", "0/2")
    late = audio / "late.flac"
    soundfile.write(late, np.full(9_000, 0.1), 16_000)
    index = int(Share(1, 2).has(str(late)))
    with pytest.raises(SystemExit, match=rf"1 files are in no share, .*late.*--shard {index}/2$"):
        run(folder, audio, out, "--join")
    run(folder, audio, out, "--shard", f"{index}/2")
    run(folder, audio, out, "--join")
    assert len(np.load(out)) == 15


def test_shares_of_another_number_and_a_second_process_are_refused(folder, audio, tmp_path):
    out = tmp_path / "emb.npy"
    run(folder, audio, out, "--shard", "0/2")
    with pytest.raises(SystemExit, match="holds shares of 2 and of 3"):
        run(folder, audio, out, "--shard", "0/3")
    share = tmp_path / "emb.npy.parts" / Share(1, 2).folder
    with (
        folder_lock(share, fix=""),
        pytest.raises(SystemExit, match=f"in use by process {os.getpid()} .* another --shard"),
    ):
        run(folder, audio, out, "--shard", "1/2")
    with pytest.raises(SystemExit, match="--shard and --join: choose one"):
        run(folder, audio, out, "--shard", "1/2", "--join")


def test_the_bottleneck_is_the_stage_that_took_longest():
    for stage, text in STAGES.items():
        times = {name: 1.0 for name in STAGES} | {stage: 3.0}
        said = Spent(files=2, audio=7200, whole=6.0, **times).sentence()
        assert (
            said
            == f"2 files, 2.0 hours of audio in 0.1 minutes; bottleneck, 50 % of the time: {text}"
        )
    together = Spent()
    together.sum_of([Spent(files=1, whole=2.0), Spent(files=2, whole=3.0)])
    assert (together.files, together.whole, together.processes) == (3, 5.0, 2)


def test_a_part_that_a_cluster_writes_twice_is_there_once(folder, audio, tmp_path):
    whole, out, parts = tmp_path / "whole.npy", tmp_path / "emb.npy", tmp_path / "emb.npy.parts"
    run(folder, audio, whole)
    model = AudioJEPA(folder)
    parts.mkdir()
    embeddings = Embeddings(out, parts, {})
    actor = EncoderActor(model, str(parts), "clip", "fp32", 4.0)
    files = find_audio(audio)
    decoded = [decode({"file": os.fsencode(f), "path": os.fsencode(f)}) for f in files]
    for half in (decoded[:8], decoded[8:], decoded[:8]):  # the first once more, as after a loss
        rows = {name: np.array([row[name] for row in half], object) for name in half[0]}
        (said,) = actor(rows)["done"]
        spent, failed = json.loads(said)
        assert spent["files"] + len(failed) == len(half)
        assert all("broken" in file for file, _ in failed)
    assert len(list(parts.glob("part-*.npz"))) == 2
    embeddings.take_in(parts)
    assert embeddings.finish(files, None) == [file for file in files if "broken" not in file]
    np.testing.assert_allclose(np.load(out), np.load(whole), rtol=1e-4, atol=1e-5)


def test_two_processes_of_torchrun_write_one_output(folder, audio, tmp_path):
    whole, out = tmp_path / "whole.npy", tmp_path / "emb.npy"
    run(folder, audio, whole)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "speechbrain_jepa.embed", str(folder), str(audio), "--out", str(out)]
    process = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()
    assert said[0] == f"14 files embedded in {out}" and ", 2 processes; bottleneck" in said[-1]
    assert_same(out, whole, audio)
