"""Encoders by name, labelled clips, and embeddings that are computed once."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation import store
from speechbrain_jepa.evaluation.labelled import (
    LabelledClips,
    fixed_length,
    read_fixed,
    read_manifest,
)
from speechbrain_jepa.evaluation.sources import load_source
from speechbrain_jepa.evaluation.store import embed_once
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

SPLITS = ["train"] * 5 + ["valid"] + ["test"] * 2


def tiny(seed=0):
    torch.manual_seed(seed)
    return Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save_pretrained(
        tmp_path_factory.mktemp("encoder") / "tiny", tiny(), Normalization(-7, 4)
    )


@pytest.fixture
def clips(tmp_path):
    """Eight clips of noise, 0.5 to 4 s; they are 1 s for the encoder."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(8):
        names.append(f"{number}.wav")
        wav = rng.normal(0, 0.02 * (number + 1), 8_000 * (number + 1))
        soundfile.write(tmp_path / names[-1], wav, 16_000)
    return LabelledClips(
        names, [str(tmp_path / name) for name in names], list("abababab"), SPLITS, [None] * 8
    )


def embed(source, clips, folder, **options):
    return embed_once(source, clips, 1.0, folder, num_workers=1, progress=False, **options)


def count_calls(monkeypatch, source):
    embedded = []
    original = source.layer_means
    source.layer_means = lambda wav: embedded.append(len(wav)) or original(wav)
    return embedded


# -- clips -------------------------------------------------------------------------------------


def test_training_clips_are_cropped_anywhere_test_clips_at_the_start(clips):
    wavs = {
        row: wav
        for rows, batch in read_fixed(clips, range(8), 1.0)
        for row, wav in zip(rows, batch)
    }
    whole = [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in clips.files]
    assert all(len(wav) == 16_000 for wav in wavs.values())
    assert torch.equal(wavs[7], whole[7][:16_000])
    assert torch.equal(wavs[0], torch.cat([whole[0], torch.zeros(8_000)]))
    assert not torch.equal(wavs[4], whole[4][:16_000])
    starts = {int((whole[4].unfold(0, 100, 1) == wavs[4][:100]).all(1).nonzero()) for _ in range(2)}
    assert len(starts) == 1 and 0 < starts.pop() <= 24_000
    other = {r: w for rows, b in read_fixed(clips, [4], 1.0, crop_seed=1) for r, w in zip(rows, b)}
    assert not torch.equal(other[4], wavs[4])


def test_every_crop_that_fits_can_be_drawn():
    wav = torch.arange(5.0)
    assert {int(fixed_length(wav, 3, draw)[0]) for draw in (0, 0.4, 0.999)} == {0, 1, 2}


def test_clips_of_a_cross_validation_are_cropped_at_the_start(clips):
    folds = LabelledClips(clips.ids, clips.files, clips.labels, [""] * 8, [0, 1] * 4)
    ((_, wavs),) = read_fixed(folds, [4], 1.0)
    assert torch.equal(
        wavs[0], torch.from_numpy(soundfile.read(clips.files[4], dtype="float32")[0])[:16_000]
    )


def test_divisions_do_not_share_a_clip_and_seeds_draw_other_validation_clips():
    names = [str(number) for number in range(100)]
    clips = LabelledClips(names, names, ["a", "b"] * 50, [""] * 100, [i % 5 for i in range(100)])
    divisions = {seed: clips.divide(seed) for seed in (0, 1)}
    for rows in divisions[0]:
        parts = [rows.train, rows.valid, rows.test]
        assert [len(part) for part in parts] == [72, 8, 20]
        assert sorted(np.concatenate(parts)) == list(range(100))
        assert {clips.folds[row] for row in rows.test} == {rows.fold}
    assert not np.array_equal(divisions[0][0].valid, divisions[1][0].valid)
    assert np.array_equal(divisions[0][0].test, divisions[1][0].test)


def test_a_named_validation_split_is_the_one_that_validates(clips):
    (rows,) = clips.divide(0, np.array([True] * 7 + [False]))
    assert (rows.train.tolist(), rows.valid.tolist(), rows.test.tolist()) == (
        [0, 1, 2, 3, 4],
        [5],
        [6],
    )
    with pytest.raises(ValueError, match="no valid clip could be used"):
        clips.divide(0, np.arange(8) != 5)


def test_numeric_classes_are_sorted_by_value():
    clips = LabelledClips(["a"] * 3, ["a"] * 3, ["100", "21", "9"], ["train"] * 3, [None] * 3)
    assert clips.classes == ["9", "21", "100"] and clips.targets.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a,a.wav,1,x,dev,\n", "split 'dev' is none of train, valid, test"),
        ("a,a.wav,1,x,train,\n", "no row of split test"),
        ("a,a.wav,1,x,,0\nb,b.wav,1,x,test,\n", "1 of 2 rows have a fold"),
        ("a,a.wav,1,x,,0\nb,b.wav,1,x,,0\n", "all rows are of fold 0"),
        ("a,a.wav,1,x,train,\na,b.wav,1,x,test,\n", "'a' occurs twice"),
        ("", "no rows"),
    ],
)
def test_a_manifest_that_is_none_is_named(rows, message, tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("ID,wav,duration,label,split,fold\n" + rows)
    with pytest.raises(ValueError, match=message):
        read_manifest(path, tmp_path)


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
def test_an_encoder_that_is_not_there_is_named_with_what_to_do(name):
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


def test_what_is_there_is_read_not_computed(clips, tmp_path, monkeypatch):
    first = embed(load_source("logmel"), clips, tmp_path)
    source = load_source("logmel")
    calls = count_calls(monkeypatch, source)
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


def test_an_interrupted_extraction_goes_on(clips, pretrained, tmp_path, monkeypatch):
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
    calls = count_calls(monkeypatch, source)
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
