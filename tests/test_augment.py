"""Background and gain: what is mixed with what, how loud, and that nothing is by default."""

import pytest
import torch

from speechbrain_jepa.augment import Augment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(count=8, samples=4_000):
    loudness = torch.logspace(-3, 0, count)[:, None]
    return loudness * torch.randn(count, samples, generator=seeded(1))


def test_the_background_is_one_other_clip_at_a_share_of_the_own_rms():
    wav = clips()
    shares, others = [], set()
    for seed in range(50):
        added = Augment(background=0.3)(wav, seeded(seed)) - wav
        # least squares on all clips: only one of them is in it, and never the clip itself
        weights = torch.linalg.lstsq(wav.double().T, added.double().T).solution.T
        rms = wav.double().square().mean(1).sqrt()
        ratio = weights * rms / rms[:, None]
        assert (ratio.abs() > 1e-3).sum(1).max() <= 1
        assert ratio.diagonal().abs().max() < 1e-3
        shares += ratio.amax(1).tolist()
        others |= {(row, int(column)) for row, column in enumerate(ratio.argmax(1))}
    shares = torch.tensor(shares)
    assert -1e-3 < shares.min() < 0.02 and 0.28 < shares.max() < 0.301
    assert abs(shares.mean() - 0.15) < 0.03
    assert len(others) > 40  # of 56 pairs


def test_a_gain_is_uniform_in_decibels_and_one_a_clip():
    wav = clips(2_000, 16)
    out = Augment(gain_db=6)(wav, seeded())
    ratio = out / wav
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 16))
    decibels = 20 * ratio[:, 0].log10()
    assert decibels.abs().max() <= 6.001
    assert abs(decibels.mean()) < 0.3 and abs(decibels.std() - 12 / 12**0.5) < 0.2


def test_silence_stays_silent_and_a_single_clip_has_no_background():
    wav = clips()
    wav[3] = 0
    out = Augment(background=0.5, gain_db=6)(wav, seeded())
    assert not out[3].any() and out.isfinite().all()
    assert torch.equal(Augment(background=0.5)(wav[:1], seeded()), wav[:1])


def test_nothing_asked_for_is_nothing_done():
    wav = clips()
    for augment in (Augment(), Augment(0.0, 0.0)):
        assert augment(wav) is wav


@pytest.mark.parametrize("options", [{"background": -0.1}, {"gain_db": float("inf")}], ids=str)
def test_what_cannot_be_is_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augment(**options)
