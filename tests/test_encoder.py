"""AudioJEPA: the same embedding alone and in a batch, whatever the length, and what recipes ask."""

import ast
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.checkpoints import load_pretrained, save_pretrained
from speechbrain_jepa.features import HOP_LENGTH, LogMelSpectrogram, Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid
from speechbrain_jepa.windows import SILENCE

RATE = 16_000
STEP = 2_560  # samples: 16 frames of 160
NORMALIZATION = (-7.06, 4.19)


def make_encoder(seed=0, depth=2, class_token=False, **grid):
    torch.manual_seed(seed)
    grid = PatchGrid(**{"frames": 208, **grid})
    return Encoder(grid, dim=24, depth=depth, num_heads=3, class_token=class_token)


def make_model(depth=2, grid=None, **options):
    encoder = make_encoder(depth=depth, **(grid or {}))
    return AudioJEPA((encoder, Normalization(*NORMALIZATION)), **options)


def noise(samples, seed=0):
    """Filtered noise that changes over time, so that every frame differs from its neighbours."""
    wav = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return wav.cumsum(0).sub_(wav.cumsum(0).mean()).div_(math.sqrt(samples) + 1) + 0.05 * wav


def pad(wavs):
    lengths = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths / lengths.max()


def assert_relatively_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    deviation = (actual - expected).norm() / expected.norm()
    assert deviation < tolerance, f"relative deviation {deviation:.2g}"


def embed_slowly(model, wav, **front_end):
    """One clip, by the definition: log-mel of the clip alone, windows one by one."""
    encoder, grid = model.encoder, model.encoder.grid
    log_mel = LogMelSpectrogram(**front_end)(wav[None])[..., : math.ceil(len(wav) / HOP_LENGTH)]
    missing = -log_mel.shape[2] % grid.patch_time
    spectrogram = (F.pad(log_mel, (0, missing), value=SILENCE) - NORMALIZATION[0]) / (
        NORMALIZATION[1]
    )
    outputs = []
    for window in spectrogram.split(grid.frames, dim=2):
        tokens = encoder(window)[0].unflatten(0, (grid.frequency_patches, -1))
        outputs.append(torch.cat(list(tokens), -1))  # frequency patches side by side
    return torch.cat(outputs)


# What it computes


@pytest.mark.parametrize("samples", [201, STEP, STEP + 1, 33_280, 33_281, 40_000, 100_000])
def test_output_is_that_of_its_definition(samples):
    model, wav = make_model(), noise(samples)
    assert_relatively_close(model(wav[None])[0], embed_slowly(model, wav))


@pytest.mark.parametrize(
    "grid",
    [{"patch_time": 4, "frames": 52}, {"patch_frequency": 80, "patch_time": 2, "frames": 64}],
)
def test_other_patch_sizes(grid):
    model, wav = make_model(grid=grid), noise(30_001)
    assert model.downsample_rate == grid["patch_time"] * 160
    assert model.get_output_dim() == 24 * 80 // grid.get("patch_frequency", 16)
    assert_relatively_close(model(wav[None])[0], embed_slowly(model, wav))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_norm": True},
        {"flat": True, "output_all_hiddens": True},
        {"normalization": "instance"},
        {"max_windows_per_batch": 5},
    ],
    ids=lambda options: " ".join(map(str, options)) or "default",
)
def test_embedding_does_not_depend_on_batch_mates(options):
    model = make_model(**options)
    seconds = torch.empty(8).uniform_(0.05, 60, generator=torch.Generator().manual_seed(1))
    seconds[0], seconds[1] = 0.05, 60.0
    wavs = [noise(int(s * RATE), seed) for seed, s in enumerate(seconds)]
    batch = pad(wavs)
    frames, clips = model(*batch), model.embed(*batch)
    for number, wav in enumerate(wavs):
        alone, steps = model(wav[None]), math.ceil(len(wav) / STEP)
        assert alone.shape[-2] == steps
        own = frames[..., number : number + 1, :, :]
        assert_relatively_close(own[..., :steps, :], alone)
        assert not own[..., steps:, :].any()
        assert_relatively_close(clips[..., number : number + 1, :], model.embed(wav[None]))
        assert_relatively_close(clips[..., number : number + 1, :], alone.mean(-2))


def test_a_class_token_is_no_part_of_the_time_steps_and_none_of_the_batch():
    model = AudioJEPA((make_encoder(class_token=True), Normalization(*NORMALIZATION)))
    wavs = [noise(50_000), noise(3_000, seed=1), noise(40_000, seed=2)]
    frames, clips = model(*pad(wavs)), model.embed(*pad(wavs))
    for number, wav in enumerate(wavs):
        alone = embed_slowly(model, wav)
        assert alone.shape[1] == model.get_output_dim() == 120
        assert_relatively_close(frames[number, : len(alone)], alone)
        assert_relatively_close(clips[number], alone.mean(0))


