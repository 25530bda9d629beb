"""What a page is made of, and what becomes of bad input and of interruptions."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.explore import __main__ as command
from speechbrain_jepa.explore import build
from speechbrain_jepa.explore.build import explore
from speechbrain_jepa.explore.columns import Column, csv_columns, folder_columns
from speechbrain_jepa.explore.maps import lay_out
from speechbrain_jepa.explore.sounds import HEIGHT, WIDTH, mel_picture, read_sounds
from speechbrain_jepa.features import LogMelSpectrogram
from speechbrain_jepa.neighbours import near_duplicates


def read_page(path):
    """The data of a page, and its arrays in base64."""
    text = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    blobs = re.findall(r'<script type="text/plain" id="(.*?)">(.*?)</script>', text)
    return json.loads(data), {name: base64.b64decode(content) for name, content in blobs}


@pytest.fixture(scope="module")
def made(collection):
    folder, _, _ = collection
    out = folder / "built.html"
    explored = explore(read_embedded(folder), out, maps=["pca"], k=4)
    return explored, *read_page(out)


def test_a_page_names_all_clips_and_their_places(made, collection):
    explored, data, blobs = made
    _, files, vectors = collection
    assert explored.clips == len(data["names"]) == len(files)
    places = np.frombuffer(blobs["map-pca"], "<f4").reshape(-1, 2)
    np.testing.assert_allclose(places, lay_out(vectors, "pca"), atol=1e-5)
    assert explored.problems == []
    seconds = np.frombuffer(blobs["seconds"], "<f4")
    np.testing.assert_allclose(seconds, 0.5)


def test_no_name_is_markup(made):
    explored, _, _ = made
    text = explored.page.read_text(encoding="utf-8")
    assert "<script>window" not in text and "<img src=x" not in text
    assert text.isascii() or "\udce9" not in text


def test_near_duplicates_are_listed(made, collection):
    explored, data, _ = made
    _, files, _ = collection
    ((cosine, names),) = explored.duplicates
    assert names == [files[1], files[3]] and cosine == pytest.approx(1, abs=1e-6)
    assert data["duplicates"] == [[cosine, [1, 3]]]


def test_the_page_asks_nothing_of_the_network(made):
    explored, _, _ = made
    text = explored.page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy and "connect-src" not in policy
    assert "Licensed under the MIT license" in text  # plotly.js


def test_a_picture_has_its_frequencies_where_they_are(tmp_path, collection):
    _, files, _ = collection
    features = LogMelSpectrogram()
    heights = [mel_picture(read_audio(f), features).mean(1).argmax() for f in files]
    assert heights == sorted(heights, reverse=True)  # tones that rise, row 0 is the top
    assert heights[0] - heights[-1] > HEIGHT // 3


def test_a_sheet_has_each_clip_in_its_tile(collection, tmp_path):
    _, files, _ = collection
    missing = str(tmp_path / "missing.wav")
    (block,) = read_sounds([files[0], missing, *files[1:]], with_audio=True)
    (tmp_path / "sheet.jpg").write_bytes(block.sheet)
    sheet = np.asarray(Image.open(tmp_path / "sheet.jpg"), float)
    last = len(files)  # in the second row of 16
    row, column = divmod(last, 16)
    tile = sheet[row * HEIGHT : (row + 1) * HEIGHT, column * WIDTH : (column + 1) * WIDTH]
    picture = mel_picture(read_audio(files[-1]), LogMelSpectrogram())
    assert np.abs(tile - picture).mean() < 8  # JPEG
    assert np.isnan(block.seconds[1]) and sheet[:HEIGHT, WIDTH : 2 * WIDTH].max() < 8
    sound, rate = soundfile.read(io.BytesIO(block.audio[0]))
    loudest = np.abs(np.fft.rfft(sound[:rate])).argmax() * rate / len(sound[:rate])
    assert loudest == pytest.approx(200, abs=3) and block.audio[1] == b""
    assert len(block.problems) == 1 and "missing.wav" in block.problems[0]


@pytest.mark.parametrize("dims", [1, 3, 60])
@pytest.mark.parametrize("method", ["pca", "tsne", "umap"])
def test_maps_keep_groups_together(method, dims):
    if method == "umap":
        pytest.importorskip("umap", reason="pip install -e '.[umap]'")
    rng = np.random.default_rng(0)
    group = np.arange(70) % 2
    vectors = (rng.normal(size=(70, dims)) + 12 * group[:, None]).astype(np.float32)
    places = lay_out(vectors, method)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (group[distances.argmin(1)] == group).all()
    np.testing.assert_array_equal(places, lay_out(vectors, method))
    assert np.ptp(places, 0).max() == pytest.approx(1, abs=1e-5)


def test_equal_embeddings_have_a_place():
    assert np.isfinite(lay_out(np.ones((5, 3), np.float32), "pca")).all()


# Colours


def test_numbers_are_a_scale_where_there_are_many_and_else_classes():
    scale = Column.of("pitch", [str(number / 2) for number in range(13)])
    assert scale.categories is None
    np.testing.assert_array_equal(scale.values, np.arange(13) / 2)
    assert Column.of("fold", list("1223")).categories == ["2", "1", "3"]


def test_folders_are_those_below_what_is_common():
    (column,) = folder_columns(["a.wav", "x/b.wav", "x/c.wav"])
    assert column.categories == ["x", "."] and column.values.tolist() == [1, 0, 0]
    names = [column.name for column in folder_columns(["x/1/b.wav", "x/2/c.wav"])]
    assert names == ["folder", "subfolder"]


def test_a_csv_is_relative_to_its_folder(tmp_path):
    paths = [str(tmp_path / "audio" / name) for name in ("1.wav", "2.wav", "3.wav")]
    rows = f"file,label,take\naudio/2.wav,dog\n{paths[0]},cat,7\nelsewhere.wav,cow,\n"
    (tmp_path / "meta.csv").write_text(rows)
    label, take = csv_columns(tmp_path / "meta.csv", paths)
    assert label.categories == ["cat", "dog"]
    np.testing.assert_array_equal(label.values, [0, 1, np.nan])
    np.testing.assert_array_equal(take.values, [0, np.nan, np.nan])
    with pytest.raises(ValueError, match=r"names none of the clips: its first file is .*audio/2"):
        csv_columns(tmp_path / "meta.csv", ["/other/1.wav"])
    (tmp_path / "meta.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match="has the columns path, label: one must be file"):
        csv_columns(tmp_path / "meta.csv", paths)


# The command


def run(folder, out, *options):
    command.main([str(folder), "--out", str(out), "--map", "pca", *map(str, options)])


def test_the_command_says_what_it_made_and_what_it_could_not_read(collection, tmp_path, capsys):
    _, files, vectors = collection
    lost = [*files[:-1], str(tmp_path / "lost.wav")]
    np.savez(tmp_path / "emb.npz", files=np.array(lost), embeddings=vectors)
    run(tmp_path, tmp_path / "page.html")
    printed = capsys.readouterr().out
    assert f"{len(files)} clips in {tmp_path / 'page.html'}" in printed
    assert "1 groups of near-duplicates" in printed
    assert "1 files cannot be read" in printed and "lost.wav" in printed
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-k", 0), "k=0: ask for at least 1"),
        (("--duplicates", 2), "duplicates=2.0: a cosine is between"),
        (("--colour", "shape"), "colour='shape': choose one of folder"),
        (("--root", "/nowhere"), None),
    ],
)
def test_options_that_do_not_fit_are_said_early(options, message, collection, tmp_path):
    folder, _, vectors = collection
    if message is None:  # relative names that start elsewhere
        folder, message = tmp_path, r"none of 18 files can be read, the first: /nowhere/0.*--root"
        names = np.array([f"{number}.wav" for number in range(len(vectors))])
        np.savez(tmp_path / "emb.npz", files=names, embeddings=vectors)
    with pytest.raises(SystemExit, match=f"explore: {message}"):
        run(folder, tmp_path / "page.html", *options)
    assert not (tmp_path / "page.html").exists()


def test_too_few_clips_and_other_endings_are_errors(tmp_path):
    np.savez(tmp_path / "emb.npz", files=np.array(["a", "b"]), embeddings=np.eye(2, dtype="f4"))
    with pytest.raises(SystemExit, match="2 clips are too few for a map: give at least 4"):
        run(tmp_path, tmp_path / "page.html")
    with pytest.raises(SystemExit, match=r"the name must end in \.html"):
        run(tmp_path, tmp_path / "page.pdf")


def test_an_interrupted_page_is_continued(collection, tmp_path, monkeypatch):
    folder, _, _ = collection
    out = tmp_path / "page.html"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build, "write_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    for slow in ("nearest", "lay_out", "read_sounds"):
        monkeypatch.setattr(build, slow, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, "-k", 3)  # another plan begins anew
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr(build, "write_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    for slow in ("nearest", "lay_out", "read_sounds"):
        monkeypatch.setattr(build, slow, interrupt)
    run(folder, out)
    assert out.exists() and not out.with_name("page.html.parts").exists()


def test_too_much_sound_for_a_page_is_an_error(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "EMBEDDED_BYTES", 1000)
    with pytest.raises(SystemExit, match="fit into a page: take --audio link"):
        run(collection[0], tmp_path / "page.html", "--audio", "embed")


def test_without_pictures_no_audio_is_read(collection, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("read")

    monkeypatch.setattr(build, "read_sounds", fail)
    run(collection[0], tmp_path / "page.html", "--no_pictures")
    data, blobs = read_page(tmp_path / "page.html")
    assert data["pictures"] is False and "sheet-0" not in blobs
    assert not near_duplicates(np.zeros((2, 1), int), np.zeros((2, 1)), 0.5)


def test_a_page_in_another_folder_links_to_the_files(collection, tmp_path):
    folder, files, _ = collection
    run(folder, tmp_path / "pages" / "page.html", "--no_pictures")
    data, _ = read_page(tmp_path / "pages" / "page.html")
    start = os.path.normpath(tmp_path / "pages" / data["base"])
    assert start == str(folder)
    assert os.path.join(start, data["names"][-1]) == files[-1]
