"""X-ARES's own runner, unedited, on two tasks of generated tones: of clips, and of time steps."""

import fnmatch
import io
import re
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch
from generated import PITCHES, run_module, tone

from speechbrain_jepa import AudioJEPA, xares
from speechbrain_jepa.suites import checkpoint_id

needs_xares = pytest.mark.skipif(
    find_spec("xares") is None, reason="X-ARES is not installed: pip install '.[xares]'"
)

CLIP_TASK = """
from xares.task import TaskConfig

def tones_config(encoder):
    return TaskConfig(
        encoder=encoder, name="tones", output_dim=2, epochs=120, eval_weight=8, batch_size_train=8,
        label_processor=lambda labels: ["low", "high"].index(labels["label"]),
    )
"""
# as X-ARES's desed_task.py: a target for each step of `hop_size_in_ms`
FRAME_TASK = """
from math import ceil

import torch
from xares.task import TaskConfig

def beeps_config(encoder):
    hop = encoder.hop_size_in_ms / 1000 if encoder else 1

    def target(event):
        steps = torch.zeros(1, ceil(2 / hop))
        steps[0, ceil(event["onset"] / hop):ceil(event["offset"] / hop)] = 1
        return steps

    return TaskConfig(
        encoder=encoder, name="beeps", output_dim=1, epochs=60, task_type="frame", do_knn=False,
        criterion="BCEWithLogitsLoss", metric="segmentf1_macro", label_processor=target,
        metric_args=dict(hop_size_in_ms=1000 * hop, segment_length_in_s=0.2), batch_size_train=8,
    )
"""


def write_shards(folder, split, clips, label):
    """Shards as X-ARES makes them, by its own writer, of clips [(samples, label), ...]."""
    from xares.audiowebdataset import write_audio_tar

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (wav, _) in enumerate(clips):
        paths.append(str(folder / f"{split}_{number}.flac"))
        soundfile.write(paths[-1], wav, 16_000)
    labels = [label(value) for _, value in clips]
    write_audio_tar(paths, labels, str(folder / f"{split}-*.tar"), "flac", num_shards=2)
    (folder / ".audio_tar_ready").touch()  # X-ARES's mark of what need not be downloaded


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Where X-ARES is started: two tasks, and their data in ./env."""
    folder = tmp_path_factory.mktemp("xares")
    (folder / "my_tasks").mkdir()
    (folder / "my_tasks" / "tones_task.py").write_text(CLIP_TASK)
    (folder / "my_tasks" / "beeps_task.py").write_text(FRAME_TASK)
    for start, split in enumerate(("train", "valid", "test")):
        numbers = range(100 * start, 100 * start + 8)
        # 0.6 to 1.3 s: X-ARES pads the clips of a batch
        tones = [(tone(label, n, 0.6 + n % 8 / 10), label) for n in numbers for label in PITCHES]
        write_shards(folder / "env" / "tones", split, tones, lambda label: label)
        beeps = []
        for number in numbers:
            onset = 0.2 + 0.15 * (number % 8)
            wav = np.random.default_rng(number).normal(0, 0.01, 32_000)
            wav[round(onset * 16_000) : round((onset + 0.5) * 16_000)] += tone("high", number, 0.5)
            beeps.append((wav, onset))
        write_shards(
            folder / "env" / "beeps", split, beeps, lambda on: {"onset": on, "offset": on + 0.5}
        )
    return folder


def scores(printed):
    """By task, the two columns of the table that X-ARES prints: MLP and k-NN."""
    rows = re.findall(r"^ *(\w+) +([\d.]+) +([\d.]+) +(?:True|False)$", printed, re.MULTILINE)
    return {task: (float(mlp), float(knn)) for task, mlp, knn in rows}


def run(workplace, encoder, *tasks, **options):
    return run_module(
        *("xares.run", "speechbrain_jepa.xares", *tasks, "--max-jobs", 0),
        cwd=workplace,
        SPEECHBRAIN_JEPA_MODEL=str(encoder),
        **options,
    )


FINER = '{"step_seconds": 0.04}'


def embeddings_of(clip, workplace):
    """[steps, C] of a clip of the tones' test split, by class name."""
    found = {}
    for path in (workplace / "env" / "tones" / "embeddings").glob("*/wds-encoded-test*.tar"):
        with tarfile.open(path) as tar:
            # X-ARES appends the number of the batch to the name
            for member in fnmatch.filter(tar.getnames(), f"{clip}0.npy"):
                found[path.parent.name] = np.load(io.BytesIO(tar.extractfile(member).read()))
    return found


