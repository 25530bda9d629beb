"""The pretrained folder: whole or not there, read without running anything, errors that help."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_jepa import checkpoints
from speechbrain_jepa.checkpoints import (
    CARD,
    CONFIG,
    FILES,
    HYPERPARAMS,
    WEIGHTS,
    export_experiment,
    load_pretrained,
    newest_checkpoint,
    save_pretrained,
    write_config,
)
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.files import FolderInUse, whole_folder
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

TRAINING = {"masking": "UnstructuredMasking", "steps": 1800}


def make_encoder(seed=0, class_token=False, stored_positions=False, **grid):
    torch.manual_seed(seed)
    return Encoder(
        PatchGrid(**{"frames": 208, **grid}),
        dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        norm_eps=1e-5,
        class_token=class_token,
        stored_positions=stored_positions,
    )


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(
        tmp_path / "pretrained", make_encoder(), Normalization(-7.5, 4.25), TRAINING
    )


@pytest.fixture
def jepa():
    encoder = make_encoder()
    predictor = Predictor(encoder.grid, encoder_dim=24, dim=16, depth=1, num_heads=2)
    jepa = JEPA(encoder, predictor, SmoothL1())
    for parameter in jepa.target_encoder.parameters():
        parameter.data.add_(1)
    return jepa


@pytest.fixture
def experiment(tmp_path, jepa):
    """What a training run leaves: encoder_config.json and a checkpoint of SpeechBrain's."""
    folder = tmp_path / "experiment"
    write_config(
        folder / "encoder_config.json", jepa.context_encoder, Normalization(-7.5, 4.25), TRAINING
    )
    save_checkpoint(folder, jepa, epoch=1)
    return folder


def save_checkpoint(folder, jepa, **meta):
    checkpointer = Checkpointer(folder / "save", {"jepa": jepa})
    return checkpointer.save_checkpoint(meta=meta).path


def assert_same_parameters(encoder, expected):
    assert encoder.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)


def edit_config(folder, change):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Writing


def test_what_is_saved_is_what_is_loaded(folder):
    encoder, normalization, config = load_pretrained(folder)
    assert_same_parameters(encoder, make_encoder())
    assert encoder.config == make_encoder().config
    assert encoder.grid == make_encoder().grid
    assert (normalization.mean.item(), normalization.std.item()) == (-7.5, 4.25)
    assert config["training"] == TRAINING
    assert not encoder.training


@pytest.mark.parametrize("grid", [{"patch_time": 4}, {"patch_frequency": 80, "patch_time": 2}])
def test_other_grids_are_kept(grid, tmp_path):
    encoder = make_encoder(**grid)
    loaded, _, _ = load_pretrained(save_pretrained(tmp_path / "p", encoder, Normalization()))
    assert loaded.grid == encoder.grid
    spectrogram = torch.randn(1, 80, 208)
    torch.testing.assert_close(loaded(spectrogram), encoder(spectrogram), rtol=0, atol=0)


def test_class_token_and_stored_positions_are_kept(tmp_path):
    encoder = make_encoder(class_token=True, stored_positions=True)
    encoder.positions.mul_(0.5)
    loaded, _, _ = load_pretrained(save_pretrained(tmp_path / "p", encoder, Normalization()))
    assert loaded.config == encoder.config
    assert_same_parameters(loaded, encoder)
    spectrogram = torch.randn(1, 80, 208)
    torch.testing.assert_close(loaded(spectrogram), encoder(spectrogram), rtol=0, atol=0)


def test_a_config_from_before_class_tokens_is_one_without(folder):
    edit_config(folder, lambda config: config["encoder"].pop("class_token"))
    edit_config(folder, lambda config: config["encoder"].pop("stored_positions"))
    assert_same_parameters(load_pretrained(folder)[0], make_encoder())


def test_the_folder_has_four_files_and_float32_weights_of_the_encoder_alone(tmp_path):
    encoder = make_encoder().to(torch.bfloat16)
    folder = save_pretrained(tmp_path / "deep" / "pretrained", encoder, Normalization())
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    weights = load_file(folder / WEIGHTS)
    assert weights.keys() == encoder.state_dict().keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_every_file_can_be_read_by_whoever_may_read_new_files(folder):
    new = folder.parent / "new"
    new.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {new.stat().st_mode}


