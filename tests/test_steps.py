"""Time steps finer than the encoder's patches: shifted copies of a clip, interleaved."""

import math

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from speechbrain_jepa import AudioJEPA, embed, hear
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.data.clips import find_audio, read_audio
from speechbrain_jepa.features import HOP_LENGTH, N_FFT, LogMelSpectrogram, Normalization
from speechbrain_jepa.s3prl import hubconf
from speechbrain_jepa.s3prl.expert import UpstreamExpert
from speechbrain_jepa.vit import Encoder, PatchGrid
from speechbrain_jepa.windows import SILENCE, cut_into_windows

RATE = 16_000
PATCH = 2_560  # samples: 16 frames of 160
NORMALIZATION = (-7.06, 4.19)


def make_encoder(class_token=False, **grid):
    torch.manual_seed(0)
    grid = PatchGrid(**{"frames": 208, **grid})
    return Encoder(grid, dim=24, depth=2, num_heads=3, class_token=class_token)


def make_model(step_seconds=0.04, grid=None, **options):
    source = make_encoder(**(grid or {})), Normalization(*NORMALIZATION)
    return AudioJEPA(source, step_seconds=step_seconds, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "p"
    return save_pretrained(path, make_encoder(), Normalization(*NORMALIZATION))


def noise(samples, seed=0):
    """Noise whose loudness changes all the time, so that every frame differs from the others."""
    wav = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return wav * (0.1 + torch.sin(torch.arange(samples) / 700).square())


def pad(wavs):
    lengths = torch.tensor([len(wav) for wav in wavs])
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths / lengths.max()


def assert_relatively_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    deviation = (actual - expected).norm() / expected.norm()
    assert deviation < tolerance, f"relative deviation {deviation:.2g}"


def embed_slowly(model, wav, step, normalization=NORMALIZATION):
    """One clip, step by step of `step` frames, by the definition in docs/embeddings.md."""
    encoder, grid = model.encoder, model.encoder.grid
    frames = math.ceil(len(wav) / HOP_LENGTH)
    log_mel = LogMelSpectrogram()(wav[None])[0, :, :frames]
    lead, shifts, steps = (grid.patch_time - step) // 2, grid.patch_time // step, -(-frames // step)
    silence = log_mel.new_full((80, grid.patch_time), SILENCE)
    clip = torch.cat([silence, log_mel, silence], 1)
    clip = (clip - normalization[0]) / normalization[1]
    rows: dict[int, torch.Tensor] = {}
    for shift in range(shifts):
        mine = range(shift, steps, shifts)
        starts = [grid.patch_time + step * number - lead for number in mine]
        patches = [clip[:, start : start + grid.patch_time] for start in starts]
        for first in range(0, len(mine), grid.time_patches):
            window = torch.cat(patches[first : first + grid.time_patches], 1)
            tokens = encoder(window[None])[0].unflatten(0, (grid.frequency_patches, -1))
            rows |= zip(mine[first:], tokens.transpose(0, 1).flatten(1), strict=False)
    return torch.stack([rows[number] for number in range(steps)])


# What it computes


@pytest.mark.parametrize("samples", [201, 641, PATCH, 33_280, 33_281, 33_280 + 960, 90_001])
def test_output_is_that_of_its_definition(samples):
    model, wav = make_model(), noise(samples)
    assert model.num_steps(samples) == math.ceil(samples / 640)
    assert_relatively_close(model(wav[None])[0], embed_slowly(model, wav, step=4))


@pytest.mark.parametrize(
    ("grid", "step"),
    [
        ({}, 8),
        ({}, 2),
        ({}, 1),
        ({"patch_frequency": 80, "patch_time": 2, "frames": 64}, 1),
        ({"patch_time": 12, "frames": 48}, 4),
        ({"patch_time": 5, "frames": 40}, 1),
        ({"class_token": True}, 4),
    ],
)
def test_other_steps_and_patches(grid, step):
    model, wav = make_model(step / 100, grid), noise(30_001)
    assert model.downsample_rate == step * 160
    assert model.step_seconds == step / 100
    assert model.get_output_dim() == make_model(None, grid).get_output_dim()
    assert_relatively_close(model(wav[None])[0], embed_slowly(model, wav, step))


@pytest.mark.parametrize("step", [8, 4, 2, 1])
def test_output_is_that_of_the_waveform_shifted_by_hand(step):
    """Silence around a sound is silence before and behind the clip: no other edges to think of."""
    sound = noise(60_000, seed=3)
    wav = F.pad(sound, (3_200, 61 * PATCH - 63_200))
    coarse, shifts, lead = make_model(None), 16 // step, (16 - step) // 2
    copies = []
    for shift in range(shifts):
        start = (shift * step - lead) * HOP_LENGTH  # of the copy, in the clip
        copy = F.pad(wav, (max(-start, 0), 16 * HOP_LENGTH))[max(start, 0) :][: len(wav)]
        copies.append(coarse(copy[None])[0])
    interleaved = torch.stack(copies, 1).flatten(0, 1)
    assert_relatively_close(make_model(step / 100)(wav[None])[0], interleaved)


@pytest.mark.parametrize("step_seconds", [0.16, 16 / 100, np.float64(0.16)])
def test_the_patchs_own_step_changes_no_bit(step_seconds):
    wav, wav_lens = pad([noise(70_000), noise(900, 1), noise(20_000, 2)])
    for options in ({}, {"output_all_hiddens": True, "output_norm": True}):
        model, plain = make_model(step_seconds, **options), make_model(None, **options)
        assert model.shifts == 1
        assert torch.equal(model(wav, wav_lens), plain(wav, wav_lens))
        assert torch.equal(model.embed(wav, wav_lens), plain.embed(wav, wav_lens))
        assert torch.equal(model.timestamps(40), plain.timestamps(40))


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
    """And is the mean over the clip's own finer steps."""
    model = make_model(**options)
    wavs = [noise(samples, samples) for samples in (800, 320_000, 1, 33_280, 33_281, 99_999)]
    batch = pad(wavs)
    frames, clips = model(*batch), model.embed(*batch)
    for number, wav in enumerate(wavs):
        alone, steps = model(wav[None]), math.ceil(len(wav) / 640)
        assert alone.shape[-2] == steps
        own = frames[..., number : number + 1, :, :]
        assert_relatively_close(own[..., :steps, :], alone)
        assert not own[..., steps:, :].any()
        assert_relatively_close(clips[..., number : number + 1, :], alone.mean(-2))


def test_what_the_padding_holds_does_not_matter():
    """So no shift reads past its clip, where the next one might be."""
    model, lengths = make_model(0.01), (50_000, 3_000, 20_000)
    wav, wav_lens = pad([noise(samples, samples) for samples in lengths])
    expected = model(wav, wav_lens)
    for number, samples in enumerate(lengths):
        wav[number, samples:] = float("nan")
    assert torch.equal(model(wav, wav_lens), expected)


def test_frames_outside_the_clip_are_digital_silence():
    clips = cut_into_windows(noise(6_400)[None], None, PatchGrid(frames=208), 128, shifts=4)
    frames = LogMelSpectrogram()(noise(6_400)[None])[0, :, :40]
    for windows, log_mel, audio in clips.log_mels(LogMelSpectrogram()):
        for shift, image, inside in zip(windows.shift.tolist(), log_mel, audio, strict=True):
            first = 4 * shift - 6  # a step is 4 of a patch's 16 frames: 6 before it, 6 behind
            expected = torch.full((80, image.shape[1]), SILENCE)
            for column in range(image.shape[1]):
                if 0 <= first + column < 40:
                    expected[:, column] = frames[:, first + column]
            torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(inside, (expected != SILENCE).any(0))


def test_flat_and_all_layers():
    wav = noise(40_000)[None]
    layers = make_model(output_all_hiddens=True)(wav)
    assert layers.shape == (3, 1, 63, 120)
    torch.testing.assert_close(layers[-1], make_model()(wav))
    flat = make_model(flat=True, output_all_hiddens=True)
    torch.testing.assert_close(flat(wav), layers.unflatten(-1, (5, 24)).mean(-2))
    assert flat.get_output_dim() == 24


def test_output_norm_is_speechbrains_layer_norm_of_a_clip():
    wav = noise(40_000)[None]
    out, normalized = make_model()(wav), make_model(output_norm=True)
    torch.testing.assert_close(normalized(wav), F.layer_norm(out, out.shape[1:]))
    assert_relatively_close(normalized.embed(wav), normalized(wav).mean(1))


class FrameTimes(torch.nn.Module):
    """In the place of log-mel: the sample at each frame's centre, in all 80 bands."""

    n_fft = N_FFT

    def forward(self, wav, margins):
        return (
            wav[:, N_FFT // 2 : 1 - N_FFT // 2 : HOP_LENGTH, None].transpose(1, 2).repeat(1, 80, 1)
        )


class PatchMeans(torch.nn.Module):
    """In the place of an encoder: the mean of each patch."""

    def __init__(self, encoder):
        super().__init__()
        self.grid, self.dim, self.patch_embed = encoder.grid, 1, encoder.patch_embed

    def forward(self, spectrogram, valid, all_layers):
        tiles = spectrogram.unflatten(1, (5, -1)).unflatten(3, (-1, self.grid.patch_time))
        return tiles.mean((2, 4)).flatten(1)[..., None]


@pytest.mark.parametrize("step_seconds", [None, 0.08, 0.04, 0.02, 0.01])
def test_timestamps_are_the_centres_of_what_each_step_sees(step_seconds):
    """The encoder sees a waveform that says the time, and gives its mean over each patch."""
    model = make_model(step_seconds, flat=True)
    model.normalization.set(0.0, 1.0)
    model.features, model.encoder = FrameTimes(), PatchMeans(model.encoder)
    seen = model((torch.arange(5 * RATE) / RATE)[None])[0, :, 0]
    times = model.timestamps(len(seen))
    inside = (times > 0.08) & (times < 4.9)  # the others see silence before or behind the clip
    assert inside.sum() > 4.6 / model.step_seconds
    torch.testing.assert_close(seen[inside], times[inside])


@pytest.mark.parametrize(("step", "first"), [(8, 35), (4, 15), (2, 5), (1, 5)])
def test_a_step_is_centred_in_its_own_frames(step, first):
    """(j + 1/2) steps, less half a hop as frames are centred on their first sample.

    A single frame has no patch of 16 around it: that is centred half a hop later, on the samples.
    """
    milliseconds = make_model(step / 100).timestamps(1_000).double() * 1000
    expected = 10.0 * step * torch.arange(1_000) + first
    torch.testing.assert_close(milliseconds, expected.double())
    assert first in (10 * step / 2 - 5, 10 * step / 2)


# Windows and normalisation


@pytest.mark.parametrize("shifts", [1, 2, 4, 16])
def test_every_time_step_of_every_clip_is_in_one_window(shifts):
    steps = torch.tensor([1, 2, 3, 12 * shifts, 13 * shifts, 13 * shifts + 1, 40 * shifts])
    size = PATCH // shifts
    wav = torch.zeros(7, 40 * PATCH)
    clips = cut_into_windows(wav, steps * size / wav.shape[1], PatchGrid(frames=208), 3, shifts)
    assert clips.steps.tolist() == steps.tolist()
    assert all(len(batch.clip) <= 3 for batch in clips.batches)
    covered = [
        (clip, shift + shifts * (13 * number + patch))
        for batch in clips.batches
        for clip, shift, number, patches in zip(*map(torch.Tensor.tolist, vars(batch).values()))
        for patch in range(patches)
    ]
    assert sorted(covered) == [
        (clip, step) for clip, count in enumerate(steps.tolist()) for step in range(count)
    ]


def test_all_shifts_go_through_the_encoder_together():
    model, sizes = make_model(), []
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model(noise(3 * 33_280).view(3, -1))
    assert sizes == [12]
    model.max_windows_per_batch = 5
    model(noise(3 * 33_280).view(3, -1))
    assert sizes == [12, 5, 5, 2]


def test_instance_normalization_counts_every_frame_of_the_clip_once():
    model = make_model(normalization="instance")
    wavs = [noise(50_000), noise(700, 1)]
    frames = model(*pad(wavs))
    for number, wav in enumerate(wavs):
        log_mel = LogMelSpectrogram()(wav[None])[..., : math.ceil(len(wav) / 160)].double()
        pair = log_mel.mean().item(), log_mel.std(correction=0).item()
        expected = embed_slowly(model, wav, 4, pair)
        assert_relatively_close(frames[number, : len(expected)], expected)


def test_the_fitted_pair_depends_on_the_step_neither_in_value_nor_in_cost():
    batches = [noise(50_000)[None], pad([noise(30_000, 1), noise(700, 2)])]
    pairs, windows = [], []
    for step in (None, 0.01):
        model, sizes = make_model(step, normalization="dataset"), []
        model.features.register_forward_pre_hook(
            lambda _, args, into=sizes: into.append(len(args[0]))
        )
        model.fit_normalization(batches)
        pairs.append(torch.stack([model.normalization.mean, model.normalization.std]))
        windows.append(sum(sizes))
    assert torch.equal(*pairs)
    assert windows == [4, 4]  # of 33,280 samples: 2, 1 and 1


# Training, and what is saved


def test_fine_tuning_has_the_gradients_of_the_definition():
    fast, slow = make_model(freeze=False), make_model(freeze=False)
    wavs = [noise(40_000), noise(3_000, 1)]
    weights = torch.linspace(-1, 1, 120)
    out = fast(*pad(wavs))
    (out * weights).square().sum().backward()
    for wav in wavs:
        (embed_slowly(slow, wav, 4) * weights).square().sum().backward()
    for (name, parameter), expected in zip(fast.named_parameters(), slow.parameters()):
        assert parameter.grad.any(), name
        assert_relatively_close(parameter.grad, expected.grad, tolerance=1e-4)


def test_the_pretrained_folder_is_the_same(folder, tmp_path):
    saved = AudioJEPA(folder, step_seconds=0.02).save_pretrained(tmp_path / "again")
    plain = AudioJEPA(folder).save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (plain / name).read_bytes()
    assert AudioJEPA(saved).step_seconds == 0.16


# Errors


@pytest.mark.parametrize(
    "step", [0.05, 0.03, 0.32, 0.005, 0.0, -0.04, 40, math.nan, math.inf, "0.04", [0.04]]
)
def test_a_step_that_does_not_fit_lists_those_that_do(step):
    with pytest.raises(ValueError, match=r"step_seconds=.*: with time patches of 16 frames") as e:
        make_model(step)
    assert str(e.value).endswith("choose one of 0.16, 0.08, 0.04, 0.02, 0.01")
    assert repr(step) in str(e.value)


def test_the_listed_steps_are_those_of_the_encoder():
    grid = {"patch_time": 12, "frames": 48}
    with pytest.raises(ValueError, match=r"12 frames choose one of 0\.12, 0\.06, 0\.04, 0\.03, "):
        make_model(0.08, grid)
    for step in (0.12, 0.06, 0.04, 0.03, 0.02, 0.01):
        assert make_model(step, grid).step_seconds == step


# The ways in


def test_embed_writes_the_finer_steps(folder, tmp_path):
    (tmp_path / "audio").mkdir()
    for number, samples in enumerate((20_000, 700, 41_000)):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", noise(samples, number) / 9, RATE)
    arguments = [str(folder), str(tmp_path / "audio"), "--step", "0.04"]
    embed.main([*arguments, "--level", "frame", "--out", str(tmp_path / "frames.npz")])
    embed.main([*arguments, "--out", str(tmp_path / "clips.npy")])
    model = AudioJEPA(folder, step_seconds=0.04)
    expected = [model(read_audio(file)[None])[0] for file in find_audio(tmp_path / "audio")]
    with np.load(tmp_path / "frames.npz") as arrays:
        assert arrays["rows"].tolist() == [32, 2, 65]  # samples / 640, rounded up
        seconds = torch.cat([model.timestamps(count) for count in arrays["rows"]])
        assert np.array_equal(arrays["seconds"], seconds.numpy())
        assert_relatively_close(torch.from_numpy(arrays["embeddings"]), torch.cat(expected))
    means = torch.stack([frames.mean(0) for frames in expected])
    assert_relatively_close(torch.from_numpy(np.load(tmp_path / "clips.npy")), means)


def test_embed_does_not_continue_with_another_step(folder, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(9_000) / 9, RATE)
    files, out = find_audio(tmp_path), tmp_path / "emb.npy"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed.Embeddings, "finish", interrupted)
        embed.embed_files(AudioJEPA(folder), files, out, progress=False)
    finer = AudioJEPA(folder, step_seconds=0.04)
    with pytest.raises(ValueError, match=r"begun with step_seconds=0\.16, not 0\.04"):
        embed.embed_files(finer, files, out, progress=False)


def test_embed_says_which_steps_there_are(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(9_000) / 9, RATE)
    arguments = [str(folder), str(tmp_path), "--out", str(tmp_path / "e.npy"), "--step", "0.05"]
    with pytest.raises(SystemExit, match=r"embed: step_seconds=0\.05: .*0\.08, 0\.04"):
        embed.main(arguments)


def test_hear_gets_the_finer_steps_in_milliseconds(folder):
    model, audio = hear.load_model(folder, step_seconds=0.04), noise(2 * RATE)[None]
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    ours = AudioJEPA(folder, step_seconds=0.04)
    torch.testing.assert_close(embeddings, ours(audio))
    torch.testing.assert_close(hear.get_scene_embeddings(audio, model), ours.embed(audio))
    assert timestamps[0].tolist() == list(range(15, 2_000, 40))


@pytest.mark.parametrize(
    ("entry", "rate"), [("audio_jepa_20ms", 320), ("audio_jepa_40ms", 640), ("audio_jepa", 2_560)]
)
def test_s3prls_entries_have_the_step_in_their_name(entry, rate, folder):
    upstream = getattr(hubconf, entry)(ckpt=folder, model_config=None, refresh=False)
    assert upstream.get_downsample_rates("hidden_states") == rate
    layers = upstream([noise(20_000), noise(700, 1)])["hidden_states"]
    model = AudioJEPA(folder, step_seconds=rate / RATE, output_all_hiddens=True)
    assert len(layers) == 3
    torch.testing.assert_close(torch.stack(layers)[:, :1], model(noise(20_000)[None]))


def test_s3prls_options_take_the_step(folder, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("step_seconds: 0.02\n")
    assert UpstreamExpert(folder, options).get_downsample_rates("hidden_states") == 320
    coarser = hubconf.audio_jepa_40ms(folder, model_config=options)  # the name is nearer
    assert coarser.get_downsample_rates("hidden_states") == 640
