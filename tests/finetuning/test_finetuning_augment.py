"""Mixup, SpecAugment and patch dropping against their definitions, written out clip by clip."""

import numpy as np
import pytest
import torch
import torchaudio

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.finetuning.augment import Mixup, PatchDrop, SpecAugment
from speechbrain_jepa.finetuning.encoder import FinetunedJEPA
from speechbrain_jepa.vit import PatchGrid


@pytest.mark.parametrize("per_clip", [True, False])
def test_mixup_mixes_waveforms_and_targets_by_the_same_share(per_clip):
    torch.manual_seed(0)
    wav, targets, wav_lens = torch.eye(8), torch.eye(8), torch.linspace(0.3, 1, 8)
    mixed, longer, soft = Mixup(0.8, per_clip=per_clip)(wav, wav_lens, targets)
    torch.testing.assert_close(mixed, soft)  # what is in the wave is in the targets
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    own = soft.diagonal()
    assert (len(own[own < 1].unique()) > 1) == per_clip
    for row in range(8):
        partners = soft[row].nonzero()[:, 0]
        assert longer[row] == wav_lens[partners].max().maximum(wav_lens[row])


def test_mixup_draws_from_the_beta_distribution():
    torch.manual_seed(0)
    targets = torch.eye(2).repeat(3000, 1)[torch.randperm(6000)]
    shares = Mixup(0.3)(torch.zeros(6000, 1), torch.ones(6000), torch.arange(6000.0)[:, None])[2]
    assert len(targets) == len(shares)
    # of x_i = i: own * i + (1 - own) * j; its mean square around the mean of uniform ranks
    own_square = (2 * 0.3 * 1.3) / (0.6 * 1.6)  # E[l^2 + (1 - l)^2] of Beta(0.3, 0.3)
    found = shares.var().item() / torch.arange(6000.0).var().item()
    assert found == pytest.approx(own_square, rel=0.05)


def test_mixup_of_probability_0_or_alpha_0_changes_nothing():
    wav, wav_lens, targets = torch.randn(4, 9), torch.rand(4), torch.eye(4)
    for mixup in (Mixup(0.3, probability=0.0), Mixup(0.0)):
        for before, after in zip((wav, wav_lens, targets), mixup(wav, wav_lens, targets)):
            assert torch.equal(before, after)


def test_spec_augment_masks_what_torchaudio_masks_on_average():
    """The share of masked bands and frames, over many draws."""
    torch.manual_seed(0)
    clips = 4000
    masks = SpecAugment(bands=30, frames=48).draw(torch.full((clips,), 100), torch.device("cpu"))
    ones = torch.ones(clips, 80, 100)
    own = masks(ones, torch.arange(clips), torch.zeros(clips, dtype=torch.long))
    theirs = ones[:, None].clone()
    theirs = torchaudio.transforms.FrequencyMasking(30, iid_masks=True)(theirs)
    theirs = torchaudio.transforms.TimeMasking(48, iid_masks=True)(theirs)[:, 0]
    for axis, size in ((1, 80), (2, 100)):
        own_share, their_share = own.amax(axis), theirs.amax(axis)
        assert own_share.mean() == pytest.approx(their_share.mean().item(), abs=0.01)
        place = torch.arange(180 - size) - (179 - size) / 2  # and where: the middle more often
        spread = [
            (place.square() * (1 - share)).sum() / (1 - share).sum()
            for share in (own_share, their_share)
        ]
        assert spread[0] == pytest.approx(spread[1].item(), rel=0.05)


def test_a_time_mask_is_one_of_the_clip_across_its_windows(parts):
    """Windows of a clip, cut from its masked log-mel."""
    model = FinetunedJEPA(parts, spec_augment=SpecAugment(bands=20, frames=90))
    wav = torch.randn(2, 16_000 * 2)
    plain = AudioJEPA(parts, freeze=False)
    torch.manual_seed(5)
    masked = {}
    for windows, spectrogram in model._spectrograms(model._cut(wav, None)):
        for clip, number, rows in zip(windows.clip, windows.number, spectrogram):
            masked[int(clip), int(number)] = rows
    torch.manual_seed(5)
    masks = SpecAugment(bands=20, frames=90).draw(torch.tensor([200, 200]), torch.device("cpu"))
    seen = 0
    for windows, spectrogram in plain._spectrograms(plain._cut(wav, None)):
        for clip, number, rows in zip(windows.clip, windows.number, spectrogram):
            expected = rows.clone()
            for first, end in masks.bands[clip].tolist():
                expected[first:end] = 0
            for first, end in masks.frames[clip].tolist():
                for frame in range(first, end):
                    if 0 <= frame - 64 * int(number) < rows.shape[1]:
                        expected[:, frame - 64 * int(number)] = 0
                        seen += int(number) > 0
            assert torch.equal(masked[int(clip), int(number)], expected)
    assert seen  # a mask lay in a window behind the first


@pytest.mark.parametrize("whole_steps", [False, True])
def test_dropped_patches_are_as_if_they_were_not_there(parts, whole_steps):
    """Each window's kept patches through the encoder alone, at their places; zeros elsewhere."""
    drop = PatchDrop(0.5, whole_steps)
    model = FinetunedJEPA(parts, patch_drop=drop)
    wav, wav_lens = torch.randn(3, 9_600), torch.tensor([1.0, 0.7, 0.4])  # 4, 3 and 2 steps
    torch.manual_seed(1)
    out = model(wav, wav_lens)
    assert out.requires_grad
    torch.manual_seed(1)
    seen = 0
    for windows, spectrogram in model._spectrograms(model._cut(wav, wav_lens)):
        index, valid = drop.draw(model.encoder.grid, windows.patches)
        for row, clip in enumerate(windows.clip.tolist()):
            kept = index[row][valid[row]]
            steps = int(windows.patches[row])
            assert len(kept) == (round(0.5 * steps) * 5 if whole_steps else round(0.5 * 5 * steps))
            assert (kept % windows.longest < steps).all() and len(kept.unique()) == len(kept)
            alone = model.encoder(spectrogram[row : row + 1], index=kept[None])[0]
            expected = torch.zeros(5 * windows.longest, 24)
            expected[kept] = alone
            found = out[clip].unflatten(-1, (5, 24)).transpose(0, 1)[:, : windows.longest]
            torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == 3


def test_patches_drop_evenly():
    torch.manual_seed(0)
    index, valid = PatchDrop(0.4).draw(PatchGrid(frames=64), torch.full((4000,), 4))
    assert valid.all()
    counts = np.bincount(index.flatten(), minlength=20) / 4000
    assert counts == pytest.approx(0.6, abs=0.04)


def test_in_eval_mode_nothing_is_augmented(parts):
    options = dict(spec_augment=SpecAugment(40, 40), patch_drop=PatchDrop(0.5))
    model = FinetunedJEPA(parts, **options).eval()
    wav = torch.randn(2, 16_000)
    assert torch.equal(model(wav), AudioJEPA(parts)(wav))
    assert not torch.equal(model.train()(wav), AudioJEPA(parts)(wav))


def test_what_cannot_be_is_refused():
    for wrong in (
        lambda: Mixup(-1),
        lambda: Mixup(1, 2),
        lambda: PatchDrop(1.0),
        lambda: SpecAugment(-1),
    ):
        with pytest.raises(ValueError, match="must"):
            wrong()
