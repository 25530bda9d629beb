"""Embedding files from the command line: right, whole, continued, and honest about bad files."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from pyarrow import parquet

from speechbrain_jepa import AudioJEPA, embed
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.clips import find_audio, read_audio, read_clips
from speechbrain_jepa.data.crops import UnreadableAudio
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.files import folder_lock
from speechbrain_jepa.vit import Encoder, PatchGrid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    return save_pretrained(tmp_path_factory.mktemp("model") / "p", encoder, Normalization(-7, 4))


@pytest.fixture
def audio(tmp_path):
    """Nine files of different lengths, rates and channels, and what is not audio."""
    audio = tmp_path / "audio"
    (audio / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(9):
        samples = int(rng.integers(300, 60_000))
        wav = rng.normal(0, 0.1, (samples, 1 + number % 2))
        place = audio / ("deep/er" if number % 3 else "")
        soundfile.write(
            place / f"{number}.{('flac', 'wav')[number % 2]}", wav, (16_000, 22_050)[number % 2]
        )
    (audio / "notes.txt").write_text("not audio")
    return audio


def break_some(audio):
    """Three files that cannot be used; returns their names."""
    (audio / "broken.flac").write_bytes(b"fLaC, or so it says")
    soundfile.write(audio / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(audio / "nan.wav", np.full(9_000, np.nan), 16_000, subtype="FLOAT")
    return ["broken.flac", "empty.wav", "nan.wav"]


def expected_frames(folder, audio):
    model = AudioJEPA(folder)
    return {file: model(read_audio(file)[None])[0].numpy() for file in find_audio(audio)}


def run(folder, audio, out, *options):
    embed.main([str(folder), str(audio), "--out", str(out), *options])


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# What is written


def test_clips_in_every_format(folder, audio, tmp_path):
    expected = expected_frames(folder, audio)
    means = np.stack([frames.mean(0) for frames in expected.values()])
    outs = [tmp_path / f"emb{ending}" for ending in embed.FORMATS]
    for out in outs:
        run(folder, audio, out)

    with np.load(outs[0]) as arrays:
        assert arrays["files"].tolist() == list(expected)
        assert_close(arrays["embeddings"], means)
    assert_close(np.load(outs[1]), means)
    index = read_table(tmp_path / "emb.files.csv")
    assert [row["file"] for row in index] == list(expected)
    assert [row["first_row"] for row in index] == [str(row) for row in range(9)]
    rows = read_table(outs[2])
    assert [row.pop("file") for row in rows] == list(expected)
    assert_close([[float(value) for value in row.values()] for row in rows], means)
    table = parquet.read_table(outs[3])
    assert table["file"].to_pylist() == list(expected)
    assert_close(table["embedding"].to_pylist(), means)
    again = read_embedded(outs[3])
    assert again.files == list(expected) and np.array_equal(again.vectors, np.load(outs[1]))


def test_frames_in_every_format(folder, audio, tmp_path):
    expected = expected_frames(folder, audio)
    counts = [len(frames) for frames in expected.values()]
    frames = np.concatenate(list(expected.values()))
    model = AudioJEPA(folder)
    seconds = np.concatenate([model.timestamps(count) for count in counts])
    outs = [tmp_path / f"emb{ending}" for ending in embed.FORMATS]
    for out in outs:
        run(folder, audio, out, "--level", "frame")

    with np.load(outs[0]) as arrays:
        assert arrays["rows"].tolist() == counts
        assert_close(arrays["seconds"], seconds)
        assert_close(arrays["embeddings"], frames)
    assert_close(np.load(outs[1]), frames)
    index = read_table(tmp_path / "emb.files.csv")
    assert [int(row["rows"]) for row in index] == counts
    assert [int(row["first_row"]) for row in index] == (np.cumsum(counts) - counts).tolist()
    rows = read_table(outs[2])
    assert [row.pop("file") for row in rows] == list(np.repeat(list(expected), counts))
    assert_close([float(row.pop("seconds")) for row in rows], seconds)
    assert_close([[float(value) for value in row.values()] for row in rows], frames)
    table = parquet.read_table(outs[3])
    assert table["file"].to_pylist() == list(np.repeat(list(expected), counts))
    assert_close(table["seconds"].to_pylist(), seconds)
    assert_close(table["embedding"].to_pylist(), frames)
    again = read_embedded(outs[3])
    assert again.files == list(expected)
    assert_close(again.vectors, np.stack([rows.mean(0) for rows in expected.values()]))


def test_batches_do_not_change_embeddings(folder, audio, tmp_path):
    for seconds in ("1", "600"):
        run(folder, audio, tmp_path / f"{seconds}.npy", "--batch_seconds", seconds)
    assert_close(np.load(tmp_path / "1.npy"), np.load(tmp_path / "600.npy"))


def test_options_reach_the_encoder(folder, audio, tmp_path):
    run(folder, audio, tmp_path / "flat.npy", "--flat", "--normalization", "dataset")
    model = AudioJEPA(folder, flat=True, normalization="dataset").fit_normalization(audio)
    expected = torch.cat([model.embed(read_audio(file)[None]) for file in find_audio(audio)])
    assert_close(np.load(tmp_path / "flat.npy"), expected.numpy())


def test_bad_files_are_listed_and_the_others_embedded(folder, audio, tmp_path, capsys):
    names = break_some(audio)
    run(folder, audio, tmp_path / "emb.npz")
    skipped = {
        os.path.basename(r["file"]): r["reason"] for r in read_table(tmp_path / "emb.skipped.csv")
    }
    assert sorted(skipped) == names
    assert "cannot be opened" in skipped["broken.flac"]
    assert skipped["empty.wav"] == "holds no samples"
    assert skipped["nan.wav"] == "holds NaN or infinite samples"
    with np.load(tmp_path / "emb.npz") as arrays:
        assert len(arrays["files"]) == len(arrays["embeddings"]) == 9
    assert "3 files skipped" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["emb.csv", "emb.npy"])
def test_a_name_is_one_row_whatever_is_in_it(out, folder, tmp_path):
    names = [b"a\rb.wav", b"c\r\nd.wav", b'e",f.wav', b"\xff.wav"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            soundfile.write(file, np.full(9_000, 0.1), 16_000, format="WAV")
    run(folder, tmp_path, tmp_path / out)
    table = tmp_path / {"emb.npy": "emb.files.csv"}.get(out, out)
    with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
        found = [os.path.basename(os.fsencode(row["file"])) for row in csv.DictReader(file)]
    assert sorted(found) == sorted(names)


def test_a_name_that_is_no_text_is_kept_in_parquet(folder, tmp_path):
    name = os.fsdecode(b"\xff.wav")
    with open(tmp_path / name, "wb") as file:
        soundfile.write(file, np.full(9_000, 0.1), 16_000, format="WAV")
    run(folder, tmp_path, tmp_path / "emb.parquet")
    assert read_embedded(tmp_path / "emb.parquet").files == [str(tmp_path / name)]


@pytest.mark.parametrize("name", ["emb.txt", "emb"])
def test_another_format_is_an_error(name, folder, audio, tmp_path):
    with pytest.raises(SystemExit, match=r"must end in \.npz, \.npy, \.csv"):
        run(folder, audio, tmp_path / name)


def test_an_output_that_exists_is_not_overwritten(folder, audio, tmp_path):
    (tmp_path / "emb.npy").write_text("precious")
    with pytest.raises(SystemExit, match="exists already"):
        run(folder, audio, tmp_path / "emb.npy")
    assert (tmp_path / "emb.npy").read_text() == "precious"


def test_nothing_to_embed_is_an_error(folder, audio, tmp_path):
    with pytest.raises(SystemExit, match="no such file or folder"):
        run(folder, tmp_path / "nowhere", tmp_path / "emb.npy")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(SystemExit, match="no audio file in"):
        run(folder, tmp_path / "hollow", tmp_path / "emb.npy")
    names = break_some(audio)
    with pytest.raises(SystemExit, match="none of the files"):
        run(folder, audio / names[0], tmp_path / "emb.npy")


# Interrupted


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_an_interrupted_run_goes_on_where_it_was(level, folder, audio, tmp_path, monkeypatch):
    run(folder, audio, tmp_path / "whole.npy", "--level", level)
    options = ("--level", level, "--batch_seconds", "1", "--num_workers", "1")
    encoded = []
    name = {"clip": "embed", "frame": "forward"}[level]
    real = getattr(AudioJEPA, name)

    def encode(self, wav, wav_lens):
        encoded.append(len(wav))
        if sum(encoded) == 6:
            raise Interrupted
        return real(self, wav, wav_lens)

    monkeypatch.setattr(AudioJEPA, name, encode)
    with pytest.raises(Interrupted):
        run(folder, audio, tmp_path / "emb.npy", *options)
    assert not (tmp_path / "emb.npy").exists()
    del encoded[:]
    run(folder, audio, tmp_path / "emb.npy", *options[:2])
    assert sum(encoded) == 4
    assert_close(np.load(tmp_path / "emb.npy"), np.load(tmp_path / "whole.npy"))
    index, whole = (read_table(tmp_path / f"{name}.files.csv") for name in ("emb", "whole"))
    assert index == whole
    assert not list(tmp_path.glob("*.parts"))


def test_a_run_begun_with_other_options_is_not_continued(folder, audio, tmp_path, monkeypatch):
    def interrupt(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(AudioJEPA, "embed", interrupt)
        with pytest.raises(Interrupted):
            run(folder, audio, tmp_path / "emb.npy")
    with pytest.raises(SystemExit, match="begun with flat=False, not True: repeat the options"):
        run(folder, audio, tmp_path / "emb.npy", "--flat")
    other = AudioJEPA(folder)
    other.encoder.norm.bias.add_(1)
    with pytest.raises(ValueError, match="begun with encoder="):
        embed.embed_files(other, find_audio(audio), tmp_path / "emb.npy", progress=False)


def test_dataset_statistics_survive_an_interruption(folder, audio, tmp_path, monkeypatch):
    options = ("--normalization", "dataset")
    run(folder, audio, tmp_path / "whole.npy", *options)

    def interrupt(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(AudioJEPA, "embed", interrupt)
        with pytest.raises(Interrupted):
            run(folder, audio, tmp_path / "emb.npy", *options)
    monkeypatch.setattr(AudioJEPA, "fit_normalization", interrupt)
    run(folder, audio, tmp_path / "emb.npy", *options)
    assert_close(np.load(tmp_path / "emb.npy"), np.load(tmp_path / "whole.npy"))


def test_a_killed_run_loses_no_finished_part(folder, tmp_path):
    """SIGKILL in the middle; the second run embeds only what is left."""
    audio = tmp_path / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for number in range(120):
        soundfile.write(audio / f"{number:03d}.wav", rng.normal(0, 0.1, 40_000), 16_000)
    out = tmp_path / "emb.npy"
    code = "from speechbrain_jepa import embed, embedding_parts; "
    code += "embedding_parts.PART_SECONDS = 0; embed.main()"
    command = [sys.executable, "-c", code, str(folder), str(audio), "--out", str(out)]
    command += ["--batch_seconds", "5"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    parts = tmp_path / "emb.npy.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part-*.npz"))) < 10:
        assert process.poll() is None and time.monotonic() < deadline, "over before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = len(list(parts.glob("part-*.npz")))
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"{done}/120" in finished.stderr  # where the progress bar began
    model = AudioJEPA(folder)
    expected = torch.cat([model.embed(read_audio(file)[None]) for file in find_audio(audio)])
    assert_close(np.load(out), expected.numpy())


def test_parts_left_by_a_kill_after_the_output_are_removed(folder, audio, tmp_path, monkeypatch):
    names = break_some(audio)
    out, parts = tmp_path / "emb.npy", tmp_path / "emb.npy.parts"

    def interrupt(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(embed.shutil, "rmtree", interrupt)
        with pytest.raises(Interrupted):
            run(folder, audio, out)
    assert parts.exists()
    written = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(AudioJEPA, "embed", interrupt)  # nothing is embedded again
        run(folder, audio, out)
    assert out.read_bytes() == written and not parts.exists()
    assert len(read_table(tmp_path / "emb.skipped.csv")) == len(names)


def test_an_output_that_others_made_meanwhile_is_not_overwritten(
    folder, audio, tmp_path, monkeypatch
):
    def interrupt(*args):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(AudioJEPA, "embed", interrupt)
        with pytest.raises(Interrupted):
            run(folder, audio, tmp_path / "emb.npy")
    (tmp_path / "emb.npy").write_text("precious")
    with pytest.raises(SystemExit, match="exists already"):
        run(folder, audio, tmp_path / "emb.npy")
    assert (tmp_path / "emb.npy").read_text() == "precious"


def test_a_second_process_with_the_same_output_is_told_who_is_at_it(folder, audio, tmp_path):
    with (
        folder_lock(tmp_path / "emb.npy.parts", fix=""),
        pytest.raises(SystemExit, match=f"in use by process {os.getpid()} .* name another --out"),
    ):
        run(folder, audio, tmp_path / "emb.npy")
    run(folder, audio, tmp_path / "emb.npy")
    assert len(np.load(tmp_path / "emb.npy")) == 9


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_a_full_disk_is_one_sentence_and_what_is_done_is_kept(ending, folder, tmp_path, small_disk):
    audio = tmp_path / "long.wav"  # 240 s are 0.7 MB of time steps: the part fits, not the output
    soundfile.write(audio, np.random.default_rng(0).normal(0, 0.1, 240 * 16_000), 16_000)
    out = small_disk / f"emb{ending}"
    command = [sys.executable, "-m", "speechbrain_jepa.embed", str(folder), str(audio)]
    command += ["--out", str(out), "--level", "frame"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    assert f"the disk of {small_disk}" in process.stderr.splitlines()[-1]
    assert not out.exists()
    assert [path.name for path in (small_disk / f"emb{ending}.parts").glob("*.np*")] == [
        "part-000000.npz"
    ]


# Reading


def test_audio_is_mono_at_16_khz(tmp_path):
    seconds = np.arange(44_100) / 44_100
    left, right = np.sin(2 * np.pi * 440 * seconds), np.cos(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / "a.flac", np.stack([left, right], 1) / 2, 44_100)
    wav = read_audio(tmp_path / "a.flac")
    assert wav.shape == (16_000,)
    seconds = torch.arange(16_000) / 16_000
    angle = 2 * torch.pi * 440 * seconds
    middle = slice(100, -100)
    torch.testing.assert_close(
        wav[middle], ((angle.sin() + angle.cos()) / 4)[middle], rtol=0, atol=2e-3
    )


def test_files_are_found_by_extension_or_by_name(audio):
    (audio / ".hidden.wav").touch()
    named = audio / "speech.bin"
    named.touch()
    found = find_audio([audio, named, audio / "0.flac"])
    assert len(found) == 10  # each once
    assert found[-1] == str(named)


def test_files_come_in_their_order_in_batches_of_bounded_size(audio):
    files = find_audio(audio)
    batches = list(read_clips(files, batch_seconds=4, num_workers=3))
    assert [file for batch in batches for file in batch.files] == files
    for batch in batches:
        assert len(batch.files) == 1 or batch.wav.numel() <= 4 * 16_000
        for file, wav, relative in zip(batch.files, batch.wav, batch.wav_lens):
            own = read_audio(file)
            assert round(relative.item() * len(wav)) == len(own)
            assert torch.equal(wav[: len(own)], own)


def test_a_bad_file_is_an_error_unless_someone_listens(audio):
    names = break_some(audio)
    files = find_audio(audio)
    with pytest.raises(UnreadableAudio, match=names[0]):
        list(read_clips(files))
    failures = []
    list(read_clips(files, on_failure=failures.append))
    assert [os.path.basename(failure.path) for failure in failures] == names