@pytest.mark.parametrize("front_end", [{"n_fft": 1024}, {"n_fft": 200, "n_mels": 16}], ids=str)
def test_another_front_end_is_kept_in_the_folder_and_computed(tmp_path, front_end):
    encoder = make_encoder(bands=front_end.get("n_mels", 80))
    parts = (encoder, Normalization(*NORMALIZATION), LogMelSpectrogram(**front_end))
    AudioJEPA(parts).save_pretrained(tmp_path / "ours")
    model, wavs = AudioJEPA(tmp_path / "ours"), [noise(50_000), noise(700, 1), noise(40_001, 2)]
    frames = model(*pad(wavs))
    for wav, own in zip(wavs, frames):
        expected = embed_slowly(model, wav, **front_end)
        assert_relatively_close(own[: len(expected)], expected)
    again = AudioJEPA(model.save_pretrained(tmp_path / "again"))
    assert torch.equal(again(*pad(wavs)), frames)
    assert f"windows of {front_end['n_fft']} samples" in (tmp_path / "ours/README.md").read_text()


def test_what_the_padding_holds_does_not_matter():
    model = make_model()
    wav, wav_lens = pad([noise(50_000), noise(3_000, seed=1), noise(20_000, seed=2)])
    expected = model(wav, wav_lens)
    for number, samples in enumerate((50_000, 3_000, 20_000)):
        wav[number, samples:] = float("nan")
    torch.testing.assert_close(model(wav, wav_lens), expected, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [1, 2, 100, 200, 201, 400])
def test_clips_shorter_than_a_window_of_the_transform(samples):
    model, wav = make_model(), noise(samples)
    batch, wav_lens = pad([noise(70_000, seed=1), wav])
    alone = model(wav[None])
    assert alone.shape == (1, 1, 120)
    assert alone.isfinite().all()
    assert_relatively_close(model(batch, wav_lens)[1:, :1], alone)


def test_time_steps_follow_the_batch_even_when_no_clip_fills_it():
    """As everywhere in SpeechBrain: wav_lens times T gives a clip's time steps."""
    model = make_model()
    wav = noise(160_000)[None]
    out = model(wav, torch.tensor([0.5]))
    assert out.shape[1] == 63  # ceil(160000 / 2560)
    assert out[:, :32].any(-1).all() and not out[:, 32:].any()
    assert_relatively_close(out[:, :32], model(wav[:, :80_000]))


def test_windows_go_through_the_encoder_a_few_at_a_time():
    model = make_model(max_windows_per_batch=4)
    sizes = []
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    wav = noise(10 * 33_280)[None]
    limited = model(wav)
    assert sizes == [4, 4, 2]
    model.max_windows_per_batch = 128
    assert_relatively_close(limited, model(wav))
    assert sizes == [4, 4, 2, 10]


def test_clips_of_one_length_need_no_mask():
    """A mask sends attention to a slower kernel."""
    model = make_model()
    masks = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["valid"]), with_kwargs=True
    )
    model(noise(3 * 80_000).view(3, -1))
    assert masks == [None, None]  # whole windows, then the shorter ones


def test_timestamps_are_where_the_sound_is():
    """A click moves the output of the time step whose timestamp is nearest."""
    model = make_model()
    clicks = torch.full((13, 33_280), 1e-3)
    times = model.timestamps(13)
    for number, seconds in enumerate(times):
        clicks[number, round(seconds.item() * RATE)] += 1.0
    grid = model.encoder.grid
    log_mel = LogMelSpectrogram()(clicks)[..., : grid.frames]
    energy = log_mel.unflatten(2, (-1, grid.patch_time)).mean((1, 3))
    assert energy.argmax(1).tolist() == list(range(13))
    assert times[0].item() == pytest.approx(0.075)  # frames 0 to 15, every 10 ms
    torch.testing.assert_close(times.diff(), torch.full((12,), 0.16))


def test_flat_is_the_mean_of_the_frequency_patches():
    wav = noise(40_000)[None]
    concatenated = make_model()(wav)
    flat = make_model(flat=True)(wav)
    torch.testing.assert_close(flat, concatenated.unflatten(-1, (5, 24)).mean(-2))
    assert make_model(flat=True).get_output_dim() == flat.shape[-1] == 24


def test_all_hiddens_end_with_the_output():
    wav, model = noise(40_000)[None], make_model(output_all_hiddens=True)
    layers = model(wav)
    assert layers.shape == (model.num_layers, 1, 16, 120)
    torch.testing.assert_close(layers[-1], make_model()(wav))
    torch.testing.assert_close(model.embed(wav), layers.mean(-2))


