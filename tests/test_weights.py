"""The encoder that comes with the package: found by name or by none, without a network."""

import numpy as np
import pytest
import torch

from speechbrain_jepa import AudioJEPA, checkpoints, embed, hear
from speechbrain_jepa.checkpoints import packaged_encoders, save_pretrained
from speechbrain_jepa.data import make_demo_corpus
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

LIMIT = 12e6  # bytes, of all that comes with the package


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A weights folder with an encoder called tiny, and nobody to ask for another."""
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=48, depth=1, num_heads=3)
    save_pretrained(tmp_path / "weights" / "tiny", encoder, Normalization(-7.06, 4.19))
    monkeypatch.setattr(checkpoints, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    return tmp_path / "weights" / "tiny"


def noise(seconds=1.0):
    return torch.randn(2, round(16_000 * seconds), generator=torch.Generator().manual_seed(1))


def test_no_source_is_the_encoder_in_the_box(box):
    expected = AudioJEPA(box).embed(noise())
    for ours in (AudioJEPA(), AudioJEPA(None), AudioJEPA("tiny"), hear.load_model()):
        assert torch.equal(ours.embed(noise()), expected)


def test_s3prls_upstream_without_k_is_the_encoder_in_the_box(box):
    hubconf = pytest.importorskip("speechbrain_jepa.s3prl.hubconf")
    as_s3prl_calls = {"ckpt": None, "model_config": None, "refresh": False}
    for upstream in (hubconf.audio_jepa(**as_s3prl_calls), hubconf.audio_jepa("tiny")):
        ours = upstream(list(noise()))["last_hidden_state"]
        torch.testing.assert_close(ours, AudioJEPA(box)(noise()))


def test_the_embed_command_takes_one_folder_without_an_encoder(box, audio_folder, tmp_path):
    embed.main([str(audio_folder), "--out", str(tmp_path / "ours.npy"), "--device", "cpu"])
    options = ["--out", str(tmp_path / "theirs.npy"), "--device", "cpu"]
    embed.main(["tiny", str(audio_folder), *options])
    ours, theirs = (np.load(tmp_path / name) for name in ("ours.npy", "theirs.npy"))
    assert ours.shape == (24, 240)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name, written", [("ours.npy", "ours.npy"), ("ours", "ours.npz")])
def test_the_embed_command_takes_the_output_at_the_end(box, audio_folder, tmp_path, name, written):
    embed.main([str(audio_folder), str(tmp_path / name), "--device", "cpu"])
    assert read_embedded(tmp_path / written).vectors.shape == (24, 240)


def test_the_embed_command_without_an_output(audio_folder, tmp_path, capsys):
    for last, said in ((), "add --out"), ((str(tmp_path),), f"{tmp_path} is a folder"):
        with pytest.raises(SystemExit):
            embed.main([str(audio_folder), *last])
        assert said in capsys.readouterr().err


def test_a_folder_goes_before_an_encoder_of_its_name(box, tmp_path, monkeypatch):
    torch.manual_seed(1)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    save_pretrained(tmp_path / "here" / "tiny", encoder, Normalization(0.0, 1.0))
    monkeypatch.chdir(tmp_path / "here")
    assert AudioJEPA("tiny").encoder.dim == 24
    assert AudioJEPA().encoder.dim == 48


def test_an_empty_box_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no encoder comes with this version: give a"):
        AudioJEPA()
    with pytest.raises(FileNotFoundError, match="tiny: no such folder"):
        AudioJEPA("tiny")


def test_what_comes_with_the_package_loads_and_is_small():
    total = 0
    for name, folder in packaged_encoders().items():
        embedding = AudioJEPA(name).embed(noise())
        assert embedding.isfinite().all()
        total += sum(path.stat().st_size for path in folder.iterdir())
    assert total <= LIMIT


@pytest.mark.skipif("tiny" not in packaged_encoders(), reason="no encoder comes with this version")
def test_the_encoder_in_the_box_beats_log_mel_and_an_untrained_one(tmp_path):
    """On the demo corpus, which was not pretrained on: classes, pitches, melodies and rhythms."""
    quick_probe = pytest.importorskip("speechbrain_jepa.evaluation.quick_probe").quick_probe
    from speechbrain_jepa.evaluation.comparison import untrained_like
    from speechbrain_jepa.evaluation.online_probe import embed_with

    corpus = make_demo_corpus(tmp_path / "demo", clips_per_sound=24)
    untrained, trained = untrained_like(AudioJEPA(), seed=0), AudioJEPA()
    embedders = {"untrained": [embed_with(untrained)], "trained": [embed_with(trained)]}
    accuracy = quick_probe(corpus, embedders).with_average["average"]
    others = accuracy.drop("trained", level="features")
    assert accuracy["trained", 0] > others.max() + 3, accuracy
