"""What may be done to the waveforms of a batch before their log-mel: both off in the paper."""

import torch
from torch import Tensor

SILENCE = 1e-8  # RMS: what is quieter is not made louder


class Augment:
    """Another clip of the batch in the background, and a random gain.

    A clip's background is another clip of the same batch, at a share of the clip's own RMS that is
    uniform from 0 to `background`. The mixture is then multiplied by a gain uniform in decibels.
    Every clip draws its own. (BYOL-A, https://arxiv.org/abs/2103.06695, mixes log-mels likewise.)

    Arguments
    ---------
    background : float or None
        Largest share. Default None: no background.
    gain_db : float or None
        Largest gain, up and down. Default None: none.

    Raises
    ------
    ValueError
        If one is negative or not finite.

    Example
    -------
    >>> wav = torch.randn(4, 16_000)
    >>> Augment(background=0.3, gain_db=6)(wav).shape
    torch.Size([4, 16000])
    >>> Augment()(wav) is wav
    True
    """

    def __init__(self, background: float | None = None, gain_db: float | None = None):
        for name, value in (("background", background), ("gain_db", gain_db)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: must be at least 0, or null for none")
        self.background, self.gain_db = background, gain_db

    def __call__(self, wav: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """
        Arguments
        ---------
        wav : Tensor [B, samples]
        generator : torch.Generator or None
            On its device.

        Returns
        -------
        Tensor [B, samples]
            `wav` itself where nothing is asked for.
        """
        clips = len(wav)
        if self.background and clips > 1:
            rms = wav.square().mean(1, keepdim=True).sqrt()
            # the same distance to the other clip for all: each is once in the background
            distance = torch.randint(1, clips, (1,), device=wav.device, generator=generator)
            other = (torch.arange(clips, device=wav.device) + distance) % clips
            share = self.background * self._uniform(wav, generator)
            wav = wav + share * rms * wav[other] / rms[other].clamp(min=SILENCE)
        if self.gain_db:
            decibels = self.gain_db * (2 * self._uniform(wav, generator) - 1)
            wav = wav * 10 ** (decibels / 20)
        return wav

    def _uniform(self, wav: Tensor, generator) -> Tensor:
        return torch.rand(len(wav), 1, device=wav.device, generator=generator)
