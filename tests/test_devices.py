"""Everything computes on the device it was put on, and waits for it only where it must.

On a stand-in for a GPU always, and on a GPU where there is one.
"""

import types
from collections import Counter

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import torch.nn.functional as F
from speechbrain.utils.train_logger import FileTrainLogger
from stand_in_gpu import DEVICE, OnGPU, stand_in_gpu

from speechbrain_jepa import AudioJEPA, attention, hear
from speechbrain_jepa.attention import FLASH_ATTN, Packing, Rows
from speechbrain_jepa.brain import JEPABrain
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.crops import CropBatch
from speechbrain_jepa.evaluation.labelled import LabelledClips
from speechbrain_jepa.evaluation.linear_probe import Protocol, probe
from speechbrain_jepa.evaluation.logmel import logmel_statistics
from speechbrain_jepa.evaluation.online_probe import OnlineProbe
from speechbrain_jepa.evaluation.sources import load_source
from speechbrain_jepa.evaluation.store import Features
from speechbrain_jepa.features import LogMelSpectrogram, Normalization, crop_samples
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import MultiBlockMasking, TimeMasking, UnstructuredMasking
from speechbrain_jepa.regularizers import SIGReg, VarianceCovariance
from speechbrain_jepa.s3prl.expert import UpstreamExpert
from speechbrain_jepa.schedules import LinearRamp, WarmupCosine
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

GRID = PatchGrid(frames=208)
STRATEGIES = (UnstructuredMasking, MultiBlockMasking, TimeMasking)
CLIPS = 4


@pytest.fixture
def stand_in(monkeypatch):
    with stand_in_gpu(monkeypatch) as gpu:
        yield gpu


real = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["stand-in", pytest.param("real", marks=real)])
def gpu(request):
    """Whether the GPU is real."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return request.param == "real"


def make_encoder(**options):
    torch.manual_seed(0)
    return Encoder(GRID, dim=24, depth=2, num_heads=3, **options)


@pytest.fixture
def pretrained(tmp_path):
    return save_pretrained(tmp_path / "tiny", make_encoder(), Normalization(-7.06, 4.19))


def clips(*seconds):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([round(16_000 * s) for s in seconds])
    wav = torch.randn(len(lengths), int(lengths.max()), generator=generator)
    return wav, lengths / lengths.max()


# --- the stand-in -----------------------------------------------------------------------------


def test_the_stand_in_refuses_what_a_gpu_refuses(gpu):
    x = torch.rand(3, 4, device=DEVICE)
    assert isinstance(x, OnGPU) != gpu and (x @ x.T).device == DEVICE
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        x + torch.rand(3, 4)
    with pytest.raises(TypeError, match=r"use Tensor\.cpu"):
        np.asarray(x)
    assert (x + torch.tensor(1.0))[torch.tensor([0, 2])].shape == (2, 4)  # both allowed


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.zeros(3).copy_(x),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_the_stand_in_notes_what_the_host_waits_for(stand_in, waiting, inference):
    with torch.inference_mode(inference):
        x = torch.ones(3, device=DEVICE)
        (x * 2).sum().add_(1)
        assert stand_in.waits == []
        waiting(x)
        assert stand_in.waits == ["test_devices.py:<lambda>"]


# --- pretraining ------------------------------------------------------------------------------


def make_brain(tmp_path, strategy, device, precision="fp32", log_interval=100, regularizer=None):
    torch.manual_seed(0)
    jepa = JEPA(
        Encoder(GRID, dim=24, depth=2, num_heads=3),
        Predictor(GRID, encoder_dim=24, dim=24, depth=2, num_heads=3),
        SmoothL1(),
        regularizer=regularizer,
    )
    brain = JEPABrain(
        {
            "jepa": jepa,
            "features": LogMelSpectrogram(),
            "normalization": Normalization(-9.0, 4.0),
        },
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        {
            "masking": strategy(GRID),
            "learning_rate_schedule": WarmupCosine(1e-3, warmup_share=0.0),
            "ema_schedule": LinearRamp(0.9, 0.99),
            "seed": 0,
            "batch_size": CLIPS,
            "log_interval": log_interval,
            "collapse_share": 0.1,
            "output_folder": str(tmp_path),
            "train_logger": FileTrainLogger(str(tmp_path / "train_log.txt")),
        },
        {
            "device": str(device),
            "noprogressbar": True,
            "precision": precision,
            "eval_precision": precision,
        },
    )
    brain.init_optimizers()
    brain.epoch, brain.total_steps = 1, 10
    return brain


def train_one_step(brain):
    generator = torch.Generator().manual_seed(1)
    wav = torch.randn(CLIPS, crop_samples(GRID.frames), generator=generator)
    brain.modules.train()
    brain.step += 1
    return brain.fit_batch(CropBatch(wav, torch.arange(CLIPS)))


def on_host(tensor):
    return (tensor.host if isinstance(tensor, OnGPU) else tensor.cpu()).detach()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pretraining_step_stays_on_its_device(gpu, tmp_path, strategy):
    """On the stand-in, which draws the CPU's masks, loss and weights are those of the CPU."""
    theirs, ours = (make_brain(tmp_path, strategy, device) for device in ("cpu", DEVICE))
    losses = [on_host(train_one_step(brain)) for brain in (theirs, ours)]
    if gpu:
        assert losses[1].isfinite()
        assert {parameter.device for parameter in ours.jepa.parameters()} == {DEVICE}
        return
    torch.testing.assert_close(*losses)
    parameters = dict(theirs.jepa.named_parameters())
    for name, parameter in ours.jepa.named_parameters():
        assert parameter.device == DEVICE
        torch.testing.assert_close(on_host(parameter), parameters[name].detach(), msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("regularizer", [None, VarianceCovariance, SIGReg])
def test_an_unstructured_step_waits_for_nothing_and_an_interval_once(
    stand_in, tmp_path, precision, regularizer
):
    brain = make_brain(
        *(tmp_path, UnstructuredMasking, DEVICE, precision),
        log_interval=3,
        regularizer=regularizer and regularizer(),
    )
    train_one_step(brain)  # the optimiser makes its state
    stand_in.waits.clear()
    train_one_step(brain)
    assert stand_in.waits == []
    train_one_step(brain)
    assert stand_in.waits == ["monitors.py:look"]
    (row,) = brain.metrics.read()
    assert float(row["train_gradient_norm"]) > 0 and float(row["train_loss"]) > 0


class BrokenOnce(SmoothL1):
    """A loss of infinity in the second batch."""

    calls = 0

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args) + (float("inf") if self.calls == 2 else 0.0)


@pytest.mark.parametrize("device", ["cpu", DEVICE], ids=str)
def test_a_step_that_is_not_finite_is_skipped_without_asking_the_device(
    stand_in, tmp_path, caplog, device
):
    """Weights, target, what it rounded off, moments and their count stay; one look tells of it."""
    brain = make_brain(tmp_path, UnstructuredMasking, device, log_interval=3)
    brain.jepa.loss = BrokenOnce()
    train_one_step(brain)
    before = [on_host(tensor).clone() for tensor in state_of(brain)]
    stand_in.waits.clear()
    train_one_step(brain)
    assert stand_in.waits == [] and "skipped" not in caplog.text
    assert len(before) > 100
    for ours, theirs in zip(state_of(brain), before, strict=True):
        assert torch.equal(on_host(ours), theirs)
    train_one_step(brain)
    assert "Step 2 skipped" in caplog.text
    assert (brain.nonfinite_streak, brain.nonfinite_total) == (0, 1)
    changed = [
        not torch.equal(on_host(ours), theirs)
        for ours, theirs in zip(brain.jepa.context_encoder.parameters(), before)
    ]
    assert all(changed)


def state_of(brain):
    """All that a step changes, the context encoder's weights first."""
    moments = [value for state in brain.optimizer.state.values() for value in state.values()]
    return [*brain.jepa.context_encoder.parameters(), *brain.jepa.parameters(), *moments]


