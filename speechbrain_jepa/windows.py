"""Clips of any length, cut into windows of the length that an encoder was trained on.

Shapes: B clips, W windows of one batch of windows.

A clip of n samples has ceil(n / 160) frames, those centred inside it, from the log-mel of the clip
alone (reflected at its own two ends), and T time steps: every time patch that begins inside it.
The frames that the last patch lacks are digital silence, as in pretraining. The T patches are cut
into windows of the training length; the last one has as many patches as are left. So nothing of a
clip's windows depends on the batch it came in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speechbrain_jepa.features import (
    HOP_LENGTH,
    LOG_OFFSET,
    MARGIN,
    LogMelSpectrogram,
    crop_samples,
)
from speechbrain_jepa.vit import PatchGrid

SILENCE = math.log(LOG_OFFSET)  # log-mel of zeros


@dataclass(frozen=True)
class WindowBatch:
    """Windows of similar length that are encoded together, longest first; all on the CPU.

    Arguments
    ---------
    clip : Tensor [W], int64
        Which clip each is from.
    number : Tensor [W], int64
        Which of its clip's windows it is, from 0.
    patches : Tensor [W], int64
        Its time patches.
    """

    clip: Tensor
    number: Tensor
    patches: Tensor

    @property
    def longest(self) -> int:
        """Time patches of the longest window."""
        return int(self.patches[0])

    @property
    def ragged(self) -> bool:
        """Whether they differ in length."""
        return bool(self.patches[0] != self.patches[-1])


@dataclass(frozen=True)
class Windows:
    """A batch of clips and the windows they are cut into (`cut_into_windows`).

    Arguments
    ---------
    grid : PatchGrid
        Of one window.
    padded : Tensor [B, MARGIN + samples and more]
        The clips, each reflected at its two ends.
    samples, steps : Tensor [B], int64
        Of each clip, on the CPU.
    num_steps : int
        T: time steps of the whole batch, padding included.
    batches : list of WindowBatch
    """

    grid: PatchGrid
    padded: Tensor
    samples: Tensor
    steps: Tensor
    num_steps: int
    batches: list[WindowBatch]

    @property
    def per_clip(self) -> int:
        """Windows of a clip of `num_steps`."""
        return -(-self.num_steps // self.grid.time_patches)

    @property
    def longest(self) -> int:
        """Time steps of the longest window that a clip of `num_steps` has."""
        return min(self.num_steps, self.grid.time_patches)

    def log_mels(self, features: LogMelSpectrogram) -> Iterator[tuple[WindowBatch, Tensor, Tensor]]:
        """The windows' log-mel, one batch of windows after the other.

        Yields
        ------
        windows : WindowBatch
        log_mel : Tensor [W, 80, frames]
            Of as many frames as the longest has; SILENCE where there is no audio.
        audio : bool Tensor [W, frames]
            Where there is audio.
        """
        device = self.padded.device
        hop = self.grid.frames * HOP_LENGTH  # samples from one window to the next
        for windows in self.batches:
            frames = windows.longest * self.grid.patch_time
            views = self.padded.unfold(1, crop_samples(frames), hop)
            clip, number = windows.clip.to(device), windows.number.to(device)
            log_mel = features(views[clip, number], margins=True)
            clip_frames = -(-self.samples // HOP_LENGTH)[windows.clip]
            own_frames = clip_frames - windows.number * self.grid.frames
            audio = torch.arange(frames, device=device) < own_frames.to(device)[:, None]
            yield windows, log_mel.masked_fill_(~audio[:, None], SILENCE), audio

    def log_mel_sums(self, features: LogMelSpectrogram) -> Tensor:
        """Count, sum and sum of squares of each clip's log-mel: [3, B], float64."""
        sums = self.padded.new_zeros(3, len(self.samples), dtype=torch.float64)
        for windows, log_mel, audio in self.log_mels(features):
            values = log_mel.double() * audio[:, None]
            count = audio.sum(1) * log_mel.shape[1]
            parts = torch.stack([count, values.sum((1, 2)), values.square().sum((1, 2))])
            sums.index_add_(1, windows.clip.to(sums.device), parts)
        return sums


