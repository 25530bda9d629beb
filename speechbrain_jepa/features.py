"""Log-mel spectrograms, as M2D and the paper compute them unless asked for others; their
normalisation."""

import math

import torch
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples: the window and the transform, 25 ms, unless asked for another
HOP_LENGTH = 160  # samples between frames, 10 ms: 100 frames a second
N_MELS = 80  # bands, unless asked for others
F_MIN, F_MAX = 50.0, 8_000.0  # Hz
MAX_N_FFT, MAX_N_MELS = 2**14, 512  # of any front end
LOG_OFFSET = torch.finfo(torch.float32).eps  # added to the mel power before the logarithm


def crop_samples(frames: int, n_fft: int = N_FFT) -> int:
    """Samples that `frames` frames need when the first one is centred at sample n_fft // 2.

    Example
    -------
    >>> crop_samples(208)
    33520
    """
    return (frames - 1) * HOP_LENGTH + n_fft


def num_frames(samples: int) -> int:
    """Frames of a centred spectrogram of `samples` samples: one every HOP_LENGTH, from sample 0 on.

    Example
    -------
    >>> num_frames(16_000)
    101
    """
    return samples // HOP_LENGTH + 1


def mel_filterbank(n_mels: int = N_MELS, n_fft: int = N_FFT) -> Tensor:
    """Slaney's triangles with Slaney's area norm [n_mels, n_fft / 2 + 1], worked out in float64.

    Why not torchaudio.functional.melscale_fbanks: it works in float32, which costs up to 1.5e-4 in
    the log-mel of real audio; to librosa's filterbank, which M2D uses, this one is equal to 1e-6.

    Example
    -------
    >>> mel_filterbank().shape
    torch.Size([80, 201])
    """
    # Slaney's scale: 3 mel every 200 Hz up to 1000 Hz, then 27 mel for every factor of 6.4
    knee_hz, knee_mel, mel_per_log = 1000.0, 15.0, 27 / math.log(6.4)

    def to_mel(hz):
        return hz * 3 / 200 if hz < knee_hz else knee_mel + mel_per_log * math.log(hz / knee_hz)

    mel = torch.linspace(to_mel(F_MIN), to_mel(F_MAX), n_mels + 2, dtype=torch.float64)
    logarithmic = knee_hz * ((mel - knee_mel) / mel_per_log).exp()
    hz = torch.where(mel < knee_mel, mel * 200 / 3, logarithmic)[:, None]
    lower, center, upper = hz[:-2], hz[1:-1], hz[2:]
    bins = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - lower) / (center - lower), (upper - bins) / (upper - center)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (upper - lower)).float()


class LogMelSpectrogram(nn.Module):
    """Waveform to natural-log mel power (paper, section 4.1; the settings are M2D's).

    80 bands from 50 to 8000 Hz on the Slaney scale with Slaney area normalisation, periodic Hann
    window of 400 samples, hop 160, power 2, log(x + float32 epsilon). Computed in float32
    whatever the autocast state.

    Arguments
    ---------
    n_fft : int
        Samples of the window and the transform, even, from 160 (the hop) to 16384. Default 400, 25
        ms, as in the paper; 1024, 64 ms, resolves the lower harmonics (BYOL-A has it).
    n_mels : int
        Bands, from 1 to 512. Default 80.

    Raises
    ------
    ValueError
        If one is out of its limits, or a band is so narrow that no bin of the transform is in it.

    Example
    -------
    >>> wav = torch.randn(2, 16_000)
    >>> LogMelSpectrogram()(wav).shape
    torch.Size([2, 80, 101])
    >>> LogMelSpectrogram()(torch.randn(2, crop_samples(208)), margins=True).shape
    torch.Size([2, 80, 208])
    """

    filterbank: Tensor
    window: Tensor

    def __init__(self, n_fft: int = N_FFT, n_mels: int = N_MELS):
        super().__init__()
        if not HOP_LENGTH <= n_fft <= MAX_N_FFT or n_fft % 2:
            raise ValueError(f"n_fft={n_fft}: must be even, from {HOP_LENGTH} to {MAX_N_FFT}")
        if not 1 <= n_mels <= MAX_N_MELS:
            raise ValueError(f"n_mels={n_mels}: must be from 1 to {MAX_N_MELS}")
        self.n_fft, self.n_mels = n_fft, n_mels
        filterbank = mel_filterbank(n_mels, n_fft)
        empty = int((filterbank.sum(1) == 0).sum())
        if empty:
            raise ValueError(
                f"n_mels={n_mels}: {empty} bands are so narrow that they hold no bin of a "
                f"transform of n_fft={n_fft}: use fewer bands or a longer window"
            )
        self.register_buffer("filterbank", filterbank, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

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
        Tensor [B, n_mels, frames], float32
        """
        if wav.dim() != 2:
            raise ValueError(f"expected waveforms [B, samples], got shape {tuple(wav.shape)}")
        shortest = self.n_fft if margins else self.n_fft // 2 + 1
        if wav.shape[1] < shortest:
            raise ValueError(
                f"{wav.shape[1]} samples are too few for one window: pad to at least {shortest}"
            )
        with torch.autocast(wav.device.type, enabled=False):
            spectrum = torch.stft(
                wav.float(),
                self.n_fft,
                HOP_LENGTH,
                window=self.window,
                center=not margins,
                pad_mode="reflect",
                return_complex=True,
            )
            real, imaginary = torch.view_as_real(spectrum).unbind(-1)
            power = torch.addcmul(real * real, imaginary, imaginary)
            return torch.matmul(self.filterbank, power).add_(LOG_OFFSET).log_()


class Normalization(nn.Module):
    """(x - mean) / std with one pair of numbers for the corpus.

    AudioSet's pair in the released code is (-7.0633, 4.1971).

    Arguments
    ---------
    mean, std : float
        In units of log-mel power. `std` must be positive and finite.

    Example
    -------
    >>> Normalization(mean=-7.0, std=4.0)(torch.full((1, 80, 16), -3.0)).unique()
    tensor([1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.set(mean, std)

    def set(self, mean: float, std: float) -> None:
        """Replace the pair in place."""
        center, scale = torch.as_tensor(mean), torch.as_tensor(std)
        if not (center.isfinite() and scale.isfinite() and scale > 0):
            raise ValueError(
                f"norm_mean={center:g}, norm_std={scale:g}: both must be finite and std positive; "
                "silent or constant audio has no deviation to divide by"
            )
        self.mean.fill_(center)
        self.std.fill_(scale)

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
