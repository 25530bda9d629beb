"""heareval's two runners, unedited, on a scene and an event task of generated tones."""

import csv
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch
from generated import PITCHES, run_module, tone

from speechbrain_jepa import AudioJEPA, hear, hear_runner
from speechbrain_jepa.vit import PatchGrid

needs_heareval = pytest.mark.skipif(
    not (find_spec("heareval") and find_spec("pytorch_lightning") and find_spec("sed_eval")),
    reason="heareval is not installed: pip install '.[hear]', pip install --no-deps heareval",
)
SPLITS = {"train": 8, "valid": 4, "test": 4}


def write_task(folder, rate, clips, **metadata):
    """A task as HEAR's preprocessing leaves it; clips: {split: {file: (samples, labels)}}."""
    folder.mkdir(parents=True)
    general = {"version": "v1", "mode": "full", "split_mode": "trainvaltest"}
    metadata = {**general, "splits": list(clips), **metadata}
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    rows = [f"{index},{label}\n" for index, label in enumerate(PITCHES)]
    (folder / "labelvocabulary.csv").write_text("".join(["idx,label\n", *rows]))
    for split, files in clips.items():
        (folder / str(rate) / split).mkdir(parents=True)
        for name, (wav, _) in files.items():
            soundfile.write(folder / str(rate) / split / name, wav, rate)
        labels = {name: label for name, (_, label) in files.items()}
        (folder / f"{split}.json").write_text(json.dumps(labels))


def write_tones(folder, rate=16_000, splits=SPLITS, **metadata):
    """A scene task: which pitch."""
    clips = {}
    for start, (split, count) in enumerate(splits.items()):
        labels = [list(PITCHES)[number % 2] for number in range(count)]
        clips[split] = {
            f"{split}{number}.wav": (tone(label, 100 * start + number, rate=rate), [label])
            for number, label in enumerate(labels)
        }
    settings = {"task_name": "tones", "embedding_type": "scene", "prediction_type": "multiclass"}
    metadata = {**settings, "sample_duration": 1.0, "evaluation": ["top1_acc"], **metadata}
    write_task(folder, rate, clips, **metadata)


def write_beeps(folder):
    """An event task: which pitch from when to when, of two beeps of a second in four."""
    clips = {}
    for start, (split, count) in enumerate(SPLITS.items()):
        clips[split] = {}
        for number in range(count):
            wav = np.random.default_rng(number).normal(0, 0.01, 64_000)
            events = []
            for label, onset in zip(PITCHES, (0.3 + 0.1 * number, 2.1 + 0.1 * number)):
                beep = tone(label, 100 * start + number)
                wav[round(onset * 16_000) :][: len(beep)] += beep
                milliseconds = 1000 * onset
                events.append({"label": label, "start": milliseconds, "end": milliseconds + 1000})
            clips[split][f"{split}{number}.wav"] = (wav, events)
    metadata = {"task_name": "beeps", "embedding_type": "event", "prediction_type": "multilabel"}
    metrics = ["event_onset_200ms_fms", "segment_1s_er"]
    write_task(folder, 16_000, clips, sample_duration=4.0, evaluation=metrics, **metadata)


def run(tasks_dir, encoder, out):
    """The command in this process, with the least that heareval's grid has."""
    places = ["--tasks-dir", str(tasks_dir), "--embeddings-dir", str(out)]
    grid = ["--grid", "faster", "--grid-points", "1"]
    hear.main(["run", "--model", str(encoder), *places, *grid])


@needs_heareval
def test_its_runners_embed_and_score_scene_and_event_tasks(encoders, tmp_path):
    tasks = tmp_path / "downloads" / "tasks"
    write_tones(tasks / "tones-v1-full")
    write_beeps(tasks / "beeps-v1-full")
    before = sorted(path.name for path in tmp_path.iterdir())
    printed = run_module(
        *("speechbrain_jepa.hear", "run", "--model", encoders[0], "--tasks-dir", tasks),
        *("--grid", "fast", "--grid-points", 1),
        cwd=tmp_path,
    )
    table = printed.split("results.csv:\n")[1]
    rows = {row["task"]: row for row in csv.DictReader(table.splitlines())}
    assert float(rows["tones-v1-full"]["test"]) == 1
    assert rows["tones-v1-full"]["step_seconds"] == "0.16"
    assert rows["tones-v1-full"]["metric"] == "top1_acc"
    assert rows["beeps-v1-full"]["step_seconds"] == "0.04"
    assert float(rows["beeps-v1-full"]["test"]) > 0.7  # F1 of onsets within 200 ms
    # and nothing but the embeddings is left where it was started
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "embeddings"])
    (scene,) = (tmp_path / "embeddings").rglob("tones-v1-full/test.embeddings.npy")
    expected = AudioJEPA(encoders[0]).get_output_dim()
    assert scene.stat().st_size == SPLITS["test"] * expected * 4


