"""The grid of patches on a spectrogram, and the positions of its patches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speechbrain_jepa.features import N_MELS


@dataclass(frozen=True)
class PatchGrid:
    """How a spectrogram is cut into patches, numbered row by row (index = f * T + t).

    Arguments
    ---------
    frames : int
        Length of a training crop. Default 208 (2.1 s); the paper's others are 320 and 640.
    patch_frequency, patch_time : int
        Mel bands and frames of a patch. Default 16 x 16. 16 x 4 and 80 x 2 give finer time.
    bands : int
        Mel bands of the spectrogram. Default 80.

    Raises
    ------
    ValueError
        If patches do not tile the spectrogram.

    Example
    -------
    >>> grid = PatchGrid(frames=208)
    >>> grid.frequency_patches, grid.time_patches, grid.num_patches
    (5, 13, 65)
    """

    frames: int = 208
    patch_frequency: int = 16
    patch_time: int = 16
    bands: int = N_MELS

    def __post_init__(self):
        for name, size, patch_name, patch in (
            ("bands", self.bands, "patch_frequency", self.patch_frequency),
            ("crop_frames", self.frames, "patch_time", self.patch_time),
        ):
            if patch < 1 or size < patch or size % patch:
                below = max(size // patch, 1) * patch if patch >= 1 else size
                raise ValueError(
                    f"{name}={size} is not a multiple of {patch_name}={patch}: "
                    f"use {below} or {below + max(patch, 1)}"
                )

    @property
    def frequency_patches(self) -> int:
        return self.bands // self.patch_frequency

    @property
    def time_patches(self) -> int:
        return self.frames // self.patch_time

    @property
    def num_patches(self) -> int:
        return self.frequency_patches * self.time_patches

    @property
    def patch_values(self) -> int:
        return self.patch_frequency * self.patch_time

    def patches(self, spectrogram: Tensor) -> Tensor:
        """[B, bands, frames] to [B, N, patch_values], of any whole number of patches in time."""
        rows = spectrogram.unflatten(1, (-1, self.patch_frequency))
        tiles = rows.unflatten(3, (-1, self.patch_time))  # [B, F, bands, T, frames]
        return tiles.transpose(2, 3).flatten(3).flatten(1, 2)


def sincos_positions(frequency_patches: int, time_patches: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [F * T, dim]: first half for time, second for frequency.

    Each half holds sin(p w) and cos(p w) of the patch's coordinate p for the dim / 4 frequencies
    w = 10000 ** (-i / (dim / 4)), as in MAE and I-JEPA.

    Example
    -------
    >>> sincos_positions(5, 13, 768).shape
    torch.Size([65, 768])
    """
    if dim % 4:
        raise ValueError(f"dim={dim}: 2-D sine-cosine positions need a multiple of 4")
    quarter = dim // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length):
        angle = torch.arange(length, dtype=torch.float64)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    by_frequency = axis(frequency_patches)[:, None].expand(-1, time_patches, -1)
    by_time = axis(time_patches)[None].expand(frequency_patches, -1, -1)
    return torch.cat([by_time, by_frequency], -1).flatten(0, 1).float()


def first_columns(positions: Tensor, grid: PatchGrid, time_patches: int | None) -> Tensor:
    """Positions [F * T', D] of a spectrogram of the first T' of the grid's T time patches."""
    if time_patches is None or time_patches == grid.time_patches:
        return positions
    by_time = positions.unflatten(0, (grid.frequency_patches, grid.time_patches))
    return by_time[:, :time_patches].flatten(0, 1)