def flash_attn_func(q, k, v):
    parts = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """All tokens against all, those of other rows masked out."""
    row = torch.searchsorted(cu_seqlens_q, torch.arange(len(q), device=q.device), right=True)
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=row[:, None] == row)
    return out[0].transpose(0, 1)


@pytest.fixture
def flash_attn(monkeypatch):
    module = types.ModuleType(next(iter(FLASH_ATTN)))
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setattr(attention, "_flash_attn_module", lambda: module)


@pytest.mark.parametrize("strategy", [MultiBlockMasking, TimeMasking])
def test_ragged_rows_are_packed_without_asking_the_device(stand_in, flash_attn, tmp_path, strategy):
    """The host waits for the masks, once a draw and once for their sizes, never for a layer."""
    brain = make_brain(tmp_path, strategy, DEVICE, "bf16")
    backends = []
    for name in ("context_encoder", "target_encoder", "predictor"):
        block = getattr(brain.jepa, name).blocks[0]
        block.register_forward_pre_hook(lambda _, inputs: backends.append(inputs[1]))
    train_one_step(brain)
    stand_in.waits.clear()
    backends.clear()
    loss = train_one_step(brain)
    assert [rows.packed for rows in backends] == [True] * 3
    waits = Counter(stand_in.waits)
    assert waits.pop("masking.py:__call__") >= 1  # until every clip has enough context
    assert waits == Counter(["masking.py:from_maps"])
    assert on_host(loss).isfinite()


@pytest.mark.parametrize("strategy", [MultiBlockMasking, TimeMasking])
def test_packings_of_drawn_masks_are_where_valid_entries_are(strategy):
    masks = strategy(GRID)(64, generator=torch.Generator().manual_seed(0))
    rows = {"context": masks.context_valid, "target": masks.target_valid}
    every = torch.cat([masks.target_valid, masks.context_valid], 1)
    for name, valid in {**rows, "joint": every}.items():
        packing = getattr(masks, f"{name}_packing")
        assert packing.place.tolist() == [
            number for number, counts in enumerate(valid.flatten().tolist()) if counts
        ]
        ends = np.cumsum(valid.sum(1).numpy())
        assert packing.starts.tolist() == [0, *ends] and packing.starts.dtype == torch.int32


def test_rows_pack_the_same_with_a_known_packing(flash_attn, monkeypatch):
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: "flash_attn")
    valid = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    x = torch.randn(5, 7, 3 * 24)
    found = Rows("flash_attn", x, valid)
    known = Rows("flash_attn", x, valid, Packing.of(valid, int(valid.sum())))
    assert torch.equal(found.pack(x), x[valid]) and torch.equal(known.pack(x), x[valid])
    first, second = (rows.unpack(rows.attend(rows.pack(x), 3)) for rows in (found, known))
    assert torch.equal(first, second)


@pytest.mark.parametrize("class_token", [False, True])
def test_known_packings_change_nothing_of_a_step(stand_in, flash_attn, class_token):
    jepa = JEPA(
        make_encoder(class_token=class_token),
        Predictor(GRID, encoder_dim=24, dim=24, depth=1, num_heads=3),
        SmoothL1(),
    ).to(DEVICE)
    spectrogram = torch.randn(CLIPS, 80, GRID.frames).to(DEVICE)
    masks = MultiBlockMasking(GRID)(CLIPS, device=DEVICE)
    bare = type(masks)(
        masks.context_index, masks.target_index, masks.context_valid, masks.target_valid
    )
    with torch.autocast("cuda", torch.bfloat16):
        first, second = jepa(spectrogram, masks), jepa(spectrogram, bare)
    assert torch.equal(on_host(first.predictions), on_host(second.predictions))
    assert torch.equal(on_host(first.loss), on_host(second.loss))


