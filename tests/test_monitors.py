import pytest
import torch

from speechbrain_jepa.monitors import CollapseAlarm, PatchStatistics, effective_rank


def test_effective_rank_of_equal_directions_is_their_number():
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    for rank in (1, 5, 20):
        rows = torch.zeros(200, 32)
        for number in range(200):
            rows[number] = basis[number % rank]
        assert effective_rank(rows) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 17)
    # singular values from the eigenvalues of the Gram matrix, another algorithm
    values = torch.linalg.eigvalsh(rows.double().T @ rows.double()).sqrt()
    shares = values / values.sum()
    expected = torch.exp(-(shares * shares.log()).sum())
    assert effective_rank(rows) == pytest.approx(expected.item(), rel=1e-4)


def test_patch_statistics_equal_those_of_each_patch_alone():
    generator = torch.Generator().manual_seed(2)
    statistics = PatchStatistics(num_patches=6)
    seen = {}
    for _ in range(5):
        index = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(4)])
        rows = torch.randn(4, 3, 8, generator=generator) + 100 * index[..., None]
        statistics.add(rows, index)
        for patch, row in zip(index.flatten().tolist(), rows.flatten(0, 1)):
            seen.setdefault(patch, []).append(row)
    stacked = {patch: torch.stack(rows) for patch, rows in seen.items()}
    expected = torch.stack([rows.std(0, unbiased=False) for rows in stacked.values()]).mean()
    assert statistics.deviation() == pytest.approx(expected.item(), rel=1e-4)
    for patch, rows in stacked.items():
        torch.testing.assert_close(statistics.mean()[patch].float(), rows.mean(0))
    assert not statistics.mean()[5].any()  # patch 5 was never seen


def test_representations_that_only_tell_patches_apart_have_no_deviation():
    positions = torch.randn(10, 8, generator=torch.Generator().manual_seed(3))
    statistics = PatchStatistics(num_patches=10)
    statistics.add(positions.expand(32, -1, -1), torch.arange(10).expand(32, -1))
    assert positions.std(0).mean() > 0.5
    assert statistics.deviation() < 1e-6


def test_alarm_rings_under_its_share_and_for_nan():
    alarm = CollapseAlarm(share=0.1)
    assert alarm.check({"rank": 60.0, "deviation": 0.8}) == []
    assert alarm.check({"rank": 6.1, "deviation": 0.081}) == []
    assert alarm.check({"rank": 5.9, "deviation": 0.7}) == ["rank fell from 60 to 5.9"]
    assert len(alarm.check({"rank": float("nan"), "deviation": 0.0})) == 2
    with pytest.raises(ValueError, match=r"collapse_share=1\.5"):
        CollapseAlarm(share=1.5)