def test_output_norm_is_speechbrains_layer_norm_of_a_clip():
    wav = noise(40_000)[None]
    plain, normalized = make_model(), make_model(output_norm=True)
    out = plain(wav)
    torch.testing.assert_close(normalized(wav), F.layer_norm(out, out.shape[1:]))


# Normalisation


def test_instance_normalisation_ignores_the_level():
    # whole patches, far above the log's offset: silence has a level of its own
    wav = torch.randn(1, 16 * STEP)
    model = make_model(normalization="instance")
    assert_relatively_close(model(30 * wav), model(wav), tolerance=1e-4)
    assert model(torch.zeros(1, 5_000)).isfinite().all()


def test_dataset_normalisation_is_that_of_all_frames_and_stays_with_the_model():
    lengths = (50_000, 9_000, 20_000)
    wavs = [noise(samples, seed) for seed, samples in enumerate(lengths)]
    model = make_model(normalization="dataset")
    with pytest.raises(RuntimeError, match="call fit_normalization"):
        model(wavs[0][None])
    model.fit_normalization([pad(wavs[:2]), wavs[2][None]])
    frames = [
        LogMelSpectrogram()(wav[None])[..., : math.ceil(len(wav) / HOP_LENGTH)] for wav in wavs
    ]
    values = torch.cat([x.flatten() for x in frames])
    assert model.normalization.mean.item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert model.normalization.std.item() == pytest.approx(values.std().item(), rel=1e-4)

    again = make_model(normalization="dataset")
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(wavs[0][None]), model(wavs[0][None]))


def test_dataset_normalisation_from_a_folder(audio_folder):
    """As from the same audio in batches; files that cannot be read are left out."""
    model = make_model(normalization="dataset").fit_normalization(audio_folder)
    files = sorted(map(str, audio_folder.iterdir()))
    same = make_model(normalization="dataset").fit_normalization(files)
    fewer = make_model(normalization="dataset").fit_normalization(audio_folder, max_clips=2)
    assert model.normalization.mean == same.normalization.mean != fewer.normalization.mean


def test_a_fitted_encoder_is_saved_with_its_statistics(tmp_path):
    model = make_model(normalization="dataset")
    with pytest.raises(RuntimeError, match="fit_normalization"):
        model.save_pretrained(tmp_path / "p")
    model.fit_normalization([noise(40_000)[None]])
    _, normalization, _ = load_pretrained(model.save_pretrained(tmp_path / "p"))
    assert normalization.mean == model.normalization.mean


# Training


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_frozen_it_stays_in_eval_mode_without_gradients():
    model = make_model()
    torch.nn.ModuleDict({"encoder": model}).train()
    assert not model.training and not model.encoder.training
    assert not trainable(model)
    assert not model(noise(4_000)[None].requires_grad_()).requires_grad


def test_unfrozen_every_parameter_gets_a_gradient():
    model = make_model(freeze=False)
    assert model.training
    model(*pad([noise(50_000), noise(900)])).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_partial_freezing():
    model = make_model(depth=3, freeze=False, freeze_layers=2)
    model(noise(50_000)[None]).square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == trainable(model)
    assert {name.split(".")[1] for name in moved} == {"blocks", "norm"}
    assert {name.split(".")[2] for name in moved if "blocks" in name} == {"2"}
    with_token = (make_encoder(class_token=True), Normalization())
    model = AudioJEPA(with_token, freeze=False, freeze_layers=1)
    assert "encoder.class_token" not in trainable(model)  # it enters before the first layer
    everything = trainable(make_model(freeze=False))
    kept = everything - trainable(make_model(freeze=False, freeze_feature_extractor=True))
    assert kept == {"encoder.patch_embed.weight", "encoder.patch_embed.bias"}


def test_an_encoder_in_memory_is_copied():
    encoder = make_encoder()
    model = AudioJEPA((encoder, Normalization()))
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.norm.bias.data.add_(1)
    assert not model.encoder.norm.bias.any()


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients():
    kept, gradients = {}, {}
    for checkpointing in (False, True):
        model = make_model(depth=6, freeze=False, gradient_checkpointing=checkpointing)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*pad([noise(50_000), noise(9_000)])).square().mean()
            kept[checkpointing] = sum(sizes)
        loss.backward()
        gradients[checkpointing] = [p.grad for p in model.parameters()]
        assert model.state_dict().keys() == make_model(depth=6).state_dict().keys()
    assert kept[True] < 0.3 * kept[False]
    torch.testing.assert_close(gradients[True], gradients[False])


