"""Log-mel spectrograms against librosa's filterbank and a NumPy transform; normalisation."""

import librosa
import numpy as np
import pytest
import torch
import torchaudio

from speechbrain_jepa.features import (
    HOP_LENGTH,
    N_FFT,
    N_MELS,
    LogMelSpectrogram,
    Normalization,
    crop_samples,
    mel_filterbank,
    num_frames,
)


def numpy_log_mel(
    wav: np.ndarray, centered: bool = True, n_fft: int = 400, n_mels: int = 80
) -> np.ndarray:
    """The paper's settings written out in float64: one clip [samples] to [80, frames]."""
    wav = wav.astype(np.float64)
    if centered:
        wav = np.pad(wav, n_fft // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)  # periodic
    starts = range(0, len(wav) - n_fft + 1, 160)
    frames = np.stack([wav[start : start + n_fft] * hann for start in starts])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    filterbank = librosa.filters.mel(
        sr=16_000, n_fft=n_fft, n_mels=n_mels, fmin=50, fmax=8_000, htk=False, norm="slaney"
    )
    # float32 machine epsilon, 2 ** -23
    return np.log(filterbank.astype(np.float64) @ power.T + 2.0**-23)


def noise(samples: int, clips: int = 1, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


def tones() -> torch.Tensor:
    """Loud harmonics of 220 Hz over a faint noise floor: bands 1e8 apart in power."""
    time = torch.arange(24_000, dtype=torch.float64) / 16_000
    wave = sum(torch.sin(2 * torch.pi * 220 * k * time) / k for k in range(1, 20))
    return (0.2 * wave[None].float()) + noise(24_000, scale=1e-4)


def clicks_and_silence() -> torch.Tensor:
    wav = torch.zeros(1, 16_000)
    wav[0, [0, 3_000, 9_999, 15_999]] = torch.tensor([0.9, -1.0, 0.5, 1.0])
    return wav


@pytest.mark.parametrize(
    "wav",
    [noise(16_000), noise(33_333, scale=1.0), noise(16_000, scale=1e-5), clicks_and_silence()],
    ids=["noise", "loud, odd length", "faint", "clicks in silence"],
)
def test_log_mel_equals_librosa_filterbank_with_a_numpy_transform(wav):
    """1e-4 of the logarithm is 1e-4 relative in power, and of the log-mel wherever it exceeds 1."""
    ours = LogMelSpectrogram()(wav)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[0].numpy(), numpy_log_mel(wav[0].numpy()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n_fft", "n_mels"), [(1024, 80), (1024, 128), (640, 64), (200, 16)])
def test_another_window_or_number_of_bands_equals_librosa_and_numpy_too(n_fft, n_mels):
    log_mel, wav = LogMelSpectrogram(n_fft, n_mels), noise(16_000)
    ours = log_mel(wav)
    expected = numpy_log_mel(wav[0].numpy(), n_fft=n_fft, n_mels=n_mels)
    assert ours.shape == (1, n_mels, num_frames(16_000))
    np.testing.assert_allclose(ours[0].numpy(), expected, rtol=0, atol=1e-4)
    samples = crop_samples(10, n_fft)
    crop = log_mel(wav[:, 20 * 160 - n_fft // 2 :][:, :samples], margins=True)
    torch.testing.assert_close(crop, ours[..., 20:30], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_mels": 256}, "n_mels=256: .* hold no bin of a transform of n_fft=400"),
        ({"n_fft": 128}, "n_fft=128: must be even, from 160 to 16384"),
        ({"n_fft": 401}, "n_fft=401: must be even"),
        ({"n_mels": 0}, "n_mels=0: must be from 1 to 512"),
    ],
    ids=str,
)
def test_a_front_end_that_cannot_be_is_an_error(options, words):
    with pytest.raises(ValueError, match=words):
        LogMelSpectrogram(**options)


def test_mel_filterbank_equals_librosa_to_float32_rounding():
    reference = librosa.filters.mel(
        sr=16_000, n_fft=400, n_mels=80, fmin=50, fmax=8_000, htk=False, norm="slaney"
    )
    np.testing.assert_allclose(mel_filterbank().numpy(), reference, rtol=1e-6, atol=1e-12)


def test_mel_filterbank_equals_torchaudio_within_its_float32():
    theirs = torchaudio.functional.melscale_fbanks(
        201, 50.0, 8_000.0, 80, 16_000, norm="slaney", mel_scale="slaney"
    )
    ours = mel_filterbank()
    # torchaudio takes differences of frequencies up to 8000 Hz in float32
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-5 * ours.max().item())


def test_mel_power_of_loud_tones_equals_numpy():
    """Float32 rounding of the loudest bin reaches bands 1e8 below it: the tolerance is 1e-4 of the
    band plus the float32 epsilon of the loudest band.
    """
    wav = tones()
    ours = LogMelSpectrogram()(wav)[0].double().exp().numpy()
    reference = np.exp(numpy_log_mel(wav[0].numpy()))
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=2.0**-23 * reference.max())


def test_silence_gives_the_log_of_float32_epsilon():
    log_mel = LogMelSpectrogram()(torch.zeros(1, 16_000))
    assert torch.equal(log_mel, torch.full_like(log_mel, np.log(2.0**-23)))


@pytest.mark.parametrize("frames", [1, 16, 208, 320, 640])
def test_crop_samples_give_the_asked_frames_and_not_one_sample_less(frames):
    log_mel = LogMelSpectrogram()
    samples = crop_samples(frames)
    assert log_mel(noise(samples), margins=True).shape == (1, N_MELS, frames)
    if frames > 1:
        assert log_mel(noise(samples - 1), margins=True).shape == (1, N_MELS, frames - 1)


@pytest.mark.parametrize("samples", [201, 319, 320, 16_000, 33_280, 33_439])
def test_num_frames_counts_the_frames_of_a_centred_spectrogram(samples):
    assert LogMelSpectrogram()(noise(samples)).shape == (1, N_MELS, num_frames(samples))


@pytest.mark.parametrize("first_frame", [2, 57, 140])
def test_a_crop_with_margins_equals_the_same_frames_of_the_whole_file(first_frame):
    """Frame i is centred at sample 160 i: with half a window of margin nothing is padded."""
    log_mel, frames = LogMelSpectrogram(), 100
    wav = noise(40_000)
    start = first_frame * HOP_LENGTH - N_FFT // 2
    crop = log_mel(wav[:, start : start + crop_samples(frames)], margins=True)
    whole = log_mel(wav)[:, :, first_frame : first_frame + frames]
    torch.testing.assert_close(crop, whole, rtol=1e-6, atol=1e-6)


def test_margins_compute_the_uncentred_transform():
    wav = noise(8_000)
    ours = LogMelSpectrogram()(wav, margins=True)[0].numpy()
    reference = numpy_log_mel(wav[0].numpy(), centered=False)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)


def test_log_mel_does_not_depend_on_batch_mates():
    log_mel, wav = LogMelSpectrogram(), noise(16_000, clips=5)
    together = log_mel(wav)
    alone = torch.cat([log_mel(clip[None]) for clip in wav])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_log_mel_is_float32_under_autocast_and_from_half_precision():
    log_mel, wav = LogMelSpectrogram(), noise(16_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = log_mel(wav)
    assert torch.equal(under_autocast, log_mel(wav))
    assert log_mel(wav.bfloat16()).dtype == torch.float32


def test_log_mel_has_nothing_to_train_and_nothing_to_store():
    log_mel = LogMelSpectrogram()
    assert list(log_mel.parameters()) == []
    assert log_mel.state_dict() == {}


@pytest.mark.parametrize(
    ("wav", "margins", "message"),
    [
        (torch.zeros(16_000), False, r"\[B, samples\]"),
        (torch.zeros(1, 1, 16_000), False, r"\[B, samples\]"),
        (torch.zeros(1, 200), False, "200 samples .* at least 201"),
        (torch.zeros(1, 399), True, "399 samples .* at least 400"),
    ],
)
def test_waveforms_that_do_not_fit_are_refused_with_the_limit(wav, margins, message):
    with pytest.raises(ValueError, match=message):
        LogMelSpectrogram()(wav, margins=margins)


def test_the_shortest_waveforms_still_give_a_frame():
    assert LogMelSpectrogram()(torch.zeros(1, 201)).shape == (1, 80, 2)  # centred at 0 and 160
    assert LogMelSpectrogram()(torch.zeros(1, 400), margins=True).shape == (1, 80, 1)


def test_normalization_fit_equals_numpy_over_all_values():
    rng = np.random.default_rng(0)
    batches = [rng.normal(-7.0, 4.2, size=(b, 80, t)) for b, t in [(3, 208), (1, 16), (5, 320)]]
    norm = Normalization().fit(torch.from_numpy(batch).float() for batch in batches)
    values = np.concatenate([batch.ravel() for batch in batches])
    # numpy's std divides by the count, as ours does; float32 values, so 1e-6
    assert norm.mean.item() == pytest.approx(values.mean(), rel=1e-6)
    assert norm.std.item() == pytest.approx(values.std(), rel=1e-6)


def test_normalization_fit_keeps_its_digits_when_the_mean_is_far_larger_than_the_deviation():
    values = torch.full((2, 80, 500), 1000.0)
    values[:, ::2] += 0.25
    # float32 sums of squares would lose a variance of 0.125 ** 2 beside 1e6
    assert Normalization().fit([values]).std.item() == pytest.approx(0.125, rel=1e-5)


def test_normalized_corpus_has_zero_mean_and_unit_deviation():
    spectrogram = LogMelSpectrogram()(noise(32_000, clips=4))
    normalized = Normalization().fit([spectrogram])(spectrogram)
    assert normalized.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert normalized.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_normalization_travels_with_the_state_dict():
    norm = Normalization()
    norm.load_state_dict(Normalization(-7.0633, 4.1971).state_dict())  # AudioSet, released code
    x = torch.tensor([-7.0633, -7.0633 + 4.1971])
    torch.testing.assert_close(norm(x), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_normalization_refuses_what_cannot_divide(mean, std):
    with pytest.raises(ValueError, match="std positive"):
        Normalization(mean, std)


def test_normalization_fit_refuses_silence_and_nothing_and_keeps_its_pair():
    norm = Normalization(-7.0, 4.0)
    with pytest.raises(ValueError, match="silent or constant"):
        norm.fit([torch.zeros(1, 80, 16)])
    with pytest.raises(ValueError, match="no spectrogram"):
        norm.fit([])
    assert (norm.mean.item(), norm.std.item()) == (-7.0, 4.0)
