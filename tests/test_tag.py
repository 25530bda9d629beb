"""`python -m speechbrain_jepa.tag`: what a classifier says of files, one at a time or all."""

import csv

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa import tag
from speechbrain_jepa.classifier import AudioClassifier, Decoding
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

LABELS = ["a", "b;c", "d"]


@pytest.fixture
def audio(tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        wav = rng.normal(0, 0.1, 3_000 * (number + 1)) * np.linspace(0, 1, 3_000 * (number + 1))
        soundfile.write(folder / f"{number}.wav", wav, 16_000)
    return folder


def save(folder, **options):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=1, num_heads=3)
    jepa = AudioJEPA((encoder, Normalization(-7.0, 4.0)), freeze=False)
    model = AudioClassifier(jepa, LABELS, norm="none", **options)
    for name in ("weight", "bias"):
        torch.nn.init.normal_(getattr(model.head["linear"], name), std=0.5)
    return str(model.save(folder))


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_clips_get_their_best_labels(audio, tmp_path, capsys):
    folder, out = save(tmp_path / "c"), tmp_path / "out.csv"
    tag.main([folder, str(audio), "--out", str(out), "--top_k", "2", "--device", "cpu"])
    header, *rows = read(out)
    assert header == ["file", "label", "score"] and len(rows) == 12
    model = AudioClassifier.load(folder)
    for number in range(6):
        file = str(audio / f"{number}.wav")
        with torch.no_grad():
            scores = model(read_audio(file)[None]).clip.softmax(1)[0]
        best = scores.argsort(descending=True)[:2].tolist()
        expected = [[file, LABELS[label], f"{scores[label]:.4f}"] for label in best]
        assert rows[2 * number : 2 * number + 2] == expected
    assert "6 files tagged" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "c", "out.csv"]
    with pytest.raises(SystemExit, match="exists already"):
        tag.main([folder, str(audio), "--out", str(out)])


def test_any_number_of_labels_are_those_above_the_threshold(audio, tmp_path, capsys):
    folder = save(tmp_path / "c", multilabel=True)
    files = [str(audio / f"{number}.wav") for number in range(6)]
    tag.main([folder, *files, "--threshold", "0.6", "--device", "cpu"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    model, expected = AudioClassifier.load(folder), []
    for file in files:
        with torch.no_grad():
            scores = model(read_audio(file)[None]).clip.sigmoid()[0].tolist()
        found = sorted(((score, label) for score, label in zip(scores, LABELS) if score > 0.6))[
            ::-1
        ]
        expected += [[file, label, f"{score:.4f}"] for score, label in found] or [[file]]
    assert rows == expected
    assert {len(row) for row in rows} >= {3}


def test_events_have_times_and_the_mean_score(audio, tmp_path, capsys):
    folder = save(tmp_path / "c", level="step", decoding=Decoding([0.5, 0.4, 0.6], 0.0))
    file = str(audio / "5.wav")
    tag.main([folder, file, "--device", "cpu"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    model, wav = AudioClassifier.load(folder), read_audio(file)
    with torch.no_grad():
        scores = model(wav[None]).steps.sigmoid()[0].numpy()
    expected = []
    for label, threshold in zip(LABELS, (0.5, 0.4, 0.6)):
        run = []
        for step, score in enumerate([*scores[:, LABELS.index(label)], -1.0]):
            if score > threshold:
                run.append((step, score))
            elif run:
                end = min((run[-1][0] + 1) * 0.16, len(wav) / 16_000)
                mean = np.mean([score for _, score in run])
                times = [f"{run[0][0] * 0.16:.4f}", f"{end:.4f}"]
                expected.append([file, *times, label, f"{mean:.4f}"])
                run = []
    assert sorted(rows) == sorted(expected) and rows


def test_a_killed_run_goes_on_and_broken_files_are_listed(audio, tmp_path, monkeypatch, capsys):
    folder, out = save(tmp_path / "c", level="step"), tmp_path / "out.csv"
    (audio / "3.wav").write_text("no audio")
    call = [folder, str(audio), "--out", str(out), "--device", "cpu", "--batch_seconds", "0.1"]
    tag.main(call)
    whole = out.read_text()
    out.unlink()

    seen, original = [], tag._event_rows

    def dies(model, file, *args):
        seen.append(file)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(model, file, *args)

    monkeypatch.setattr(tag, "_event_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        tag.main(call)
    part = tmp_path / "out.csv.parts/rows.csv"
    text = part.read_text()
    assert not out.exists() and len(set(seen)) == 4
    part.write_text(text[:-9])  # the last row was cut
    seen[:] = ["again"] * 9
    tag.main(call)
    assert out.read_text() == whole
    assert len(seen) - 9 == 3  # the last of the three done, and the two left
    assert "1 files skipped" in capsys.readouterr().out
    assert "3.wav" in (tmp_path / "out.skipped.csv").read_text()
    assert not part.parent.exists()


def test_what_is_no_classifier_is_said(audio, tmp_path):
    for source, message in ((tmp_path / "nowhere", "no such folder"), (audio, "has no classifier")):
        with pytest.raises(SystemExit, match=message):
            tag.main([str(source), str(audio)])
