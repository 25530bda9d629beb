import csv
import itertools

import pytest
import torch
import yaml

from speechbrain_jepa.monitors import (
    CollapseAlarm,
    Interval,
    MetricsTable,
    PatchStatistics,
    effective_rank,
)


def test_effective_rank_of_equal_directions_is_their_number():
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    for rank in (1, 5, 20):
        rows = torch.zeros(200, 32)
        for number in range(200):
            rows[number] = basis[number % rank]
        assert effective_rank(rows) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 17)
    values = torch.linalg.svdvals(rows.double())  # another algorithm than the Gram matrix's
    shares = values / values.sum()
    expected = torch.exp(-(shares * shares.log()).sum())
    assert effective_rank(rows) == pytest.approx(expected.item(), rel=1e-4)


def test_patch_statistics_equal_those_of_each_patch_alone():
    generator = torch.Generator().manual_seed(2)
    statistics = PatchStatistics(num_patches=6, dim=8)
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
    statistics = PatchStatistics(num_patches=10, dim=8)
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


def test_alarm_knows_what_started_too_low_to_fall():
    """A rank is at least 1 and a deviation at least 0: a tenth of 10 and of 0 is no fall."""
    alarm = CollapseAlarm(share=0.1)
    alarm.check({"embedding_rank": 10.0, "embedding_deviation": 0.0, "target_deviation": 1e-3})
    assert alarm.blind() == ["embedding_rank started at 10", "embedding_deviation started at 0"]
    assert alarm.check({"embedding_rank": 1.0, "embedding_deviation": 0.0}) == []
    alarm = CollapseAlarm(share=0.1)
    alarm.check({"embedding_rank": 10.1, "embedding_deviation": 1e-3})
    assert alarm.blind() == []


def test_a_table_that_cannot_be_rewritten_stays_as_it_was(tmp_path, monkeypatch):
    table = MetricsTable(tmp_path / "metrics.csv", ["step", "loss"])
    for step in (1, 2, 3):
        table.append(step=step, loss=0.5)
    before = table.path.read_text()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", dies)
    with pytest.raises(KeyboardInterrupt):
        table.drop_after(2)
    assert table.path.read_text() == before
    assert list(tmp_path.iterdir()) == [table.path]


def test_a_row_that_a_full_disk_cut_off_is_dropped(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", ["step", "loss", "rank"])
    table.append(step=11, loss=0.5, rank=3)
    with open(table.path, "a") as file:
        file.write("1")  # of a row 12
    table.drop_after(11)
    table.append(step=12, loss=0.25, rank=4)
    assert [list(row.values()) for row in table.read()] == [["11", "0.5", "3"], ["12", "0.25", "4"]]


def test_a_run_without_the_online_probe_keeps_the_column_it_had(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsTable(path, ["step", "accuracy"]).append(step=1, accuracy=90)
    table = MetricsTable(path, ["step"])
    table.drop_after(1)
    table.append(step=2)
    assert table.read() == [{"step": "1", "accuracy": "90"}, {"step": "2", "accuracy": ""}]


def test_an_interval_taken_up_again_averages_all_its_batches(monkeypatch):
    """With a clock that ticks once a look."""
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    interval, resumed = Interval(), Interval()
    for loss in (0.1, 0.2, float("nan")):
        interval.batch_arrived()
        interval.add(4, loss=torch.tensor(loss))
        interval.batch_done()
    interval.stepped(torch.tensor(1.5), ema_rate=0.9)
    assert interval.look() == [1.5] and interval.look() == []
    state = interval.state()
    for _ in range(1000):
        next(clock)  # the time between the kill and the next start
    resumed.load(yaml.safe_load(yaml.safe_dump(state)))  # as a checkpoint keeps it
    before = interval.clips, interval.losses
    assert (resumed.clips, resumed.losses) == before
    assert resumed.clips == 12 and resumed.losses["loss"] == pytest.approx(0.3)
    for one in (interval, resumed):
        one.add(4, loss=torch.tensor(0.7))
        one.batch_done()
        one.stepped(torch.tensor(2.5), ema_rate=0.99)
        one.look()
    ours, theirs = resumed.close(2), interval.close(2)
    assert ours["loss"] == theirs["loss"] == pytest.approx((0.1 + 0.2 + 0.7) / 3)
    assert (ours["ema_rate"], ours["gradient_norm"]) == (0.99, 2.5)
    assert ours["clips_per_second"] > 1 > 10 * theirs["clips_per_second"]
