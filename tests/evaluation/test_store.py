"""Encoders by name, labelled clips, and embeddings that are computed once."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation import store
from speechbrain_jepa.evaluation.fixed_clips import read_fixed
from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.evaluation.sources import load_source
from speechbrain_jepa.evaluation.store import embed_once
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid


def tiny(seed=0):
    torch.manual_seed(seed)
    return Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save_pretrained(
        tmp_path_factory.mktemp("encoder") / "tiny", tiny(), Normalization(-7, 4)
    )


def embed(source, clips, folder, **options):
    return embed_once(source, clips, 1.0, folder, num_workers=1, progress=False, **options)


def count_calls(source):
    embedded = []
    original = source.layer_means
    source.layer_means = lambda wav: embedded.append(len(wav)) or original(wav)
    return embedded


# -- encoders ----------------------------------------------------------------------------------


def test_a_folder_gives_what_audio_jepa_gives(pretrained):
    wav = torch.randn(2, 40_000)
    model = AudioJEPA(pretrained, output_all_hiddens=True)
    source = load_source(pretrained, all_layers=True, normalization="pretraining")
    assert source.name == "tiny"
    torch.testing.assert_close(source.embed(wav), model.embed(wav))
    last = load_source(pretrained, normalization="pretraining").embed(wav)
    torch.testing.assert_close(last[0], model.embed(wav)[-1])


def test_an_untrained_encoder_has_the_shape_of_its_folder_and_weights_of_its_seed(pretrained):
    wav = torch.randn(1, 16_000)
    sources = [
        load_source(name, normalization="pretraining", seed=seed)
        for name, seed in (
            (pretrained, 0),
            (f"random:{pretrained}", 0),
            (f"random:{pretrained}", 1),
        )
    ]
    found = [source.embed(wav) for source in sources]
    assert all(x.shape == (1, 1, 240) for x in found)
    assert len({json.dumps(source.fingerprint()) for source in sources}) == 3
    assert not torch.allclose(found[1], found[2])


@pytest.mark.parametrize("name", ["no_such_encoder", "s3prl:no_such_upstream", "hf:no/such"])
def test_an_encoder_that_is_not_there_is_named_with_what_to_do(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        (ImportError, ValueError, FileNotFoundError), match=r"pip install|there is no|no such"
    ):
        load_source(name)


# -- the store ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
def test_embeddings_are_those_of_the_clips_with_the_normalisation_of_the_data_set(
    clips, pretrained, tmp_path, dtype, tolerance
):
    features = embed(load_source(pretrained), clips, tmp_path / "store", dtype=dtype)
    ((_, wavs),) = read_fixed(clips, range(8), 1.0)
    model = AudioJEPA(pretrained, normalization="dataset").fit_normalization([wavs[:5]])
    assert features.array.shape == (1, 8, 240) and features.array.dtype == dtype
    np.testing.assert_allclose(features.array[0], model.embed(wavs), rtol=tolerance, atol=tolerance)
    pair = json.loads((features.folder / "normalization.json").read_text())
    assert pair["mean"] == pytest.approx(model.normalization.mean.item())


def test_a_layer_by_number_is_that_of_all_layers(clips, pretrained, tmp_path):
    source = load_source(pretrained, all_layers=True)
    every = embed(source, clips, tmp_path, layer="all")
    first = embed(source, clips, tmp_path, layer=1)
    assert every.layers == [0, 1, 2] and first.layers == [1]
    np.testing.assert_array_equal(every.array[1], first.array[0])
    with pytest.raises(ValueError, match="layers 0 to 2"):
        embed(source, clips, tmp_path, layer=3)


def test_what_is_there_is_read_not_computed(clips, tmp_path):
    first = embed(load_source("logmel"), clips, tmp_path)
    source = load_source("logmel")
    calls = count_calls(source)
    again = embed(source, clips, tmp_path)
    assert calls == [] and first.folder == again.folder
    np.testing.assert_array_equal(first.array, again.array)


def test_another_encoder_setting_or_file_never_reads_stale_embeddings(clips, pretrained, tmp_path):
    folders = [embed(load_source(pretrained), clips, tmp_path).folder]
    save_pretrained(pretrained, tiny(seed=5), Normalization(-7, 4))  # the same name
    folders.append(embed(load_source(pretrained), clips, tmp_path).folder)
    folders.append(embed(load_source(pretrained, normalization="instance"), clips, tmp_path).folder)
    folders.append(embed(load_source(pretrained, precision="bf16"), clips, tmp_path).folder)
    folders.append(embed(load_source(pretrained), clips, tmp_path, crop_seed=1).folder)
    os.utime(clips.files[3], (1, 1))
    folders.append(embed(load_source(pretrained), clips, tmp_path).folder)
    assert len(set(folders)) == len(folders)


def test_other_labels_read_the_same_embeddings(clips, tmp_path):
    other = LabelledClips(clips.ids, clips.files, list("abcdabcd"), clips.splits, clips.folds)
    source = load_source("logmel")
    assert embed(source, clips, tmp_path).folder == embed(source, other, tmp_path).folder


def test_an_interrupted_extraction_goes_on(clips, pretrained, tmp_path):
    expected = embed(load_source(pretrained), clips, tmp_path / "whole")
    source = load_source(pretrained)
    original = source.layer_means

    def interrupted(wav, seen=[]):  # noqa: B006 the list is what is meant
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return original(wav)

    source.layer_means = interrupted
    with pytest.raises(KeyboardInterrupt):
        embed(source, clips, tmp_path / "store", batch_seconds=1.0)
    source = load_source(pretrained)
    calls = count_calls(source)
    features = embed(source, clips, tmp_path / "store", batch_seconds=1.0)
    assert sum(calls) == 8 - 3
    np.testing.assert_allclose(features.array, expected.array, rtol=2e-3, atol=2e-3)


def test_a_broken_file_is_skipped_and_listed(clips, tmp_path):
    with open(clips.files[2], "wb") as file:
        file.write(b"no audio")
    features = embed(load_source("logmel"), clips, tmp_path / "store")
    assert features.usable.tolist() == [True, True, False, True, True, True, True, True]
    assert "2.wav" in (features.folder / "skipped.csv").read_text()
    assert 2 not in np.concatenate([clips.divide(0, features.usable)[0].train])


def test_embeddings_that_are_not_finite_or_too_large_are_an_error(clips, tmp_path):
    source = load_source("logmel")
    source.layer_means = lambda wav: torch.full((1, len(wav), 2), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        embed(source, clips, tmp_path)
    source.layer_means = lambda wav: torch.full((1, len(wav), 2), 1e6)
    with pytest.raises(ValueError, match="use float32"):
        embed(source, clips, tmp_path)
    assert embed(source, clips, tmp_path, dtype="float32").usable.all()


def test_at_most_so_many_clips_measure_the_normalisation(clips, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_NORMALIZATION_CLIPS", 2)
    source = load_source(pretrained)
    seen = []
    fit = source.fit
    source.fit = lambda batches: fit(seen.append(len(wav)) or wav for wav in batches)
    embed(source, clips, tmp_path)
    assert sum(seen) == 2


def test_a_second_evaluation_waits_for_the_embeddings_of_the_first(clips, tmp_path, caplog):
    folder = tmp_path / "store"
    begun, go_on = threading.Event(), threading.Event()
    first, second = load_source("logmel"), load_source("logmel")
    embed_batch = first.layer_means

    def slow(wav):
        begun.set()
        assert go_on.wait(30)
        return embed_batch(wav)

    first.layer_means = slow
    calls = count_calls(second)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as pool:
        one = pool.submit(embed, first, clips, folder, batch_seconds=1.0)
        assert begun.wait(30)
        two = pool.submit(embed, second, clips, folder, batch_seconds=1.0)
        while "waiting for it" not in caplog.text and not two.done():
            time.sleep(0.01)
        go_on.set()
        one, two = one.result(), two.result()
    assert "waiting for it" in caplog.text and str(os.getpid()) in caplog.text
    assert calls == []
    assert one.usable.all() and two.usable.all()
    np.testing.assert_array_equal(one.array, two.array)
    assert {path.name for path in two.folder.iterdir()} >= {"key.json", "features.npy", "rows.npy"}


FILL = """
import sys
import torch
from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.evaluation.sources import load_source
from speechbrain_jepa.evaluation.store import embed_once

source = load_source("logmel")
source.layer_means = lambda wav: torch.ones(1, len(wav), 200_000)  # 3.2 MB of float16 in all
names = [str(number) for number in range(8)]
splits = ["train"] * 5 + ["valid"] + ["test"] * 2
clips = LabelledClips(names, sys.argv[2:], list("abababab"), splits, [None] * 8)
embed_once(source, clips, 1.0, sys.argv[1], progress=False)
"""


def test_a_full_disk_is_one_sentence_and_not_a_bus_error(clips, small_disk):
    command = [sys.executable, "-c", FILL, str(small_disk / "features"), *clips.files]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert f"the disk of {small_disk}/features/logmel" in last and "is full" in last
    assert "3.1 MiB needed" in last
