"""s3prl's emotion downstream, from raw files in the layout of IEMOCAP to the accuracy it prints."""

import re

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
import yaml

RATE = 16_000
STEPS = 40
LABELS = ("neu", "hap", "ang", "sad")
CHANCE = 1 / len(LABELS)
SESSIONS, CLIPS = 5, 6  # of each label in each session


def make_sound(label, rng):
    """One second or so: a low tone, a high tone, noise, or clicks."""
    time = np.arange(rng.integers(RATE // 2, RATE)) / RATE
    if label == "neu":
        wav = np.sin(2 * np.pi * rng.uniform(150, 300) * time)
    elif label == "hap":
        wav = np.sin(2 * np.pi * rng.uniform(2_000, 4_000) * time)
    elif label == "ang":
        wav = rng.standard_normal(len(time))
    else:
        wav = (rng.uniform(size=len(time)) < 20 / RATE).astype(float)
    return 0.3 * wav + 0.01 * rng.standard_normal(len(time))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, launch, s3prl_folder):
    """Session<n>/sentences/wav/<dialog>/<utterance>.wav and Session<n>/dialog/EmoEvaluation."""
    folder, rng = tmp_path_factory.mktemp("iemocap") / "IEMOCAP", np.random.default_rng(0)
    for session in range(1, SESSIONS + 1):
        dialog = f"Ses0{session}F_impro01"
        wavs = folder / f"Session{session}" / "sentences" / "wav" / dialog
        labels = folder / f"Session{session}" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        wavs.mkdir(parents=True)
        labels.parent.mkdir(parents=True)
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"]
        for number, label in enumerate(LABELS * CLIPS):
            name = f"{dialog}_F{number:03d}"
            soundfile.write(wavs / f"{name}.wav", make_sound(label, rng), RATE, "PCM_16")
            lines.append(f"[{number}.0 - {number + 1}.0]\t{name}\t{label}\t[2.5, 2.5, 2.5]")
        labels.write_text("\n".join(lines) + "\n")
    launch("downstream/emotion/IEMOCAP_preprocess.py", folder, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    """What the task is given with -c."""
    content = {
        "runner": {
            "total_steps": STEPS,
            "gradient_clipping": 1,
            "gradient_accumulate_steps": 1,
            "log_step": STEPS // 2,
            "eval_step": STEPS,
            "save_step": STEPS,
            "max_keep": 1,
            "eval_dataloaders": ["dev", "test"],
        },
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 2e-3},
        "downstream_expert": {
            "datarc": {
                "root": str(corpus),
                "meta_data": str(corpus / "meta_data"),
                "test_fold": "fold1",
                "pre_load": True,
                "train_batch_size": 8,
                "eval_batch_size": 8,
                "num_workers": 1,
                "valid_ratio": 0.2,
            },
            "modelrc": {
                "projector_dim": 32,
                "select": "UtteranceLevel",
                "UtteranceLevel": {"pooling": "MeanPooling"},
            },
        },
    }
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def arguments(encoder_folder, config):
    upstream = ("-u", "audio_jepa", "-k", encoder_folder)
    return ("-m", "train", *upstream, "-d", "emotion", "-c", config, "-n", "er", "--device", "cpu")


EVALUATE = ("-m", "evaluate", "-e", f"result/downstream/er/states-{STEPS}.ckpt", "--device", "cpu")


def printed_accuracy(done, split):
    """What s3prl printed last for a split."""
    return float(re.findall(rf"^{split} acc: (\S+)$", done.stdout, re.MULTILINE)[-1])


@pytest.fixture
def check(capsys):
    """Above chance, and the saved checkpoint gives the accuracy that training ended with."""

    def check(way, trained, evaluated):
        dev, test = (printed_accuracy(trained, split) for split in ("dev", "test"))
        again = printed_accuracy(evaluated, "test")
        versions = f"torch {torch.__version__}, huggingface_hub {huggingface_hub.__version__}"
        accuracy = f"dev {dev:.3f}, test {test:.3f}, from the checkpoint {again:.3f}"
        with capsys.disabled():
            print(f"\n{versions}, {way}: emotion {accuracy}")
        assert min(dev, test) > 2 * CHANCE
        assert again == test

    return check


def test_through_the_launcher(launch, arguments, check, tmp_path):
    trained = launch("run_downstream.py", *arguments, cwd=tmp_path)
    evaluated = launch("run_downstream.py", *EVALUATE, cwd=tmp_path)
    check("launcher", trained, evaluated)


def test_without_k_on_the_encoder_that_comes_along(launch, arguments, tmp_path):
    at = arguments.index("-k")
    trained = launch("run_downstream.py", *arguments[:at], *arguments[at + 2 :], cwd=tmp_path)
    assert min(printed_accuracy(trained, split) for split in ("dev", "test")) > 2 * CHANCE


def test_enabled_and_fine_tuned(environment, arguments, check, s3prl_folder, tmp_path):
    """Plain python on s3prl's own script, which also trains the encoder (-f) and saves it."""
    script = s3prl_folder / "run_downstream.py"
    environment.run("-m", "speechbrain_jepa.s3prl", "enable")
    fine_tuned = (*arguments, "-f", "-s", "last_hidden_state")
    trained = environment.run(script, *fine_tuned, cwd=tmp_path)
    evaluated = environment.run(script, *EVALUATE, cwd=tmp_path)
    check("enabled, fine-tuned", trained, evaluated)
