"""The ONNX file: what onnxruntime computes from it is what AudioJEPA computes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_jepa import AudioJEPA, export, onnx_export
from speechbrain_jepa.checkpoints import load_pretrained, save_pretrained, write_config
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.onnx_export import EncoderGraph, PowerSpectrum, export_onnx
from speechbrain_jepa.read_out import ReadOut
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WINDOW = 208 * 160  # samples
LENGTHS = [1, 2, 150, 2_560, 2_561, 16_000, WINDOW, WINDOW + 1, 2 * WINDOW, 100_003]


def make_source(seed=0, depth=2, dim=24, **options):
    torch.manual_seed(seed)
    grid = PatchGrid(**options.pop("grid", {}))
    return Encoder(grid, dim=dim, depth=depth, num_heads=3, **options), Normalization(-7.06, 4.19)


def make_model(**options):
    return AudioJEPA(make_source(), **options)


def clips(samples, lengths, seed=0):
    wav = 0.1 * torch.randn(len(lengths), samples, generator=torch.Generator().manual_seed(seed))
    return wav, torch.tensor(lengths)


def run(session, wav, lengths):
    feed = {"waveform": wav.numpy(), "lengths": lengths.numpy()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed)))


def assert_equal_to_torch(session, model, wav, lengths, tolerance=1e-4):
    out = run(session, wav, lengths)
    wav_lens = lengths.double() / wav.shape[1]
    expected = {
        "steps": model(wav, wav_lens),
        "clip_embedding": model.embed(wav, wav_lens),
        "num_steps": model.num_steps(lengths),
    }
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value.numpy(), rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    source = save_pretrained(folder / "pretrained", *make_source(), {"steps": 7})
    export.main([str(source), "--onnx", str(folder / "encoder.onnx")])
    return folder / "encoder.onnx"


@pytest.fixture(scope="module")
def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_one_clip_of_any_length(session):
    model = make_model()
    for samples in LENGTHS:
        assert_equal_to_torch(session, model, *clips(samples, [samples]))


def test_clips_of_all_lengths_in_one_batch(session):
    assert_equal_to_torch(session, make_model(), *clips(max(LENGTHS), LENGTHS))
    assert_equal_to_torch(session, make_model(), *clips(4_000, [4_000, 1, 2_999]))


def test_what_is_behind_a_clip_changes_nothing(session):
    wav, lengths = clips(50_000, [50_000, 9_000, 700])
    expected = run(session, wav, lengths)
    for clip, length in enumerate(lengths.tolist()):
        wav[clip, length:] = torch.nan
    for name, value in run(session, wav, lengths).items():
        np.testing.assert_array_equal(value, expected[name])


def test_silence_faint_sound_and_clipping(session):
    time = torch.arange(40_000) / 16_000
    tone = torch.sin(2 * torch.pi * 440 * time)
    wav = torch.stack([torch.zeros_like(tone), 1e-4 * tone, (8 * tone).clamp(-1, 1)])
    assert_equal_to_torch(session, make_model(), wav, torch.tensor([40_000] * 3))


def test_powers_beside_a_pure_tone_are_as_exact_as_float32_can_be():
    """There float32's rounding shows most: torch's own transform is compared with float64's too."""
    time = torch.arange(40_000) / 16_000
    frames = torch.sin(2 * torch.pi * 440 * time).unfold(0, 400, 160)
    windowed = frames * torch.hann_window(400)
    exact = torch.fft.rfft(windowed.double()).abs().square()
    torchs = torch.fft.rfft(windowed).abs().square()
    ours = PowerSpectrum()(frames)[:, :201]
    assert (ours - exact).abs().max() < 1e-6 * exact.max()
    floor = 1e-12 * exact.max()
    errors = [((power + floor).log() - (exact + floor).log()).abs() for power in (ours, torchs)]
    assert errors[0].mean() < 5 * errors[1].mean()


def test_the_file_says_what_goes_in_and_what_comes_out(file, session):
    proto = onnx.load(file)
    values = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    shapes = {
        name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for name, value in values.items()
    }
    assert shapes == {
        "waveform": ["batch", "samples"],
        "lengths": ["batch"],
        "steps": ["batch", "steps", 120],
        "clip_embedding": ["batch", 120],
        "num_steps": ["batch"],
    }
    assert all(value.doc_string for value in values.values())
    facts = session.get_modelmeta().custom_metadata_map
    config = json.loads(facts.pop("config"))
    assert config["training"] == {"steps": 7}
    assert config["encoder"]["depth"] == 2
    assert facts == {
        "sample_rate": "16000",
        "samples_per_step": "2560",
        "step_seconds": "0.16",
        "first_step_center_seconds": "0.075",
        "window_samples": "33280",
        "dims": "120",
        "embedding_dims": "120",
        "normalization": "pretraining",
    }


