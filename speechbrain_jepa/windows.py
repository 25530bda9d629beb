"""Clips of any length, cut into windows of the length that an encoder was trained on.

Shapes: B clips, K shifts, W windows of one batch of windows.

A clip of n samples has ceil(n / 160) frames, those centred inside it, from the log-mel of the clip
alone (reflected at its own two ends), and T time steps: every time patch that begins inside it.
The frames that the last patch lacks are digital silence, as in pretraining. The T patches are cut
into windows of the training length; the last one has as many patches as are left. So nothing of a
clip's windows depends on the batch it came in.

With K shifts a time step is patch_time / K frames. Step K * m + i is time patch m of shift i,
whose patches begin i steps later than those of shift 0; each shift is cut into windows by itself.
All patches begin `lead` frames before their step, so that they have it in the middle; the frames
before the clip are digital silence like those behind it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speechbrain_jepa.features import (
    HOP_LENGTH,
    LOG_OFFSET,
    N_FFT,
    SAMPLE_RATE,
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
    shift : Tensor [W], int64
        Which of the K shifts, from 0.
    number : Tensor [W], int64
        Which of its shift's windows it is, from 0.
    patches : Tensor [W], int64
        Its time patches.
    """

    clip: Tensor
    shift: Tensor
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
    shifts : int
        K.
    n_fft : int
        Of the log-mel that they are cut for.
    padded : Tensor [B, lead * hop + n_fft / 2 + samples and more]
        The clips, each reflected at its two ends.
    samples, steps : Tensor [B], int64
        Of each clip, on the CPU.
    num_steps : int
        T: time steps of the whole batch, padding included.
    batches : list of WindowBatch
    """

    grid: PatchGrid
    shifts: int
    n_fft: int
    padded: Tensor
    samples: Tensor
    steps: Tensor
    num_steps: int
    batches: list[WindowBatch]

    @property
    def per_shift(self) -> int:
        """Windows of shift 0, which has most, of a clip of `num_steps`."""
        return -(-self.num_steps // (self.shifts * self.grid.time_patches))

    @property
    def longest(self) -> int:
        """Time patches of the longest window that a clip of `num_steps` has."""
        return min(-(-self.num_steps // self.shifts), self.grid.time_patches)

    def log_mels(self, features: LogMelSpectrogram) -> Iterator[tuple[WindowBatch, Tensor, Tensor]]:
        """The windows' log-mel, one batch of windows after the other.

        Yields
        ------
        windows : WindowBatch
        log_mel : Tensor [W, bands, frames]
            Of as many frames as the longest has; SILENCE where there is no audio.
        audio : bool Tensor [W, frames]
            Where there is audio.
        """
        device = self.padded.device
        step = self.grid.patch_time // self.shifts  # frames
        lead = lead_frames(self.grid, self.shifts)
        for windows in self.batches:
            frames = windows.longest * self.grid.patch_time
            views = self.padded.unfold(1, crop_samples(frames, self.n_fft), step * HOP_LENGTH)
            first_step = windows.number * (self.grid.frames // step) + windows.shift
            log_mel = features(views[windows.clip.to(device), first_step.to(device)], margins=True)
            first_frame = first_step * step - lead
            clip_frames = -(-self.samples // HOP_LENGTH)[windows.clip]
            frame = first_frame.to(device)[:, None] + torch.arange(frames, device=device)
            audio = (frame >= 0) & (frame < clip_frames.to(device)[:, None])
            yield windows, log_mel.masked_fill_(~audio[:, None], SILENCE), audio

    def log_mel_sums(self, features: LogMelSpectrogram) -> Tensor:
        """Count, sum and sum of squares of each clip's log-mel: [3, B], float64.

        A frame is in the patches of K time steps and counts in the one it belongs to.
        """
        sums = self.padded.new_zeros(3, len(self.samples), dtype=torch.float64)
        patch_time = self.grid.patch_time
        lead = lead_frames(self.grid, self.shifts)
        for windows, log_mel, audio in self.log_mels(features):
            frame = torch.arange(log_mel.shape[2])
            in_step = (frame % patch_time - lead) // (patch_time // self.shifts) == 0
            own = in_step & (frame // patch_time < windows.patches[:, None])
            audio = audio & own.to(audio.device)
            values = log_mel.double() * audio[:, None]
            count = audio.sum(1) * log_mel.shape[1]
            parts = torch.stack([count, values.sum((1, 2)), values.square().sum((1, 2))])
            sums.index_add_(1, windows.clip.to(sums.device), parts)
        return sums


def count_shifts(grid: PatchGrid, step_seconds: float | None) -> int:
    """K: how often a time step of so many seconds goes into a time patch; 1 for None.

    Raises
    ------
    ValueError
        If a time patch is not a whole number of such steps, or a step of frames.

    Example
    -------
    >>> count_shifts(PatchGrid(frames=208), 0.04)
    4
    """
    if step_seconds is None:
        return 1
    shifts = [k for k in range(1, grid.patch_time + 1) if grid.patch_time % k == 0]
    seconds = [grid.patch_time // k * HOP_LENGTH / SAMPLE_RATE for k in shifts]
    if isinstance(step_seconds, int | float):
        for k, value in zip(shifts, seconds, strict=True):
            if math.isclose(step_seconds, value, rel_tol=1e-6):
                return k
    raise ValueError(
        f"step_seconds={step_seconds!r}: with time patches of {grid.patch_time} frames choose one "
        f"of {', '.join(f'{value:g}' for value in seconds)}"
    )


def lead_frames(grid: PatchGrid, shifts: int) -> int:
    """Frames by which a time patch begins before its step, to have it in the middle.

    The two differ by an odd number of frames where a step is a single one of an even patch: then
    the patch has one frame more behind the step than before it.

    Example
    -------
    >>> [lead_frames(PatchGrid(frames=208), shifts) for shifts in (1, 2, 4, 8, 16)]
    [0, 4, 6, 7, 7]
    """
    return (grid.patch_time - grid.patch_time // shifts) // 2


def cut_into_windows(
    wav: Tensor,
    wav_lens: Tensor | None,
    grid: PatchGrid,
    max_windows: int,
    shifts: int = 1,
    n_fft: int = N_FFT,
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
    shifts : int
        K, a divisor of the grid's patch_time. Default 1: a time step is a time patch.
    n_fft : int
        Of the `LogMelSpectrogram` that they are for. Default 400.

    Raises
    ------
    ValueError
        If the shape is another, or a clip is empty or holds NaN or infinity.

    Example
    -------
    >>> windows = cut_into_windows(torch.randn(1, 48_000), None, PatchGrid(frames=208), 128)
    >>> windows.num_steps, [batch.patches.tolist() for batch in windows.batches]
    (19, [[13], [6]])
    >>> windows = cut_into_windows(torch.randn(1, 48_000), None, PatchGrid(frames=208), 128, 4)
    >>> windows.num_steps, [batch.patches.tolist() for batch in windows.batches]
    (75, [[13, 13, 13, 13], [6, 6, 6, 5]])
    """
    samples = _lengths(wav, wav_lens)
    step = grid.patch_time // shifts * HOP_LENGTH
    steps, num_steps = -(-samples // step), -(-wav.shape[1] // step)
    # of each shift: the steps K * m + i, of which shift 0 has most
    patches = (steps[:, None] - torch.arange(shifts) + shifts - 1) // shifts
    most = -(-num_steps // shifts)
    whole = -(-most // grid.time_patches) * min(most, grid.time_patches) * step * shifts
    lead, last_shift = lead_frames(grid, shifts) * HOP_LENGTH, (shifts - 1) * step
    return Windows(
        grid=grid,
        shifts=shifts,
        n_fft=n_fft,
        padded=_reflect_ends(wav.float(), samples, lead, whole + last_shift, n_fft // 2),
        samples=samples,
        steps=steps,
        num_steps=num_steps,
        batches=list(_window_batches(patches, grid.time_patches, max_windows)),
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


def _window_batches(patches: Tensor, window: int, limit: int) -> Iterator[WindowBatch]:
    """Cut so many time patches [B, K] into windows, and those into batches of at most `limit`.

    Whole windows stay among themselves: without padding, attention needs no mask. Of the others, a
    batch holds none shorter than half its longest.
    """
    shifts, patches = patches.shape[1], patches.flatten()
    windows = -(-patches // window)
    row = torch.repeat_interleave(windows)
    number = torch.arange(len(row)) - (windows.cumsum(0) - windows)[row]
    patches = (patches[row] - number * window).clamp(max=window)
    order = patches.argsort(descending=True, stable=True)
    row, number, patches = row[order], number[order], patches[order]
    clip, shift = row // shifts, row % shifts
    start = 0
    while start < len(row):
        longest = patches[start]
        shortest = longest if longest == window else longest / 2
        stop = min(int((patches >= shortest).sum()), start + limit)
        batch = slice(start, stop)
        yield WindowBatch(clip[batch], shift[batch], number[batch], patches[batch])
        start = stop


def _reflect_ends(wav: Tensor, samples: Tensor, lead: int, width: int, margin: int) -> Tensor:
    """Continue each clip [B, :samples] by margin reflected samples at its two ends.

    A clip shorter than that goes on being reflected, back and forth. Returns
    [B, lead + margin + width + margin], width at least that of the batch; the clip begins at
    lead + margin.
    """
    samples = samples.to(wav.device)[:, None]
    beyond = torch.arange(margin, device=wav.device).expand(len(wav), -1)
    place = torch.cat([beyond - margin, beyond + samples], 1)
    period = (2 * (samples - 1)).clamp(min=1)
    phase = place.remainder(period)
    reflected = wav.gather(1, torch.minimum(phase, period - phase))
    padded = nn.functional.pad(wav, (lead + margin, width + margin - wav.shape[1]))
    return padded.scatter_(1, place + lead + margin, reflected)