def test_validation_and_its_online_probe_stay_on_the_device(gpu, tmp_path):
    brain = make_brain(tmp_path, MultiBlockMasking, DEVICE)
    brain.online_probe = OnlineProbe(labelled_folder(tmp_path / "labelled"))
    brain.metrics.columns += ["valid_labelled_accuracy"]
    brain.on_stage_start(sb.Stage.VALID, epoch=0)
    wav = torch.randn(CLIPS, crop_samples(GRID.frames))
    brain.step = 1
    loss = brain.evaluate_batch(CropBatch(wav, torch.arange(CLIPS)), sb.Stage.VALID)
    brain.on_stage_end(sb.Stage.VALID, loss, epoch=0)
    (row,) = brain.metrics.read()
    assert 0 <= float(row["valid_labelled_accuracy"]) <= 100


def test_validation_waits_for_its_masks_and_then_for_its_results(stand_in, tmp_path):
    """Not for a batch's loss or statistics, ragged as the targets are."""
    brain = make_brain(tmp_path, MultiBlockMasking, DEVICE)
    batch = CropBatch(torch.randn(CLIPS, crop_samples(GRID.frames)), torch.arange(CLIPS))
    brain.valid_batches, brain.valid_clips = [batch] * 3, 3 * CLIPS
    brain._validate(epoch=0)
    waits = [wait for wait in stand_in.waits if not wait.startswith("masking.py")]
    assert set(waits) == {
        "validation.py:results",
        "monitors.py:deviation",
        "monitors.py:effective_rank_of_gram",
    }
    assert len(waits) == 4  # two deviations
    (row,) = brain.metrics.read()
    assert float(row["valid_embedding_rank"]) > 1


# --- AudioJEPA and what is built on it --------------------------------------------------------


def labelled_folder(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,split,label"]
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.1, 8_000 + number), 16_000)
        lines.append(f"{number}.wav,{'train' if number < 6 else 'test'},{number % 2}")
    (folder / "meta.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("normalization", ["pretraining", "dataset", "instance"])
@pytest.mark.parametrize(
    "options",
    [{}, {"output_all_hiddens": True, "flat": True, "output_norm": True}, {"step_seconds": 0.04}],
)
def test_audio_jepa_gives_on_a_device_what_it_gives_on_the_cpu(gpu, normalization, options):
    rtol, atol = (1e-3, 1e-3) if gpu else (1e-4, 1e-5)  # FFTs differ by more than roundoff
    wav, wav_lens = clips(3.0, 0.3, 2.6)  # several windows, and ragged ones
    results = []
    for device in ("cpu", DEVICE):
        source = (make_encoder().to(device), Normalization(-7.06, 4.19).to(device))
        model = AudioJEPA(source, normalization=normalization, **options)
        if normalization == "dataset":
            model.fit_normalization([(wav, wav_lens)])
        for lens in (wav_lens, wav_lens.to(device), None):
            for function in (model, model.embed):
                out = function(wav.to(device), lens)
                assert out.device == torch.device(device)
                results.append(on_host(out))
    half = len(results) // 2
    for theirs, ours in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=rtol, atol=atol)


def test_audio_jepa_of_a_pair_is_where_its_encoder_is_unless_told(gpu):
    cpu = torch.device("cpu")
    for places, told, expected in (
        ((DEVICE, cpu), None, DEVICE),
        ((cpu, DEVICE), None, cpu),  # the quickstart's untrained encoders
        ((DEVICE, DEVICE), "cpu", cpu),
        ((cpu, cpu), DEVICE, DEVICE),
    ):
        parts = (make_encoder(), Normalization(-7.06, 4.19))
        source = tuple(part.to(place) for part, place in zip(parts, places))
        model = AudioJEPA(source, device=told)
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device for tensor in tensors} == {expected}


def test_fine_tuning_stays_on_the_device(gpu):
    encoder = make_encoder().to(DEVICE)
    source = (encoder, Normalization(-7.06, 4.19))
    model = AudioJEPA(source, freeze=False, gradient_checkpointing=True)
    wav, wav_lens = clips(3.0, 1.0)
    model(wav.to(DEVICE), wav_lens).square().mean().backward()
    assert {p.grad.device for p in model.encoder.parameters()} == {DEVICE}


