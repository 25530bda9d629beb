"""Reading what embed wrote, and searching it from the command line."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa import AudioJEPA, embed, similar
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.clips import find_audio, read_audio
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid


def encoder_folder(path, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=2)
    return save_pretrained(path, encoder, Normalization(-7.0, 4.0), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder, six noises of different colour, a query beside them, and embeddings."""
    folder = tmp_path_factory.mktemp("similar")
    encoder_folder(folder / "encoder")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        wav = np.convolve(rng.normal(0, 0.1, 30_000), np.ones(2 * number + 1) / (number + 1))
        soundfile.write(folder / "audio" / f"{number}.wav", wav, 16_000)
    soundfile.write(folder / "query.wav", wav + 0.01 * rng.normal(size=len(wav)), 16_000)
    run_embed(folder, "emb/clips.npz")
    return folder


def run_embed(folder, out, *options):
    (folder / out).parent.mkdir(exist_ok=True)
    names = [str(folder / "encoder"), str(folder / "audio")]
    embed.main([*names, "--out", str(folder / out), *options])


def search(capsys, *arguments):
    capsys.readouterr()
    similar.main([str(argument) for argument in arguments])
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return [os.path.basename(name) for _, name in lines], [float(cosine) for cosine, _ in lines]


def expected(folder, query, **options):
    """Names and cosines by the encoder itself."""
    model = AudioJEPA(folder / "encoder", **options)
    files = find_audio(folder / "audio")
    if options.get("normalization") == "dataset":
        model.fit_normalization(files)
    rows = torch.cat([model.embed(read_audio(file)[None]) for file in [*files, query]]).double()
    cosine = torch.nn.functional.cosine_similarity(rows[-1:], rows[:-1]).numpy()
    order = np.argsort(-cosine)
    return [os.path.basename(files[clip]) for clip in order], cosine[order]


@pytest.mark.parametrize(
    ("out", "options", "settings"),
    [
        ("a/emb.npz", (), {}),
        ("b/emb.npy", ("--flat",), {"flat": True}),
        ("c/emb.csv", ("--normalization", "dataset"), {"normalization": "dataset"}),
        ("d/emb.npz", ("--level", "frame", "--step", "0.08"), {"step_seconds": 0.08}),
        ("e/emb.npy", ("--level", "frame"), {}),
        ("f/emb.csv", ("--level", "frame"), {}),
        (
            "g/emb.npz",
            ("--layers", "all", "--pooling", "mean_std"),
            {"layers": "all", "pooling": "mean_std"},
        ),
    ],
)
def test_a_query_is_embedded_as_the_clips_were(out, options, settings, folder, capsys):
    run_embed(folder, out, *options)
    found, cosines = search(capsys, folder / "query.wav", (folder / out).parent, "-k", 4)
    names, values = expected(folder, folder / "query.wav", **settings)
    assert found == names[:4]
    np.testing.assert_allclose(cosines, values[:4], atol=6e-5)  # four decimals are printed


def test_a_query_among_the_clips_is_not_its_own_neighbour(folder, capsys):
    found, cosines = search(capsys, folder / "audio" / "2.wav", folder / "emb")
    names, values = expected(folder, folder / "audio" / "2.wav")
    assert names[0] == "2.wav" and found == names[1:]
    np.testing.assert_allclose(cosines, values[1:], atol=6e-5)


def test_the_approximate_search_prints_the_same_on_few_clips(folder, capsys):
    query = folder / "query.wav"
    exact = search(capsys, query, folder / "emb", "-k", 3)
    assert search(capsys, query, folder / "emb", "-k", 3, "--approximate") == exact


def test_relative_names_are_found_from_anywhere(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    embed.main(["encoder", "audio", "--out", str(tmp_path / "emb.npz")])
    monkeypatch.chdir(tmp_path)
    embedded = read_embedded(tmp_path)
    assert embedded.files[0] == "audio/0.wav"
    assert embedded.paths()[0] == str(folder / "audio" / "0.wav")
    assert embedded.paths("/elsewhere")[0] == "/elsewhere/audio/0.wav"
    found, _ = search(capsys, folder / "audio" / "2.wav", tmp_path)
    assert len(found) == 5 and "2.wav" not in found


def test_another_encoder_is_an_error(folder, tmp_path, capsys):
    other = encoder_folder(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match=r"fingerprint .* name the right one with --encoder"):
        search(capsys, folder / "query.wav", folder / "emb", "--encoder", other)


def test_embeddings_that_do_not_say_their_encoder_want_one(folder, tmp_path, capsys):
    shutil.copy(folder / "emb" / "clips.npz", tmp_path)
    with pytest.raises(SystemExit, match=r"does not say .* name it with --encoder"):
        search(capsys, folder / "query.wav", tmp_path)
    named = search(capsys, folder / "query.wav", tmp_path, "--encoder", folder / "encoder")
    assert named == search(capsys, folder / "query.wav", folder / "emb")


def test_what_is_no_embeddings_is_said(folder, tmp_path, capsys):
    query = folder / "query.wav"
    with pytest.raises(SystemExit, match=r"similar: .*nowhere: no such file or folder"):
        search(capsys, query, tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"no embeddings here\. Make them: python -m"):
        search(capsys, query, tmp_path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(SystemExit, match=r"other.npz is not an output of speechbrain_jepa.embed"):
        search(capsys, query, tmp_path)
    np.savez(tmp_path / "more.npz", x=np.zeros(3))
    with pytest.raises(SystemExit, match=r"holds several embeddings, more.npz, other.npz"):
        search(capsys, query, tmp_path)
    bad = np.eye(3, dtype="f4")
    bad[1, 1] = np.nan
    np.savez(tmp_path / "more.npz", files=np.array(["a", "b", "c"]), embeddings=bad)
    with pytest.raises(SystemExit, match=r"the embedding of b is not finite"):
        search(capsys, query, tmp_path / "more.npz")
    with pytest.raises(SystemExit, match=r"k=0: ask for at least 1"):
        search(capsys, query, folder / "emb", "-k", 0)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(SystemExit, match=r"text.wav: cannot be opened"):
        search(capsys, tmp_path / "text.wav", folder / "emb")


def test_settings_name_the_encoder_and_the_normalisation(folder):
    settings = json.loads((folder / "emb" / "clips.settings.json").read_text())
    assert settings["source"] == str(folder / "encoder")
    assert (settings["mean"], settings["std"]) == (-7.0, 4.0)