def test_fine_tuning_under_bf16_autocast_learns():
    model = make_model(freeze=False)
    head = torch.nn.Linear(model.get_output_dim(), 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    time = torch.arange(40_000) / RATE
    tones = [torch.sin(2 * math.pi * f * time[:n]) for f, n in ((300, 40_000), (2_000, 9_000))]
    batch, labels = pad(tones), torch.tensor([0, 1])
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*batch)
            assert out.dtype == torch.bfloat16
            loss = F.cross_entropy(head(out.sum(1)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def fine_tune_distributed(rank, port, out):
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    model = make_model(freeze=False, freeze_layers=1, gradient_checkpointing=True)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    lengths = ((90_000, 700), (3_000, 20_000))[rank]  # other numbers of windows
    wav, wav_lens = pad([noise(n, seed=n) for n in lengths])
    wrapped(wav, wav_lens).square().sum().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, out)
    torch.distributed.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(fine_tune_distributed, (port, out), nprocs=2)
    model = make_model(freeze=False, freeze_layers=1)
    for samples in (90_000, 700, 3_000, 20_000):
        model(noise(samples, seed=samples)[None]).square().sum().div(2).backward()
    gradients = torch.load(out)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_relatively_close(gradients[name], parameter.grad, tolerance=1e-4)
        else:
            assert gradients[name] is None


# Errors


@pytest.mark.parametrize(
    ("wav", "wav_lens", "message"),
    [
        (torch.zeros(16_000), None, r"expected waveforms \[B, samples\].*unsqueeze\(0\)"),
        (torch.zeros(2, 1, 16_000), None, "average channels"),
        (torch.zeros(2, 16_000, dtype=torch.int16), None, "divide int16 by 32768"),
        (torch.zeros(0, 16_000), None, "no clip"),
        (torch.zeros(3, 0), None, "clip 0 .* of 3 is empty"),
        (torch.zeros(3, 16_000), torch.tensor([1.0, 0.5, 0.0]), "clip 2 .* of 3 is empty"),
        (torch.zeros(3, 16_000), torch.tensor([1.0, 1.5, 0.5]), "clip 1 .* outside 0 to 1"),
        (torch.zeros(3, 16_000), torch.tensor([1.0, 0.5]), r"shape \(2,\), not \(3,\)"),
        (torch.zeros(3, 16_000), torch.tensor([1.0, torch.nan, 1.0]), "clip 1 .* outside 0 to 1"),
    ],
)
def test_input_that_does_not_fit_says_which_clip(wav, wav_lens, message):
    for call in (make_model(), make_model().embed):
        with pytest.raises(ValueError, match=message):
            call(wav, wav_lens)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_samples_that_are_not_finite_say_which_clip(value):
    wav = torch.zeros(4, 9_000)
    wav[2, 8_999] = value
    with pytest.raises(ValueError, match=r"clip 2 .* of 4 holds NaN or infinite"):
        make_model()(wav)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalization": "corpus"}, ValueError, "choose one of pretraining, dataset, instance"),
        ({"max_windows_per_batch": 0}, ValueError, "use at least 1"),
        ({"freeze": False, "freeze_layers": 3}, ValueError, "this encoder has 2 layers"),
        ({"freeze_layers": 1}, ValueError, "set freeze=False"),
        ({"attention": "fast"}, ValueError, "attention='fast'"),
        ({"frezze": True}, TypeError, "no argument 'frezze'"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        make_model(**options)


# In place of Wav2Vec2


def constructor_arguments(file, cls):
    """Names of a class' constructor arguments, without importing what it needs."""
    tree = ast.parse(
        (Path(importlib.util.find_spec("speechbrain").origin).parent / file).read_text()
    )
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls).body
    init = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return [argument.arg for argument in init.args.args[1:]]


def test_every_argument_of_speechbrains_wav2vec2_is_accepted():
    folder = "integrations/huggingface"
    own = constructor_arguments(f"{folder}/wav2vec2.py", "Wav2Vec2")
    inherited = constructor_arguments(f"{folder}/huggingface.py", "HFTransformersInterface")
    assert own[:4] == ["source", "save_path", "output_norm", "freeze"]
    source = (make_encoder(), Normalization())
    model = AudioJEPA(source, *[None, True, True, True, True, True])  # in Wav2Vec2's order
    assert (model.output_norm, model.freeze, model.output_all_hiddens) == (True, True, True)
    others = {*own, *inherited} - {"source", "device"}
    AudioJEPA(source, **dict.fromkeys(others, False), device="cpu")


def test_a_recipe_builds_it_from_yaml(tmp_path):
    folder = save_pretrained(tmp_path / "p", make_encoder(), Normalization(*NORMALIZATION))
    yaml = f"""
        encoder: !new:speechbrain_jepa.AudioJEPA
            source: {folder}
            save_path: {tmp_path}
            freeze: False
            freeze_layers: 1
    """
    model = load_hyperpyyaml(yaml)["encoder"]
    wav = noise(9_000)[None]
    torch.testing.assert_close(model(wav), make_model()(wav))
    assert model.sample_rate == 16_000


def test_importing_the_package_imports_no_torch():
    code = "import speechbrain_jepa, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
