"""mteb's own `evaluate`, unedited, on generated tones and on mteb's mock tasks."""

import io

import numpy as np
import pytest
import soundfile
import torch
from generated import PITCHES, tone

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.data.resampling import resample

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install '.[mteb]'")

from datasets import Audio, Dataset, DatasetDict  # noqa: E402
from mteb.abstasks.classification import AbsTaskClassification  # noqa: E402
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID, mock_tasks  # noqa: E402
from mteb.results import TaskResult  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from speechbrain_jepa.mteb import BENCHMARK, MTEBEncoder, main  # noqa: E402

PLACE = {"hf_split": "test", "hf_subset": "default"}


def file_bytes(wav, rate, format="FLAC"):
    file = io.BytesIO()
    soundfile.write(file, wav, rate, format=format)
    return {"bytes": file.getvalue(), "path": None}


def data_set(start):
    """Tones as the hub's data sets hold audio: files of several rates, lengths and formats."""
    rows = []
    for number in range(start, start + 10):
        for index, label in enumerate(PITCHES):
            rate = (8_000, 16_000, 44_100)[number % 3]
            wav = tone(label, number, 0.4 + number % 5 / 4, rate)
            wav = np.stack([wav, 0.5 * wav], 1) if number % 2 else wav
            audio = file_bytes(wav, rate, ("FLAC", "WAV")[number % 2])
            rows.append({"audio": audio, "label": index})
    return Dataset.from_list(rows).cast_column("audio", Audio())


class Tones(AbsTaskClassification):
    """Which pitch."""

    metadata = mock_tasks.MockAudioClassification.metadata.model_copy(update={"name": "Tones"})
    input_column_name = "audio"
    n_experiments = 2

    def load_data(self, **kwargs):
        self.dataset = DatasetDict({"train": data_set(0), "test": data_set(100)})
        self.data_loaded = True


def test_its_evaluate_tells_tones_apart(encoders, tmp_path):
    cache = mteb.ResultCache(tmp_path)
    results = mteb.evaluate(MTEBEncoder(encoders[0]), Tones(), cache=cache)
    assert results.task_results[0].get_score() == 1
    scores = cache.load_task_result("Tones", MTEBEncoder(encoders[0]).mteb_model_meta)
    assert scores.get_score() == 1
    # another checkpoint of the same name, or other options, have no scores yet
    for other in (MTEBEncoder(encoders[1]), MTEBEncoder(encoders[0], flat=True)):
        assert other.mteb_model_meta.name == "speechbrain-jepa/small"
        assert cache.load_task_result("Tones", other.mteb_model_meta) is None


def encode_by_soundfile(feature, value):
    """`Audio.encode_example` without torchcodec: mteb's mock tasks are of arrays."""
    return file_bytes(value["array"], value["sampling_rate"], "WAV") if "array" in value else value


def test_its_own_check_of_models_passes(encoders, monkeypatch):
    monkeypatch.setattr(Audio, "encode_example", encode_by_soundfile)
    found = mteb.mock_run(MTEBEncoder(encoders[0]))
    tasks = {task.metadata.name: task.metadata.type for task in ALL_MOCK_TASK_TEST_GRID}
    ran = {name: result for name, result in found.items() if result is not None}
    assert {
        name: result for name, result in ran.items() if not isinstance(result, TaskResult)
    } == {}
    kinds = ("AudioClassification", "AudioMultilabelClassification", "AudioPairClassification")
    assert {tasks[name] for name in ran} >= {*kinds, "AudioReranking", "Clustering"}


def test_a_clip_has_the_same_embedding_in_any_batch(encoders):
    rows = data_set(0)
    found = []
    for batch_size, batch_seconds in ((1, 600), (20, 600), (20, 2)):
        encoder = MTEBEncoder(encoders[0], batch_seconds=batch_seconds)
        loader = DataLoader(rows, batch_size)
        found.append(encoder.encode(loader, task_metadata=Tones.metadata, **PLACE))
    assert found[0].shape == (20, encoder.mteb_model_meta.embed_dim)
    assert found[0].dtype == np.float32
    for embeddings in found[1:]:
        np.testing.assert_allclose(embeddings, found[0], atol=5e-6)
    # as this package's own reader of files has it
    alone = AudioJEPA(encoders[0])
    for row, embedding in zip(rows.cast_column("audio", Audio(decode=False)), found[0]):
        wav, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), always_2d=True)
        wav = torch.from_numpy(resample(wav.mean(1).astype(np.float32), rate))
        # silent bands of 8 kHz are nothing but rounding errors: the log sees them
        np.testing.assert_allclose(alone.embed(wav[None])[0].numpy(), embedding, atol=1e-3)


def test_a_clip_that_cannot_be_decoded_is_named(encoders):
    good = file_bytes(tone("low", 0), 16_000)
    for bad, message in (
        ({"bytes": b"no audio", "path": None}, "Format not recognised"),
        (file_bytes(np.zeros(0), 16_000, "WAV"), "is empty"),
    ):
        rows = Dataset.from_list([{"audio": good}, {"audio": bad}]).cast_column("audio", Audio())
        with pytest.raises(ValueError, match=f"Tones, default, test, batch 0.*{message}"):
            MTEBEncoder(encoders[0]).encode(
                DataLoader(rows, 2), task_metadata=Tones.metadata, **PLACE
            )


def test_text_is_refused(encoders):
    rows = Dataset.from_dict({"text": ["a sentence"]})
    with pytest.raises(ValueError, match="takes audio, and this has text"):
        MTEBEncoder(encoders[0]).encode(DataLoader(rows), task_metadata=Tones.metadata, **PLACE)


def test_the_command_prints_a_table_and_names_what_failed(encoders, tmp_path, monkeypatch, capsys):
    class Broken(Tones):
        metadata = Tones.metadata.model_copy(update={"name": "Broken"})

        def load_data(self, **kwargs):
            raise RuntimeError("the hub is down")

    monkeypatch.setattr(mteb, "get_task", lambda name: {"Tones": Tones, "Broken": Broken}[name]())
    with pytest.raises(SystemExit, match=r"no score for 1 task.*\nBroken: .*the hub is down"):
        main([str(encoders[0]), "--tasks", "Broken", "Tones", "--out", str(tmp_path / "scores")])
    assert f"{'Tones':40}{100:8.2f}" in capsys.readouterr().out
    assert list((tmp_path / "scores").rglob("Tones.json"))


def test_the_benchmark_is_one_of_audio_only():
    tasks = mteb.get_benchmark(BENCHMARK).tasks
    assert len(tasks) > 10
    assert all(task.metadata.modalities == ["audio"] for task in tasks)
