"""Log-mel spectrograms, exactly as M2D and the paper compute them, and their normalisation."""

import torch
import torchaudio
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples: the window and the transform, 25 ms
HOP_LENGTH = 160  # samples between frames, 10 ms: 100 frames a second
N_MELS = 80  # bands
F_MIN, F_MAX = 50.0, 8_000.0  # Hz
LOG_OFFSET = torch.finfo(torch.float32).eps  # added to the mel power before the logarithm


def crop_samples(frames: int) -> int:
    """Samples that `frames` frames need when the first one is centred at sample N_FFT // 2.

    Example
    -------
    >>> crop_samples(208)
    33520
    """
    return (frames - 1) * HOP_LENGTH + N_FFT


def num_frames(samples: int) -> int:
    """Frames of a centred spectrogram of `samples` samples: one every HOP_LENGTH, from sample 0 on.

    Example
    -------
    >>> num_frames(16_000)
    101
    """
    return samples // HOP_LENGTH + 1


class LogMelSpectrogram(nn.Module):
    """Waveform to natural-log mel power (paper, section 4.1; the settings are M2D's).

    80 bands from 50 to 8000 Hz on the Slaney scale with Slaney area normalisation, periodic Hann
    window of 400 samples, hop 160, power 2, log(x + float32 epsilon). Computed in float32
    whatever the autocast state.

    Example
    -------
    >>> wav = torch.randn(2, 16_000)
    >>> LogMelSpectrogram()(wav).shape
    torch.Size([2, 80, 101])
    >>> LogMelSpectrogram()(torch.randn(2, crop_samples(208)), margins=True).shape
    torch.Size([2, 80, 208])
    """

    def __init__(self):
        super().__init__()
        filterbank = torchaudio.functional.melscale_fbanks(
            N_FFT // 2 + 1, F_MIN, F_MAX, N_MELS, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filterbank", filterbank.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, wav: Tensor, margins: bool = False) -> Tensor:
        """
        Arguments
        ---------
        wav : Tensor [B, samples]
            Mono, 16 kHz.
        margins : bool
            False: frame i is centred at sample i * HOP_LENGTH, and the ends are padded by
            reflection. True: `wav` already carries half a window on each side (`crop_samples`),
            so a crop's frames equal the same frames of the whole file.

        Returns
        -------
        Tensor [B, 80, frames], float32
        """
        if wav.dim() != 2:
            raise ValueError(f"expected waveforms [B, samples], got shape {tuple(wav.shape)}")
        shortest = N_FFT if margins else N_FFT // 2 + 1
        if wav.shape[1] < shortest:
            raise ValueError(
                f"{wav.shape[1]} samples are too few for one window: pad to at least {shortest}"
            )
        with torch.autocast(wav.device.type, enabled=False):
            spectrum = torch.stft(
                wav.float(),
                N_FFT,
                HOP_LENGTH,
                window=self.window,
                center=not margins,
                pad_mode="reflect",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            return torch.matmul(self.filterbank, power).add_(LOG_OFFSET).log_()


class Normalization(nn.Module):
    """(x - mean) / std with one pair of numbers for the corpus.

    AudioSet's pair in the released code is (-7.06, 4.19).

    Arguments
    ---------
    mean, std : float
        In units of log-mel power. `std` must be positive and finite.

    Example
    -------
    >>> Normalization(mean=-7.0, std=4.0)(torch.full((1, 80, 16), -3.0)).unique()
    tensor([1.])
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.set(mean, std)

    def set(self, mean: float, std: float) -> None:
        """Replace the pair in place."""
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        if not (mean.isfinite() and std.isfinite() and std > 0):
            raise ValueError(
                f"norm_mean={mean:g}, norm_std={std:g}: both must be finite and std positive; "
                "silent or constant audio has no deviation to divide by"
            )
        self.mean.fill_(mean)
        self.std.fill_(std)

    def fit(self, spectrograms) -> "Normalization":
        """Measure the pair over an iterable of spectrograms [B, 80, frames], in float64."""
        count, total, squares = 0, 0.0, 0.0
        for spectrogram in spectrograms:
            values = spectrogram.double()
            count += values.numel()
            total += values.sum().item()
            squares += values.square().sum().item()
        if count == 0:
            raise ValueError("no spectrogram to measure the normalisation on")
        mean = total / count
        self.set(mean, max(squares / count - mean**2, 0.0) ** 0.5)
        return self

    def forward(self, spectrogram: Tensor) -> Tensor:
        return (spectrogram - self.mean) / self.std