def test_the_online_probe_embeds_where_the_encoder_is(gpu, tmp_path):
    online_probe = OnlineProbe(labelled_folder(tmp_path / "labelled"))
    accuracies = [
        online_probe(make_encoder().to(device), Normalization(-7.06, 4.19).to(device))
        for device in ("cpu", DEVICE)
    ]
    assert "labelled_accuracy" in accuracies[0]
    assert gpu or accuracies[0] == accuracies[1]


def test_log_mel_statistics_of_a_device_are_those_of_the_cpu(gpu):
    wav, _ = clips(1.0, 1.0)
    expected = logmel_statistics(wav)
    log_mel = LogMelSpectrogram().to(DEVICE)
    found = [logmel_statistics(wav.to(DEVICE))]
    found += [logmel_statistics(x, log_mel) for x in (wav, wav.to(DEVICE), list(wav.numpy()))]
    for statistics in found:
        np.testing.assert_allclose(statistics, expected, rtol=1e-3, atol=1e-3 if gpu else 0)


@pytest.mark.parametrize(("all_layers", "precision"), [(False, "fp32"), (True, "bf16")])
@pytest.mark.parametrize("name", ["logmel", "random:{}", "{}"])
def test_sources_compute_on_their_device_and_give_on_the_cpu(
    gpu, pretrained, name, all_layers, precision
):
    wav, _ = clips(2.5, 2.5)
    results = []
    for device in ("cpu", DEVICE):
        source = load_source(
            name.format(pretrained), all_layers, precision=precision, device=device
        )
        assert source.device == torch.device(device)
        if source.fits_data:
            source.set_normalization(**source.fit([wav]))
        results.append(source.embed(wav))
        assert results[-1].device == torch.device("cpu")
        assert len(source.fingerprint()["weights"]) == 16
    # half precision multiplies rows in another order on the two devices' backends
    tolerance = 0.1 if precision == "bf16" else 1e-3 if gpu else 1e-5
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_hear_embeddings_are_on_the_models_device(gpu, pretrained):
    model = hear.load_model(pretrained, device=DEVICE)
    audio = clips(2.0, 2.0)[0].to(DEVICE)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    places = (hear.get_scene_embeddings(audio, model), embeddings, timestamps)
    assert {tensor.device for tensor in places} == {DEVICE}


def test_the_s3prl_upstream_stays_on_its_device(gpu, pretrained):
    upstream = UpstreamExpert(pretrained).to(DEVICE)
    wavs = [torch.randn(n).to(DEVICE) for n in (48_000, 800)]
    features = upstream(wavs)
    assert {layer.device for layer in features["hidden_states"]} == {DEVICE}
    features["last_hidden_state"].sum().backward()


# --- linear probes ----------------------------------------------------------------------------


def labelled_features(multilabel):
    rng = np.random.default_rng(0)
    label = np.arange(60) % 3
    array = (rng.normal(size=(60, 16)) + 3 * np.eye(3, 16)[label]).astype(np.float32)
    names = [str(number) for number in range(60)]
    splits = (["train"] * 3 + ["valid", "test", "train"]) * 10
    labels = [f"{n};{(n + 1) % 3}" if multilabel and n else str(n) for n in label]
    labelled = LabelledClips(names, names, labels, splits, [None] * 60, multilabel)
    return Features(array[None], np.ones(60, bool), [-1], None), labelled


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize(
    ("kind", "memory_gb"),
    [
        ("paper", None),
        ("sweep", None),
        ("logistic", None),
        ("logistic", 0.0),  # features are read block by block
    ],
)
def test_linear_probes_stay_on_their_device(gpu, kind, memory_gb, multilabel):
    protocol = Protocol(
        kind, epochs=3, batch_size=16, max_iterations=5, precision="fp32", memory_gb=memory_gb
    )
    features, labelled = labelled_features(multilabel)
    pairs = zip(
        *(
            probe(features, labelled, range(2), protocol, device=device)
            for device in ("cpu", DEVICE)
        )
    )
    for theirs, ours in pairs:
        assert ours.score == pytest.approx(theirs.score, abs=0.11)  # one clip of ten
        assert ours.weight.device == torch.device("cpu")
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-3, atol=1e-4)