def cut_into_windows(
    wav: Tensor, wav_lens: Tensor | None, grid: PatchGrid, max_windows: int
) -> Windows:
    """Check a batch of waveforms and cut it into windows.

    Arguments
    ---------
    wav : Tensor [B, samples], floating
        Mono, 16 kHz.
    wav_lens : Tensor [B] or None
        Lengths over that of the batch. None: all 1.
    grid : PatchGrid
        Of one window, the encoder's.
    max_windows : int
        At most so many are encoded at once.

    Raises
    ------
    ValueError
        If the shape is another, or a clip is empty or holds NaN or infinity.

    Example
    -------
    >>> windows = cut_into_windows(torch.randn(1, 48_000), None, PatchGrid(frames=208), 128)
    >>> windows.num_steps, [batch.patches.tolist() for batch in windows.batches]
    (19, [[13], [6]])
    """
    samples = _lengths(wav, wav_lens)
    step = grid.patch_time * HOP_LENGTH
    steps, num_steps = -(-samples // step), -(-wav.shape[1] // step)
    whole = -(-num_steps // grid.time_patches) * min(num_steps, grid.time_patches) * step
    return Windows(
        grid=grid,
        padded=_reflect_ends(wav.float(), samples, whole),
        samples=samples,
        steps=steps,
        num_steps=num_steps,
        batches=list(_window_batches(steps, grid.time_patches, max_windows)),
    )


def _lengths(wav: Tensor, wav_lens: Tensor | None) -> Tensor:
    """Samples of each clip of a checked batch, on the CPU."""
    if wav.dim() != 2 or not wav.is_floating_point():
        raise ValueError(
            f"expected waveforms [B, samples] of floats, got {wav.dtype} of shape "
            f"{tuple(wav.shape)}: average channels, add a batch axis with unsqueeze(0), "
            "divide int16 by 32768"
        )
    batch, width = wav.shape
    if wav_lens is None:
        wav_lens = torch.ones(batch)
    if wav_lens.shape != (batch,):
        raise ValueError(f"wav_lens has shape {tuple(wav_lens.shape)}, not ({batch},)")
    relative = wav_lens.detach().cpu().double()
    lengths = (relative * width).round()
    inside = torch.arange(width, device=wav.device) < lengths.long().to(wav.device)[:, None]
    finite = (wav.isfinite() | ~inside).all(1).cpu()
    for wrong, what in (
        (~((relative >= 0) & (relative <= 1 + 1e-6)), "has a wav_lens outside 0 to 1"),
        (lengths < 1, "is empty"),
        (~finite, "holds NaN or infinite samples"),
    ):
        if wrong.any():
            clip = int(wrong.nonzero()[0])
            raise ValueError(
                f"clip {clip} (from 0) of {batch} {what} (wav_lens={relative[clip]:g} of "
                f"{width} samples)"
            )
    if batch == 0:
        raise ValueError(f"the batch of shape {tuple(wav.shape)} has no clip")
    return lengths.long().clamp(max=width)


def _window_batches(steps: Tensor, window: int, limit: int) -> Iterator[WindowBatch]:
    """Cut clips of so many time steps into windows, and those into batches of at most `limit`.

    Whole windows stay among themselves: without padding, attention needs no mask. Of the others, a
    batch holds none shorter than half its longest.
    """
    windows = -(-steps // window)
    clip = torch.repeat_interleave(windows)
    number = torch.arange(len(clip)) - (windows.cumsum(0) - windows)[clip]
    patches = (steps[clip] - number * window).clamp(max=window)
    order = patches.argsort(descending=True, stable=True)
    clip, number, patches = clip[order], number[order], patches[order]
    start = 0
    while start < len(clip):
        longest = patches[start]
        shortest = longest if longest == window else longest / 2
        stop = min(int((patches >= shortest).sum()), start + limit)
        yield WindowBatch(clip[start:stop], number[start:stop], patches[start:stop])
        start = stop


def _reflect_ends(wav: Tensor, samples: Tensor, width: int) -> Tensor:
    """Continue each clip [B, :samples] by MARGIN reflected samples at its two ends.

    A clip shorter than that goes on being reflected, back and forth. Returns
    [B, at least MARGIN + width + MARGIN]; the clip begins at MARGIN.
    """
    samples = samples.to(wav.device)[:, None]
    margin = torch.arange(MARGIN, device=wav.device).expand(len(wav), -1)
    place = torch.cat([margin - MARGIN, margin + samples], 1)
    period = (2 * (samples - 1)).clamp(min=1)
    phase = place.remainder(period)
    reflected = wav.gather(1, torch.minimum(phase, period - phase))
    padded = nn.functional.pad(wav, (MARGIN, width + MARGIN - wav.shape[1]))
    return padded.scatter_(1, place + MARGIN, reflected)
