"""The baseline that every encoder is compared with."""

from collections.abc import Sequence

import numpy as np
import torch

from speechbrain_jepa.features import LogMelSpectrogram

LOG_MEL = "log-mel statistics"  # what tables call it


@torch.inference_mode()
def logmel_statistics(
    wavs: Sequence[np.ndarray] | torch.Tensor, log_mel: LogMelSpectrogram | None = None
) -> np.ndarray:
    """Mean and deviation over time of each log-mel band: the baseline of any encoder.

    Arguments
    ---------
    wavs : sequence of arrays [samples], or Tensor [n, samples]
        At 16 kHz. Lengths may differ.
    log_mel : LogMelSpectrogram, or None
        Computes where it is. None: a new one, where the waveforms are.

    Returns
    -------
    array [n, 160], float32
        80 means, then 80 deviations.

    Example
    -------
    >>> logmel_statistics(torch.randn(2, 16_000)).shape
    (2, 160)
    """
    if log_mel is None:
        log_mel = LogMelSpectrogram().to(getattr(wavs, "device", "cpu"))
    device, rows = log_mel.window.device, []
    for wav in wavs:
        spectrogram = log_mel(torch.as_tensor(wav).to(device)[None])[0]
        rows.append(torch.cat([spectrogram.mean(1), spectrogram.std(1, correction=0)]))
    return torch.stack(rows).cpu().numpy()
