"""An AudioJEPA that is trained on: SpecAugment and patch dropping between log-mel and encoder."""

from collections.abc import Iterator

from torch import Tensor

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import HOP_LENGTH
from speechbrain_jepa.finetuning.augment import PatchDrop, SpecAugment
from speechbrain_jepa.vit import Encoder
from speechbrain_jepa.windows import WindowBatch, Windows, lead_frames


class FinetunedJEPA(AudioJEPA):
    """`AudioJEPA` whose input is augmented in training mode; in eval mode it is one.

    Arguments
    ---------
    source
        As in `AudioJEPA`.
    freeze : bool
        Default False, unlike there: the encoder is trained.
    untrained : bool
        Take the shape and the normalisation of `source`, and new weights: from scratch, to
        compare with. Default False.
    spec_augment : SpecAugment or None
    patch_drop : PatchDrop or None
        The output of dropped patches is zeros.
    **options
        As in `AudioJEPA`.

    Example
    -------
    >>> import torch
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import PatchGrid
    >>> parts = Encoder(PatchGrid(), dim=48, depth=1, num_heads=3), Normalization(-7.06, 4.19)
    >>> model = FinetunedJEPA(parts, patch_drop=PatchDrop(0.5, whole_steps=True))
    >>> out = model(torch.randn(2, 33_280))  # 13 steps, of which 6 stay
    >>> out.shape, out.ne(0).any(-1).sum(1)
    (torch.Size([2, 13, 240]), tensor([6, 6]))
    """

    def __init__(
        self,
        source=None,
        save_path=None,
        *,
        freeze=False,
        untrained=False,
        spec_augment: SpecAugment | None = None,
        patch_drop: PatchDrop | None = None,
        **options,
    ):
        super().__init__(source, save_path, freeze=freeze, **options)
        if untrained:
            fresh = Encoder(self.encoder.grid, **self.encoder.config)
            self.encoder.load_state_dict(fresh.state_dict())
        self.spec_augment = spec_augment if spec_augment and spec_augment.masks_anything else None
        self.patch_drop = patch_drop if patch_drop and patch_drop.share else None

    def _spectrograms(self, clips: Windows) -> Iterator[tuple[WindowBatch, Tensor]]:
        pairs = super()._spectrograms(clips)
        if not self.training or self.spec_augment is None:
            yield from pairs
            return
        frames = -(-clips.samples // HOP_LENGTH)
        masks = self.spec_augment.draw(frames, clips.padded.device, clips.grid.bands)
        step = clips.grid.patch_time // clips.shifts
        lead = lead_frames(clips.grid, clips.shifts)
        for windows, spectrogram in pairs:
            first_step = windows.number * (clips.grid.frames // step) + windows.shift
            yield windows, masks(spectrogram, windows.clip, first_step * step - lead)

    def _encode(self, windows: WindowBatch, spectrogram: Tensor, valid, all_layers: bool) -> Tensor:
        if not self.training or self.patch_drop is None:
            return super()._encode(windows, spectrogram, valid, all_layers)
        index, drawn = self.patch_drop.draw(self.encoder.grid, windows.patches)
        index = index.to(spectrogram.device)
        kept = None if drawn.all() else drawn.to(spectrogram.device)
        tokens = self.encoder(spectrogram, index=index, valid=kept, all_layers=all_layers)
        patches = self.encoder.grid.frequency_patches * windows.longest
        out = tokens.new_zeros(*tokens.shape[:-2], patches, tokens.shape[-1])
        if kept is not None:  # padding has number 0 as a real patch may: it adds nothing there
            tokens = tokens * kept[..., None]
        return out.scatter_add(-2, index[..., None].expand_as(tokens), tokens)
