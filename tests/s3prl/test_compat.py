"""What compat supplies is what s3prl names, does what it says, and only where it is missing."""

import ast
import importlib
import importlib.util
import os
import shutil
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
    """What a module takes from other packages, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node) or ""


def resolves(name):
    """Whether it is a module, or an attribute of something that resolves."""
    module, *attributes = name.split(".")
    value = importlib.import_module(module)
    for attribute in attributes:
        module = f"{module}.{attribute}"
        if not hasattr(value, attribute):
            try:
                importlib.import_module(module)
            except ImportError:
                return False
        value = getattr(value, attribute)
    return True


def test_every_name_that_s3prl_uses_is_there(s3prl_folder):
    compat.supply()
    packages = ("torchaudio.", "huggingface_hub.", "catalyst.")
    used = set()
    for file in s3prl_folder.rglob("*.py"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in its strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
        used |= {n for n in names_of(tree) if n.startswith(packages)}
    assert {
        "torchaudio.sox_effects.apply_effects_file",
        "huggingface_hub.Repository",
        "catalyst.data.sampler.DistributedSamplerWrapper",
    } <= used
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


OTHERS = [
    ["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"],
    ["norm"],
    ["reverse"],
    ["gain", "-n"],
    ["gain", "-n", "-3"],
    ["rate", "-v", "16000"],
    ["channels", "3"],
]


@pytest.mark.parametrize("effect", OTHERS, ids=" ".join)
def test_without_the_program_sox_other_effects_are_named(effect, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        NotImplementedError, match=f"sox effect {' '.join(effect)!r}: .*apt install"
    ):
        compat.apply_effects_tensor(torch.zeros(2, 100), 16_000, [["channels", "1"], effect])


@pytest.fixture
def sox():
    """CI installs it: there it must not be missing."""
    if shutil.which("sox") is None and not os.environ.get("CI"):
        pytest.skip("there is no program sox: apt install sox")


@pytest.fixture
def two_tones():
    """Half a second of tone, a second of silence, half a second of tone, at 8 kHz in stereo."""
    tone = 0.5 * torch.sin(torch.arange(4_000) * 0.3)
    return torch.cat([tone, torch.zeros(8_000), tone]).repeat(2, 1)


def test_silence_is_cut_by_the_program(sox, two_tones, tmp_path):
    """The chain of speaker verification, to 0.1 s: all but what is left of the silence."""
    effects = [*EFFECTS, OTHERS[0]]
    wav, rate = compat.apply_effects_tensor(two_tones, 8_000, effects)
    assert rate == 16_000 and wav.shape[0] == 1 and wav.dtype == torch.float32
    assert wav.shape[1] / rate == pytest.approx(1.1, abs=0.11)
    assert wav.abs().max() == pytest.approx(0.5 * 10 ** (-3 / 20), rel=0.02)
    compat.save(str(tmp_path / "a.wav"), two_tones, 8_000)
    from_file, _ = compat.apply_effects_file(str(tmp_path / "a.wav"), effects)
    torch.testing.assert_close(from_file, wav)
    turned, _ = compat.apply_effects_tensor(two_tones.T, 8_000, effects, channels_first=False)
    torch.testing.assert_close(turned, wav.T)


def test_the_program_reverses_without_noise_of_its_own(sox, two_tones):
    wav, rate = compat.apply_effects_tensor(two_tones, 8_000, [["reverse"]])
    assert rate == 8_000
    torch.testing.assert_close(wav, two_tones.flip(1), rtol=0, atol=1e-7)


def test_what_the_program_says_is_passed_on(sox, two_tones):
    with pytest.raises(RuntimeError, match=r"sox \[\['silence'\]\] failed:\n.*usage"):
        compat.apply_effects_tensor(two_tones, 8_000, [["silence"]])


def test_processes_share_what_another_sampler_draws():
    """Against the definition: every third of what is drawn, from the first, second, third on."""
    drawn = [3, 3, 1, 4, 0, 2, 2]
    parts = [
        list(compat.DistributedSamplerWrapper(drawn, 3, rank, shuffle=False)) for rank in range(3)
    ]
    filled = [*drawn, *drawn[:2]]  # to a multiple of three
    assert parts == [filled[rank::3] for rank in range(3)]
    shuffled = [n for rank in range(3) for n in compat.DistributedSamplerWrapper(drawn, 3, rank)]
    assert len(shuffled) == 9 and set(shuffled) == set(drawn)
    assert shuffled != [number for part in parts for number in part]


def test_catalyst_is_where_s3prl_looks_for_it():
    compat.supply()
    module = importlib.import_module("catalyst.data.sampler")
    assert module.DistributedSamplerWrapper(range(4), 2, 1, False).num_replicas == 2
    assert importlib.util.find_spec("catalyst") is not None  # what else looks for it gets no error


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