def test_the_model_card_names_the_training_and_valid_front_matter(folder):
    _, front, card = (folder / CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "speechbrain"
    assert "steps: 1800" in card
    assert "pip install ." in card and "pip install speechbrain-jepa" not in card  # no release yet
    for interface in ("WaveformEncoder.from_hparams", "-u audio_jepa", "AudioJEPA("):
        assert interface in card


def test_a_folder_is_replaced_as_a_whole(folder):
    save_pretrained(folder, make_encoder(seed=1), Normalization(), {"steps": 7})
    encoder, _, config = load_pretrained(folder)
    assert_same_parameters(encoder, make_encoder(seed=1))
    assert config["training"] == {"steps": 7}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("step", ["save_file", "model_card"])
def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(step, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, step, fail)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(folder, make_encoder(seed=1), Normalization())
    assert_same_parameters(load_pretrained(folder)[0], make_encoder())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


KILLED = """
import os, signal, sys
from speechbrain_jepa import checkpoints
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "half":
    checkpoints.model_card = die
else:  # between the two renames
    rename = os.rename
    os.rename = lambda old, new, **kw: die() if str(old).endswith("new") else rename(old, new, **kw)
encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
checkpoints.save_pretrained(sys.argv[1], encoder, Normalization())
"""


@pytest.mark.parametrize("when", ["half", "renames"])
def test_what_a_killed_export_left_goes_with_the_next_one(when, folder, tmp_path):
    other = tmp_path / "other"
    for target in (folder, other):
        command = [sys.executable, "-c", KILLED, target, when]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    leftovers = list(tmp_path.glob(".*"))
    assert len(leftovers) == 2
    if when == "renames":  # what was there waits beside; it is put back if the next one fails
        assert not folder.exists()
        with pytest.raises(ValueError, match="JSON"):
            broken = Normalization()
            broken.mean.fill_(float("nan"))
            save_pretrained(folder, make_encoder(), broken)
    assert_same_parameters(load_pretrained(folder)[0], make_encoder())
    save_pretrained(folder, make_encoder(seed=1), Normalization())
    assert_same_parameters(load_pretrained(folder)[0], make_encoder(seed=1))
    assert len(list(tmp_path.glob(".*"))) == 1  # that of the other export stays


def test_a_folder_that_another_process_writes_is_left_to_it(folder):
    with (
        whole_folder(folder) as partial,
        pytest.raises(FolderInUse, match=r"it is writing \S*pretrained: wait for it"),
    ):
        save_pretrained(folder, make_encoder(seed=1), Normalization())
    assert partial.parent != folder and not partial.exists()


def test_an_export_beside_another_is_one_line(experiment, tmp_path):
    from speechbrain_jepa.export import main

    out = tmp_path / "out"
    with whole_folder(out), pytest.raises(SystemExit, match=r"^export: .* is in use by process"):
        main([str(experiment), str(out)])


def test_a_full_disk_is_one_sentence_and_leaves_the_old_folder(small_disk):
    folder = small_disk / "p"
    save_pretrained(folder, make_encoder(), Normalization())
    encoder = Encoder(PatchGrid(frames=208), dim=96, depth=2, num_heads=3)  # 1.0 MB
    with pytest.raises(OSError, match=r"the disk of \S*disk is full .*free some space"):
        save_pretrained(folder, encoder, Normalization())
    assert_same_parameters(load_pretrained(folder)[0], make_encoder())
    assert list(small_disk.iterdir()) == [folder]


def test_a_config_that_cannot_be_written_leaves_the_old_one(experiment, jepa):
    path = experiment / "encoder_config.json"
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_config(path, jepa.context_encoder, Normalization(), {"loss": float("nan")})
    assert path.read_text() == before
    assert sorted(found.name for found in experiment.iterdir()) == [path.name, "save"]


def test_nothing_but_a_pretrained_folder_is_ever_replaced(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt.*name another folder"):
        save_pretrained(folder, make_encoder(), Normalization())
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_nan_normalisation_is_not_saved(tmp_path):
    normalization = Normalization()
    normalization.mean.fill_(float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        save_pretrained(tmp_path / "p", make_encoder(), normalization)
    assert list(tmp_path.iterdir()) == []


# Reading


def test_loading_runs_no_code_from_the_folder(folder, tmp_path):
    touched = tmp_path / "touched"
    (folder / HYPERPARAMS).write_text(f"x: !apply:pathlib.Path.touch [{touched}]\n")
    (folder / "model.py").write_text(f"open({str(touched)!r}, 'w')\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(touched)))
    load_pretrained(folder)
    assert not touched.exists()


def test_a_pickle_called_safetensors_is_refused_unopened(folder, tmp_path):
    touched = tmp_path / "touched"
    torch.save(Bomb(touched), folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        load_pretrained(folder)
    assert not touched.exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load_pretrained(folder)


def test_a_truncated_weights_file_is_named(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors .*damaged"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format_version=2), "format_version 2.*reads 1"),
        (lambda config: config.pop("format_version"), "no format_version"),
        (lambda config: config.pop("encoder"), "no 'encoder' section"),
        (lambda config: config["features"].update(hop_length=320), "hop_length=320.*computes 160"),
        (lambda config: config["features"].update(n_fft=90), "n_fft=90: expected .* from 160"),
        (lambda config: config["features"].update(n_mels=64), "n_mels=64: expected 80"),
        (lambda config: config["features"].update(n_fft=160), "hold no bin of .* n_fft=160"),
        (lambda config: config["encoder"].update(dims=24), "describes no encoder.*dims"),
        (lambda config: config["encoder"]["grid"].update(frames=200), "crop_frames=200"),
        (lambda config: config["normalization"].update(std=0), "std=0"),
        (lambda config: config["encoder"].update(dim=48), r"proj.bias is \(24,\), not \(48,\)"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(change, message, folder):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_a_config_that_is_not_json_is_named(folder):
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_pretrained(folder)


def test_missing_and_unknown_parameters_are_named(folder):
    weights = load_file(folder / WEIGHTS)
    weights["norm.gain"] = weights.pop("norm.weight")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"norm\.gain is unknown; norm\.weight is missing"):
        load_pretrained(folder)


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_pretrained(file)


# Experiments


@pytest.mark.parametrize("which", ["context", "target"])
def test_an_experiment_gives_either_encoder(which, experiment, jepa):
    encoder, normalization, config = load_pretrained(experiment, which=which)
    assert_same_parameters(encoder, getattr(jepa, f"{which}_encoder"))
    assert normalization.mean.item() == -7.5
    assert config["training"]["encoder"] == which
    assert config["training"]["checkpoint"]["epoch"] == 1


def test_the_newest_complete_checkpoint_is_taken(experiment, jepa):
    for parameter in jepa.parameters():
        parameter.data.mul_(2)
    newest = save_checkpoint(experiment, jepa, epoch=2)
    for name, missing in {"later": "CKPT.yaml", "latest": "jepa.ckpt"}.items():
        broken = experiment / "save" / f"CKPT+9999-{name}"
        broken.mkdir()
        for file in newest.iterdir():
            if file.name != missing:
                (broken / file.name).write_bytes(file.read_bytes())
    assert newest_checkpoint(experiment)[0] == newest
    assert_same_parameters(load_pretrained(experiment)[0], jepa.context_encoder)


def test_an_experiment_without_a_checkpoint_says_so(experiment):
    (newest_checkpoint(experiment)[0] / "CKPT.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        load_pretrained(experiment)


def test_checkpoints_are_read_without_running_code(experiment, tmp_path):
    touched = tmp_path / "touched"
    checkpoint, _ = newest_checkpoint(experiment)
    state = checkpoint / "jepa.ckpt"
    torch.save({"context_encoder.norm.weight": Bomb(touched)}, state)
    with pytest.raises(ValueError, match=r"jepa\.ckpt is not a state dict"):
        load_pretrained(experiment)
    meta = checkpoint / "CKPT.yaml"
    meta.write_text(f"unixtime: !!python/object/apply:pathlib.Path.touch [{touched}]\n")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_pretrained(experiment)
    assert not touched.exists()


def test_export_writes_the_context_encoder_unless_told_otherwise(experiment, jepa, tmp_path):
    encoder, _, _ = load_pretrained(export_experiment(experiment, tmp_path / "context"))
    assert_same_parameters(encoder, jepa.context_encoder)
    out = tmp_path / "target"
    command = ["-m", "speechbrain_jepa.export", experiment, out, "--target-encoder"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert_same_parameters(load_pretrained(out)[0], jepa.target_encoder)


def test_half_precision_halves_the_file_and_loads_as_float32(experiment, jepa, tmp_path):
    from speechbrain_jepa.export import main

    whole = export_experiment(experiment, tmp_path / "whole")
    main([str(experiment), str(tmp_path / "half"), "--half"])
    sizes = [(f / "model.safetensors").stat().st_size for f in (whole, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    parameters = [
        dict(load_pretrained(f)[0].named_parameters()) for f in (whole, tmp_path / "half")
    ]
    for name, parameter in parameters[1].items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameters[0][name].half().float())


def test_export_of_something_else_is_one_line(folder, tmp_path, capsys):
    from speechbrain_jepa.export import main

    with pytest.raises(SystemExit, match=r"has no encoder_config\.json"):
        main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# Hugging Face


def test_a_hugging_face_repo_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    """The cache has the layout of huggingface_hub; nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--someone--audio-jepa"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    encoder, _, _ = load_pretrained("someone/audio-jepa", save_path=tmp_path / "cache")
    assert_same_parameters(encoder, make_encoder())
    with pytest.raises(FileNotFoundError, match=r"someone/else: no such folder, and as a Hugging"):
        load_pretrained("someone/else", save_path=tmp_path / "cache")


def test_only_config_and_weights_are_asked_of_hugging_face(folder, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_pretrained("someone/audio-jepa", save_path="cache")
    expected = {"repo": "someone/audio-jepa", "cache_dir": "cache"}
    assert asked == {**expected, "allow_patterns": [CONFIG, WEIGHTS]}