@pytest.fixture(scope="module")
def printed(workplace, encoders):
    """What X-ARES prints of both tasks for the first encoder."""
    tasks = ("my_tasks/tones_task.py", "my_tasks/beeps_task.py")
    return run(workplace, encoders[0], *tasks, SPEECHBRAIN_JEPA_OPTIONS=FINER)


@needs_xares
def test_its_runner_trains_and_scores_both_kinds_of_task(printed):
    assert scores(printed)["tones"] == (1.0, 1.0), printed[-1500:]
    assert scores(printed)["beeps"][0] > 0.7, printed[-1500:]


@needs_xares
def test_another_checkpoint_in_a_folder_of_the_same_name_is_embedded_anew(
    workplace, encoders, printed
):
    task = "my_tasks/tones_task.py"
    second = run(workplace, encoders[1], task, SPEECHBRAIN_JEPA_OPTIONS=FINER)
    assert scores(second)["tones"] == (1.0, 1.0), second[-1500:]
    # the longest of its batch, which X-ARES does not pad
    wav, _ = soundfile.read(workplace / "env" / "tones" / "test_15.flac", dtype="float32")
    found = embeddings_of("test_15", workplace)
    assert len(found) == 2
    for encoder in encoders:
        model = AudioJEPA(encoder, step_seconds=0.04)
        (array,) = [array for name, array in found.items() if checkpoint_id(model) in name]
        expected = model(torch.from_numpy(wav)[None])[0]
        torch.testing.assert_close(torch.from_numpy(array), expected, rtol=0, atol=1e-5)


@needs_xares
def test_its_checker_is_content(encoders, monkeypatch):
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.utils import attr_from_py_path

    monkeypatch.setenv("SPEECHBRAIN_JEPA_MODEL", str(encoders[0]))
    encoder = attr_from_py_path("speechbrain_jepa.xares", endswith="Encoder")()
    assert check_audio_encoder(encoder)


def test_the_module_has_one_name_that_ends_in_encoder():
    assert [name for name in dir(xares) if name.endswith("Encoder")] == ["AudioJEPAEncoder"]


@pytest.mark.parametrize("step", [None, 0.04, 0.01])
def test_the_encoder_is_audio_jepa(step, encoders, monkeypatch):
    monkeypatch.setenv("SPEECHBRAIN_JEPA_MODEL", str(encoders[0]))
    monkeypatch.setenv("SPEECHBRAIN_JEPA_OPTIONS", f'{{"step_seconds": {step or "null"}}}')
    encoder = xares.AudioJEPAEncoder()
    wav = torch.randn(2, 32_000)
    torch.testing.assert_close(encoder(wav), AudioJEPA(encoders[0], step_seconds=step)(wav))
    assert encoder.output_dim == encoder(wav).shape[-1]
    assert encoder.hop_size_in_ms == 1000 * (step or 0.16)


def test_the_class_name_says_which_checkpoint_and_options(encoders, monkeypatch):
    names = []
    for encoder in encoders:
        monkeypatch.setenv("SPEECHBRAIN_JEPA_MODEL", str(encoder))
        for options in ("", '{"flat": true}', '{"step_seconds": 0.08}'):
            monkeypatch.setenv("SPEECHBRAIN_JEPA_OPTIONS", options)
            names += [type(xares.AudioJEPAEncoder()).__name__ for _ in range(2)]
    assert names[::2] == names[1::2]
    assert len(set(names)) == 6
    assert all(name.startswith("small_") and name.isidentifier() for name in names)


def test_options_that_do_not_fit_say_so(monkeypatch):
    for options, message in (
        ("0.04", "give a JSON object"),
        ("{step: 1}", "give a JSON object"),
        ('{"output_all_hiddens": true}', "one layer only"),
        ('{"step_seconds": 0.05}', "choose one of"),
    ):
        monkeypatch.setenv("SPEECHBRAIN_JEPA_OPTIONS", options)
        with pytest.raises(ValueError, match=message):
            xares.AudioJEPAEncoder()
