"""What makes a few labelled clips more: mixup, SpecAugment, patch dropping.

All draw from torch's global generator, which the training loop seeds for each batch.
Shapes: B clips, W windows of them, F frequency and T time patches, N = F * T.
"""

import torch
from torch import Tensor

from speechbrain_jepa.vit import PatchGrid


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: must be at least 0 and below 1")


class Mixup:
    """Each waveform of a batch is mixed with another one's, and so are their targets.

    lambda * x_i + (1 - lambda) * x_j with lambda from Beta(alpha, alpha), j from a permutation of
    the batch (Zhang et al., "mixup", ICLR 2018).

    Arguments
    ---------
    alpha : float
        0: no mixup.
    probability : float
        That a batch is mixed at all. Default 1.
    per_clip : bool
        Every clip has a lambda of its own, as in M2D's fine-tuning. Default True; False: one for
        the batch, as in EAT's.

    Example
    -------
    >>> wav, wav_lens, targets = torch.randn(4, 800), torch.ones(4), torch.eye(4)
    >>> wav, wav_lens, targets = Mixup(alpha=0.3)(wav, wav_lens, targets)
    >>> targets.sum(1)
    tensor([1., 1., 1., 1.])
    """

    def __init__(self, alpha: float, probability: float = 1.0, per_clip: bool = True):
        if alpha < 0:
            raise ValueError(f"mixup alpha={alpha}: must be at least 0, which is no mixup")
        if not 0 <= probability <= 1:
            raise ValueError(f"mixup probability={probability}: must lie in [0, 1]")
        self.alpha = alpha
        self.probability = probability
        self.per_clip = per_clip

    def __call__(
        self, wav: Tensor, wav_lens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Arguments
        ---------
        wav : Tensor [B, samples]
        wav_lens : Tensor [B]
            A mixture is as long as the longer of the two.
        targets : Tensor [B, ...], floating

        Returns
        -------
        wav, wav_lens, targets
        """
        clips = len(wav)
        if not self.alpha or torch.rand(()) >= self.probability:
            return wav, wav_lens, targets
        beta = torch.distributions.Beta(self.alpha, self.alpha)
        share = beta.sample((clips if self.per_clip else 1,)).to(wav).expand(clips)
        other = torch.randperm(clips)

        def mix(values: Tensor) -> Tensor:
            own = share.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
            return own * values + (1 - own) * values[other.to(values.device)]

        longer = torch.maximum(wav_lens, wav_lens[other.to(wav_lens.device)])
        return mix(wav), longer, mix(targets)


class SpecAugment:
    """Bands and stretches of a clip's normalised log-mel are set to 0, its mean.

    Park et al., "SpecAugment", 2019, without time warping. A width is drawn from 0 to the limit,
    then a place, for every clip on its own. A stretch is one of the clip, whatever windows it is
    cut into.

    Arguments
    ---------
    bands : int
        Limit of a frequency mask's width, of 80. Default 0: none.
    frames : int
        Limit of a time mask's width. Default 0: none.
    frequency_masks, time_masks : int
        How many of each. Default 1.

    Example
    -------
    >>> masks = SpecAugment(bands=30, frames=48).draw(torch.tensor([100, 500]), torch.device("cpu"))
    >>> clip, first_frame = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 208])
    >>> masks(torch.randn(3, 80, 208), clip, first_frame).shape
    torch.Size([3, 80, 208])
    """

    def __init__(
        self, bands: int = 0, frames: int = 0, frequency_masks: int = 1, time_masks: int = 1
    ):
        for name, value in (
            ("bands", bands),
            ("frames", frames),
            ("frequency_masks", frequency_masks),
            ("time_masks", time_masks),
        ):
            if value < 0:
                raise ValueError(f"SpecAugment {name}={value}: must be at least 0")
        self.bands = bands
        self.frames = frames
        self.frequency_masks = frequency_masks
        self.time_masks = time_masks

    @property
    def masks_anything(self) -> bool:
        """False where both limits are 0."""
        return bool(self.bands * self.frequency_masks or self.frames * self.time_masks)

    def draw(self, clip_frames: Tensor, device: torch.device, num_bands: int = 80) -> "Masks":
        """Masks for clips of so many frames, [B], int64 on the CPU, and bands."""
        sizes = torch.full_like(clip_frames, num_bands)
        return Masks(
            bands=_intervals(sizes, self.bands, self.frequency_masks).to(device),
            frames=_intervals(clip_frames, self.frames, self.time_masks).to(device),
        )


class Masks:
    """Drawn masks: `bands` and `frames` are [B, masks, 2], the first one and the one behind."""

    def __init__(self, bands: Tensor, frames: Tensor):
        self.bands = bands
        self.frames = frames

    def __call__(self, spectrogram: Tensor, clip: Tensor, first_frame: Tensor) -> Tensor:
        """Mask windows [W, bands, frames] of the clips [W], which begin at a frame of them [W]."""
        device = spectrogram.device
        clip = clip.to(device)
        band = torch.arange(spectrogram.shape[1], device=device).expand(len(clip), -1)
        frame = torch.arange(spectrogram.shape[2], device=device) + first_frame.to(device)[:, None]
        in_bands = _inside(band, self.bands[clip])[:, :, None]
        return spectrogram.masked_fill(in_bands | _inside(frame, self.frames[clip])[:, None], 0.0)


def _intervals(sizes: Tensor, limit: int, count: int) -> Tensor:
    """[B, count, 2]: a width below `limit` and `sizes`, and a place where it fits."""
    sizes = sizes[:, None].expand(-1, count)
    width = torch.rand(sizes.shape) * torch.clamp(sizes, max=limit)
    start = torch.rand(sizes.shape) * (sizes - width)
    first = start.long()
    return torch.stack([first, first + width.long()], -1)


def _inside(place: Tensor, intervals: Tensor) -> Tensor:
    """Whether each place [W, n] lies in one of the intervals [W, masks, 2]."""
    place = place[:, None]
    return ((place >= intervals[..., :1]) & (place < intervals[..., 1:])).any(1)


class PatchDrop:
    """Some patches of each window do not go through the encoder: faster, and harder to overfit.

    Koutini et al., "Efficient training of audio transformers with Patchout", 2022; M2D's
    fine-tuning drops half.

    Arguments
    ---------
    share : float
        Of a window's patches, from 0 to below 1. At least one stays.
    whole_steps : bool
        Drop all frequency patches of some time steps (structured patchout). Default False: any
        patches, which leaves nearly every step some. Attention pooling and event detection need
        True.

    Example
    -------
    >>> index, valid = PatchDrop(share=0.6).draw(PatchGrid(frames=208), torch.tensor([13, 7]))
    >>> index.shape, valid.sum(1)  # 0.4 * 65 and 0.4 * 35
    (torch.Size([2, 26]), tensor([26, 14]))
    """

    def __init__(self, share: float, whole_steps: bool = False):
        _check_share("patch_drop", share)
        self.share = share
        self.whole_steps = whole_steps

    def draw(self, grid: PatchGrid, time_patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches that stay.

        Arguments
        ---------
        grid : PatchGrid
        time_patches : Tensor [W], int64
            Of each window, on the CPU; T is the most of them.

        Returns
        -------
        index : Tensor [W, K], int64
            Numbers (f * T + t), ascending where valid.
        valid : Tensor [W, K], bool
        """
        rows, longest = len(time_patches), int(time_patches.max())
        frequency = 1 if self.whole_steps else grid.frequency_patches
        there = torch.arange(longest) < time_patches[:, None]
        there = there.repeat(1, frequency)
        order = torch.rand(rows, frequency * longest).masked_fill(~there, 2.0).argsort(1)
        kept = ((1 - self.share) * there.sum(1)).round().long().clamp(min=1)
        valid = torch.arange(int(kept.max())) < kept[:, None]
        unused = frequency * longest  # sorts behind all patches
        index = order[:, : valid.shape[1]].masked_fill(~valid, unused).sort(1).values
        index = index.masked_fill(~valid, 0)
        if self.whole_steps:
            offset = torch.arange(grid.frequency_patches)[:, None] * longest
            index = (index[:, None] + offset).flatten(1)
            valid = valid.repeat(1, grid.frequency_patches)
        return index, valid