@needs_heareval
def test_each_checkpoint_has_embeddings_of_its_own_and_none_is_made_twice(encoders, tmp_path):
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    write_tones(tasks / "tones")
    for encoder in encoders:
        run(tasks, encoder, out)
    files = sorted(out.rglob("tones/test.embeddings.npy"))
    first, second = (np.fromfile(file, np.float32) for file in files)
    assert not np.allclose(first, second)
    times = [file.stat().st_mtime_ns for file in files]
    run(tasks, encoders[0], out)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert not torch.are_deterministic_algorithms_enabled()  # as it was before


@needs_heareval
def test_a_task_with_folds_has_their_mean_and_a_broken_one_does_not_stop_the_others(
    encoders, tmp_path, capsys
):
    folds = {f"fold{number:02d}": 4 for number in range(3)}
    write_tones(tmp_path / "tasks" / "folds", splits=folds, split_mode="presplit_kfold")
    write_tones(tmp_path / "tasks" / "broken")
    next((tmp_path / "tasks" / "broken" / "16000" / "test").iterdir()).write_bytes(b"no audio")
    with pytest.raises(SystemExit, match=r"no score for 1 of 2 tasks\nbroken: "):
        run(tmp_path / "tasks", encoders[0], tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("folds/test.predicted-scores.json")
    scores = json.loads(file.read_text())
    mean = np.mean([scores[fold]["test_score"] for fold in folds])
    assert f"folds,scene,0.16,top1_acc,{mean},nan" in capsys.readouterr().out


@needs_heareval
def test_tensorflow_is_not_left_behind_and_pickles_stay_refused():
    with hear_runner.heareval_runners():
        allowed = torch.serialization.get_safe_globals()
        assert torch.nn.BatchNorm1d in allowed
    assert "tensorflow" not in sys.modules
    assert torch.nn.BatchNorm1d not in torch.serialization.get_safe_globals()


def test_without_heareval_it_says_what_to_install(encoders, tmp_path, monkeypatch):
    write_tones(tmp_path / "tasks" / "tones")
    monkeypatch.setitem(sys.modules, "heareval", None)
    monkeypatch.setitem(sys.modules, "heareval.embeddings.runner", None)
    with pytest.raises(SystemExit, match="pip install --no-deps heareval"):
        run(tmp_path / "tasks", encoders[0], tmp_path / "out")


def test_tasks_at_48_khz_are_resampled_once(tmp_path):
    write_tones(tmp_path / "tones", rate=48_000)
    hear_runner.resample_task(tmp_path / "tones", list(SPLITS))
    file = tmp_path / "tones" / "16000" / "test" / "test1.wav"
    wav, rate = soundfile.read(file)
    assert rate == 16_000
    assert len(wav) == 16_000
    loudest = np.abs(np.fft.rfft(wav)).argmax()  # Hz, of one second
    assert loudest == round(PITCHES["high"] * 1.02)
    file.write_bytes(b"")
    hear_runner.resample_task(tmp_path / "tones", list(SPLITS))
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("patch_time", "step"), [(16, 0.04), (8, 0.04), (20, 0.05), (7, 0.01), (4, None), (2, None)]
)
def test_the_step_of_event_tasks_is_the_longest_of_at_most_50_ms(patch_time, step):
    grid = PatchGrid(frames=10 * patch_time, patch_time=patch_time)
    assert hear_runner.event_step(grid) == step


def test_tasks_that_are_not_there_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no task of HEAR in it"):
        hear_runner.find_tasks(tmp_path)
    write_tones(tmp_path / "tones")
    with pytest.raises(FileNotFoundError, match="no task esc50: it has tones"):
        hear_runner.find_tasks(tmp_path, ["esc50"])
