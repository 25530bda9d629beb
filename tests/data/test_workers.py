"""How many loader processes: chosen at the start, and judged by what is measured."""

import os
import re
import time

import pytest
import torch

from speechbrain_jepa.data import CropBatch, CropDataset, CropSampler, Manifest, crop_loader
from speechbrain_jepa.data import workers as workers_module
from speechbrain_jepa.data.workers import LoaderAdvice, available_cpus, choose_workers


def test_auto_is_the_cpus_of_this_process_less_one(monkeypatch):
    monkeypatch.setattr(workers_module, "available_cpus", lambda: 96)
    for processes, expected in (("8", 11), ("1", 32), ("200", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert choose_workers("auto", on_gpu=True) == expected
    assert choose_workers("auto", on_gpu=False) == 2
    assert [choose_workers(number, on_gpu=True) for number in (0, 7)] == [0, 7]
    for wrong in ("many", -1, None, 1.5, True):
        with pytest.raises(ValueError, match=f"num_workers={wrong}: give a number from 0 on, or"):
            choose_workers(wrong, on_gpu=True)


def test_cpus_are_those_that_this_process_may_use():
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(affinity)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, affinity)
    assert available_cpus() <= len(affinity)


def measured(num_workers, reading, stepped, cpus=64):
    """The sentence on a loader whose workers share the work evenly, after a slow start."""
    advice = LoaderAdvice(num_workers, batches=40)
    waited = max(reading / num_workers - stepped, 0.0)
    for number in range(40):
        slow = 30.0 if number < 5 else 0.0
        assert advice.add(reading + slow, waited + slow, stepped + slow) == (number == 39)
    return advice.sentence(cpus)


@pytest.mark.parametrize("num_workers", [1, 5, 13])
def test_the_number_does_not_depend_on_how_many_were_measured(num_workers):
    said = measured(num_workers, reading=1.39, stepped=0.1)
    share = 1 - 0.1 / (1.39 / num_workers)
    assert said == (
        f"data wait {100 * share:.0f} %: 14 loader processes would feed this device "
        f"(num_workers={num_workers})"
    )


def test_enough_is_said_to_be_enough_and_what_helps_where_cpus_do_not_reach():
    assert measured(14, 1.39, 0.1) == "data wait 0 %: 14 loader processes feed this device"
    said = measured(5, 1.39, 0.1, cpus=8)
    assert "14 loader processes would feed" in said and "this process has 8 CPUs" in said
    assert "crops_per_file" in said and "speechbrain_jepa.prepare" in said


class Slow(CropDataset):
    """0.1 s a batch."""

    def __getitems__(self, keys):
        time.sleep(0.1)
        return CropBatch(torch.zeros(len(keys), 4), torch.zeros(len(keys)), seconds=0.1)


def test_a_loader_says_once_how_many_workers_keep_up(caplog):
    manifest = Manifest.from_rows([("a.wav", 0, 16_000, 16_000, 16_000, 1, 1)] * 12)
    sampler = CropSampler(12, batch_size=1)
    loader = crop_loader(Slow(manifest), sampler, num_workers=1, advise_after=1)
    with caplog.at_level("INFO"):
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for _ in loader:
                time.sleep(0.025)
    (said,) = [record.getMessage() for record in caplog.records]
    share, wanted = re.match(r"data wait (\d+) %: (\d) loader processes would feed", said).groups()
    assert 50 <= int(share) <= 80 and 2 <= int(wanted) <= 4  # 75 % and 4 on an idle machine


def test_a_batch_knows_how_long_it_took_to_read(audio_folder):
    path = str(next(audio_folder.glob("*.flac")))
    manifest = Manifest.from_rows([(path, 0, 48_000, 16_000, 48_000, 1, 1)] * 8)
    dataset = CropDataset(manifest, crop_frames=64, crops_per_file=4)
    began = time.perf_counter()
    batch = dataset.__getitems__([(0, item) for item in range(8)])
    assert 0 < batch.seconds <= time.perf_counter() - began
    parts = batch.to("cpu").split(4)
    assert sum(part.seconds for part in parts) == pytest.approx(batch.seconds)
