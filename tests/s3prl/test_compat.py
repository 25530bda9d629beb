"""What compat supplies is what s3prl names, does what it says, and only where it is missing."""

import ast
import importlib
import warnings
import wave

import numpy as np
import pytest
import torch
import torchaudio

from speechbrain_jepa.s3prl import compat

EFFECTS = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
# in code that no version of torchaudio since 0.9 can run, behind a test for older ones
NEVER = {"torchaudio.load_wav"}


def dotted(node):
    """a.b.c of an attribute, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (name := dotted(node.value)):
        return f"{name}.{node.attr}"
    return None


def names_of(tree):
    """What a module takes from torchaudio and huggingface_hub, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node) or ""


def resolves(name):
    module, *attributes = name.split(".")
    value = importlib.import_module(module)
    for attribute in attributes:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


def test_every_name_that_s3prl_uses_is_there(s3prl_folder):
    compat.supply()
    used = set()
    for file in s3prl_folder.rglob("*.py"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in its strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
        used |= {n for n in names_of(tree) if n.startswith(("torchaudio.", "huggingface_hub."))}
    assert {"torchaudio.sox_effects.apply_effects_file", "huggingface_hub.Repository"} <= used
    assert {name for name in used if not resolves(name)} <= NEVER


def test_where_s3prl_works_nothing_is_replaced():
    """Run first thing in an interpreter of its own, so that nothing is supplied before."""
    import subprocess
    import sys

    code = """if True:
        import huggingface_hub, torchaudio, sys
        names = "set_audio_backend", "info", "load", "save", "sox_effects"
        before = {n: getattr(torchaudio, n) for n in names if hasattr(torchaudio, n)}
        before_hub = {n for n in ("HfFolder", "Repository") if hasattr(huggingface_hub, n)}
        from speechbrain_jepa.s3prl import compat
        supplied = compat.supply()
        assert compat.supply() is supplied
        changed = {n for n, value in before.items() if getattr(torchaudio, n) is not value}
        native = "set_audio_backend" in before
        # 2.9 and later have load and save, which need torchcodec
        assert changed <= (set() if native else {"load", "save"}), changed
        assert {f"torchaudio.{n}" for n in changed} <= set(supplied)
        assert all(f"huggingface_hub.{n}" not in supplied for n in before_hub)
        print(*supplied)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def stereo(tmp_path):
    """A wav file of 16-bit samples, written by the standard library, and these samples."""
    rng = np.random.default_rng(0)
    samples = rng.integers(-20_000, 20_000, (8_000, 2), dtype=np.int16)
    path = tmp_path / "stereo.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 8_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path, torch.from_numpy(samples.T.astype(np.float32) / 32_768)


def test_load_is_that_of_the_file(stereo):
    path, samples = stereo
    wav, rate = compat.load(path)
    assert rate == 8_000
    torch.testing.assert_close(wav, samples, rtol=0, atol=0)
    part, _ = compat.load(str(path), frame_offset=100, num_frames=50, channels_first=False)
    torch.testing.assert_close(part, samples[:, 100:150].T, rtol=0, atol=0)


def test_info_is_that_of_the_file(stereo, tmp_path):
    assert compat.info(stereo[0]) == (8_000, 8_000, 2, 16, "PCM_S")
    compat.save(tmp_path / "a.flac", stereo[1], 8_000)
    assert compat.info(tmp_path / "a.flac") == (8_000, 8_000, 2, 16, "FLAC")


@pytest.mark.skipif(
    not hasattr(torchaudio, "info"), reason="this torchaudio has no load and info to compare with"
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_load_save_and_info_are_torchaudios(tmp_path):
    if torchaudio.info is compat.info:
        pytest.skip("this torchaudio has no load and info to compare with")
    wav = torch.rand(2, 3_000) - 0.5
    for name in ("a.wav", "a.flac"):
        compat.save(str(tmp_path / name), wav, 22_050)
        theirs = torchaudio.info(str(tmp_path / name), backend="soundfile")
        assert compat.info(tmp_path / name) == tuple(vars(theirs).values())
        expected, rate = torchaudio.load(str(tmp_path / name))
        assert rate == 22_050
        torch.testing.assert_close(compat.load(tmp_path / name)[0], expected, rtol=0, atol=1e-4)


def test_saved_samples_come_back(tmp_path):
    wav = torch.randn(1, 900, requires_grad=True)
    compat.save(str(tmp_path / "a.wav"), wav, 16_000)
    torch.testing.assert_close(compat.load(tmp_path / "a.wav")[0], wav.detach(), rtol=0, atol=0)


def test_effects_on_a_tone(tmp_path):
    """The mean of two channels, at twice the rate, 3 dB down: the same tone, all of it."""
    time = np.arange(8_000) / 8_000
    tone = np.stack([0.6 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 440 * time)])
    tone = torch.from_numpy(tone.astype(np.float32))
    wav, rate = compat.apply_effects_tensor(tone, 8_000, EFFECTS)
    expected = 0.4 * 10 ** (-3 / 20) * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert rate == 16_000 and wav.shape == (1, 16_000)
    inside = slice(400, -400)
    np.testing.assert_allclose(wav[0, inside], expected[inside], atol=1e-3)

    compat.save(str(tmp_path / "tone.wav"), tone, 8_000)
    from_file, rate = compat.apply_effects_file(str(tmp_path / "tone.wav"), effects=EFFECTS)
    torch.testing.assert_close(from_file, wav)
    turned, _ = compat.apply_effects_tensor(tone.T, 8_000, EFFECTS, channels_first=False)
    torch.testing.assert_close(turned, wav.T)


def test_gain_clips_as_sox_does():
    wav = torch.tensor([[0.1, 0.9, -0.9]])
    louder, _ = compat.apply_effects_tensor(wav, 16_000, [["gain", "6"]])
    torch.testing.assert_close(louder, torch.tensor([[0.1 * 10**0.3, 1.0, -1.0]]))


@pytest.mark.parametrize(
    "effect",
    [
        ["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"],
        ["norm"],
        ["reverse"],
        ["gain", "-n"],
        ["gain", "-n", "-3"],
        ["rate", "-v", "16000"],
        ["channels", "3"],
    ],
    ids=" ".join,
)
def test_other_effects_are_named(effect):
    with pytest.raises(NotImplementedError, match=f"sox effect {' '.join(effect)!r}: .*libsox"):
        compat.apply_effects_tensor(torch.zeros(2, 100), 16_000, [["channels", "1"], effect])


def test_a_repository_says_what_it_needs():
    with pytest.raises(NotImplementedError, match=r"push_to_hf_hub needs huggingface_hub < 1"):
        compat.Repository(local_dir=".", clone_from="someone/tiny")


def test_the_stored_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    assert compat.HfFolder.get_token() == "token"
    kept = []
    monkeypatch.setattr("huggingface_hub.login", kept.append)
    compat.HfFolder.save_token("new")
    assert kept == ["new"]