def test_the_package_is_not_needed_to_run_it(file):
    code = f"""
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession({str(file)!r}, providers=["CPUExecutionProvider"])
feed = {{"waveform": numpy.zeros((1, 9000), "float32"), "lengths": numpy.array([9000])}}
assert session.run(["clip_embedding"], feed)[0].shape == (1, 120)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


OPTIONS = [
    {},
    {"step_seconds": 0.04},
    {"step_seconds": 0.01, "flat": True},
    {"output_norm": True},
    {"normalization": "instance"},
    {"layers": "all", "pooling": "mean_std", "step_seconds": 0.08},
    {"layers": [0, 2], "output_norm": True, "pooling": "mean_std", "flat": True},
    {"normalization": "instance", "step_seconds": 0.08, "output_norm": True, "flat": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_graph_computes_what_audio_jepa_computes(options):
    """In torch, without the exporter: every option, every kind of length."""
    model = make_model(**options)
    graph = EncoderGraph(model)
    for samples, lengths in ((WINDOW + 5_000, [WINDOW + 5_000, 1, 9_999]), (7_000, [7_000, 6_000])):
        wav, lengths = clips(samples, lengths)
        steps, embedding, num_steps = graph(wav, lengths)
        wav_lens = lengths.double() / samples
        torch.testing.assert_close(steps, model(wav, wav_lens), rtol=0, atol=2e-5)
        torch.testing.assert_close(embedding, model.embed(wav, wav_lens), rtol=0, atol=2e-5)
        assert torch.equal(num_steps, model.num_steps(lengths))


def test_gradient_checkpointing_is_left_out():
    model = make_model(freeze=False, gradient_checkpointing=True)
    assert all("forward" not in block.__dict__ for block in EncoderGraph(model).encoder.blocks)
    wav, lengths = clips(9_000, [9_000])
    out = EncoderGraph(model)(wav, lengths)[1]
    torch.testing.assert_close(out, make_model().embed(wav), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": True, "stored_positions": True},
        {"grid": {"frames": 64, "patch_time": 4}},
        {"grid": {"frames": 64, "patch_time": 2, "patch_frequency": 80}},
    ],
    ids=str,
)
def test_the_graph_of_other_encoders(options):
    model = AudioJEPA(make_source(**options))
    wav, lengths = clips(30_000, [30_000, 15_001])
    steps, embedding, _ = EncoderGraph(model)(wav, lengths)
    torch.testing.assert_close(steps, model(wav, lengths / 30_000), rtol=0, atol=2e-5)
    torch.testing.assert_close(embedding, model.embed(wav, lengths / 30_000), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("n_fft", "n_mels"), [(1024, 128), (600, 64), (302, 48)])
def test_the_graph_of_other_log_mels(n_fft, n_mels):
    """302 is twice a prime, 600 is no square."""
    source = make_source(grid={"frames": 64, "bands": n_mels})
    model = AudioJEPA((*source, LogMelSpectrogram(n_fft, n_mels)), step_seconds=0.04)
    wav, lengths = clips(20_000, [20_000, 1, 13_001])
    steps, embedding, _ = EncoderGraph(model)(wav, lengths)
    torch.testing.assert_close(steps, model(wav, lengths / 20_000), rtol=0, atol=2e-5)
    torch.testing.assert_close(embedding, model.embed(wav, lengths / 20_000), rtol=0, atol=2e-5)


def test_the_read_out_of_a_folder_and_of_the_command_reach_the_file(tmp_path, monkeypatch):
    """And the moving average of a training run is exported where it is asked for."""
    written = {}

    def write(model, path, half):
        written.update(model=model, half=half)
        return path

    monkeypatch.setattr(onnx_export, "export_onnx", write)
    encoder, normalization = make_source()
    read_out = ReadOut("all", "mean_std")
    folder = save_pretrained(tmp_path / "folder", encoder, normalization, {}, read_out)
    export.main([str(folder), "--onnx", "e.onnx"])
    assert (written["model"].get_output_dim(), written["model"].embedding_dim) == (120, 720)
    export.main([str(folder), "--onnx", "e.onnx", "--half", "--layers", "0,2"])
    assert written["model"].step_layers == written["model"].embed_layers == [0, 2]
    assert written["half"]
    predictor = Predictor(encoder.grid, encoder_dim=24, dim=16, depth=1, num_heads=2)
    jepa = JEPA(encoder, predictor, SmoothL1())
    jepa.target_encoder.norm.bias.data.add_(1)
    write_config(tmp_path / "run" / "encoder_config.json", encoder, normalization, {})
    Checkpointer(tmp_path / "run" / "save", {"jepa": jepa}).save_checkpoint()
    export.main([str(tmp_path / "run"), "--onnx", "e.onnx"])
    assert not written["model"].encoder.norm.bias.any()
    export.main([str(tmp_path / "run"), "--onnx", "e.onnx", "--target-encoder"])
    assert (written["model"].encoder.norm.bias == 1).all()
    out = tmp_path / "out"
    export.main([str(tmp_path / "run"), str(out), "--onnx", "e.onnx", "--target-encoder"])
    assert (written["model"].encoder.norm.bias == 1).all()
    assert (load_pretrained(out)[0].norm.bias == 1).all()


def test_half_size_finer_steps_and_each_clips_own_normalisation_by_the_command(tmp_path):
    encoder, normalization = make_source(depth=1, dim=48, class_token=True)
    encoder.half().float()  # what float16 holds is what is compared
    source = save_pretrained(tmp_path / "pretrained", encoder, normalization)
    path = tmp_path / "encoder.onnx"
    options = ["--half", "--step", "0.04", "--flat", "--normalization", "instance"]
    export.main([str(source), "--onnx", str(path), *options])
    weights = 2 * sum(p.numel() for p in encoder.parameters())
    fixed = 4 * 80 * 220  # mel filters, in float32
    assert path.stat().st_size < fixed + weights + 80_000  # the graph itself
    assert b"onnx_export.py" not in path.read_bytes()  # no paths of the machine that wrote it
    model = AudioJEPA(source, step_seconds=0.04, flat=True, normalization="instance")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for samples in (5_000, 70_000):
        wav, lengths = clips(samples, [samples, samples // 2, 3])
        # divided by a clip's own deviation, rounding in the log-mel grows with the values: what the
        # command itself allows
        largest = model(wav, lengths.double() / samples).abs().max().item()
        assert_equal_to_torch(session, model, wav, lengths, 1e-4 * max(1.0, largest))
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["samples_per_step"], facts["normalization"]) == ("640", "instance")


def test_a_file_that_computes_something_else_is_not_written(file, tmp_path, monkeypatch):
    wrong = onnx.load(file)
    monkeypatch.setattr(onnx_export, "_exported", lambda graph: wrong)
    path = tmp_path / "other.onnx"
    path.write_text("what was there")
    with pytest.raises(RuntimeError, match=r"other.onnx: steps in onnxruntime differ .* 0\.0001"):
        export_onnx(AudioJEPA(make_source(seed=1)), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


# Errors


def test_what_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_exported", lambda graph: pytest.fail("exported"))
    with pytest.raises(ValueError, match=r"encoder\.pt: the name of an ONNX file ends in \.onnx"):
        export_onnx(make_model(), tmp_path / "encoder.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, to write e\.onnx in"):
        export_onnx(make_model(), tmp_path / "nowhere" / "e.onnx")
    with pytest.raises(ValueError, match="use layers='all'"):
        export_onnx(make_model(output_all_hiddens=True), tmp_path / "e.onnx")
    with pytest.raises(RuntimeError, match="call fit_normalization"):
        export_onnx(make_model(normalization="dataset"), tmp_path / "e.onnx")
    monkeypatch.setattr(onnx_export, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"more than the 2 GiB of an ONNX file: half=True"):
        export_onnx(make_model(), tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_says_what_to_install(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"export: .*pip install '\.\[onnx\]'"):
        export.main(["tiny", "--onnx", str(tmp_path / "e.onnx")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "name a pretrained folder to write, or --onnx FILE"),
        (["tiny", "out", "--step", "0.04"], "--step is for --onnx FILE"),
        (["tiny", "out", "--flat"], "--flat is for --onnx FILE"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        export.main(arguments)
    assert message in capsys.readouterr().err


def test_a_step_that_does_not_fit_names_those_that_do(tmp_path):
    with pytest.raises(SystemExit, match=r"export: step_seconds=0\.05: .* 0\.04"):
        export.main(["tiny", "--onnx", str(tmp_path / "e.onnx"), "--step", "0.05"])


def test_the_encoder_in_the_box_keeps_its_float16(file):
    """Its parameters are float16: half the size changes nothing."""
    encoder, _, _ = load_pretrained(None)
    for parameter in encoder.parameters():
        assert torch.equal(parameter, parameter.half().float())
