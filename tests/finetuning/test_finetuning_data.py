"""Labelled batches: right targets, crops that follow from their place, balanced sampling."""

from collections import Counter

import numpy as np
import pytest
import torch

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.finetuning.data import (
    BalancedSampler,
    ClipTargets,
    LabelledDataset,
    balanced_weights,
    make_loader,
)


def test_batches_hold_the_clips_with_their_targets(tones):
    files, targets = tones
    loader = make_loader(LabelledDataset(files, ClipTargets(targets)), batch_size=5)
    rows = []
    for batch in loader:
        lengths = (batch.wav_lens * batch.wav.shape[1]).round().long().tolist()
        for row, wav, length, target in zip(batch.rows, batch.wav, lengths, batch.targets):
            rows.append(row)
            assert torch.equal(wav[:length], read_audio(files[row]))
            assert not wav[length:].any()
            assert target == targets[row]
    assert rows == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_follow_from_seed_epoch_and_clip_alone(tones, workers):
    files, targets = tones

    def batches(seed, epoch, done=0, keep=False):
        dataset = LabelledDataset(files, ClipTargets(targets), 0.2, seed, keep_in_memory=keep)
        loader = make_loader(dataset, 4, seed, shuffle=True, num_workers=workers)
        loader.batch_sampler.set_epoch(epoch, done)
        return [batch.wav for batch in loader]

    first = batches(1, 3, keep=True)
    assert all(wav.shape == (4, 3_200) for wav in first)
    for again in (batches(1, 3), [*first[:2], *batches(1, 3, done=2)]):
        assert all(map(torch.equal, first, again))
    for other in (batches(1, 4), batches(2, 3)):
        assert not any(map(torch.equal, first, other))


def test_targets_are_told_where_the_crop_is(tones):
    files, _ = tones
    told = {}

    def target(row, start, stop):
        told[row] = start, stop
        return torch.zeros(())

    batch = LabelledDataset(files, target, 0.2, seed=3).__getitems__([(1, row) for row in range(8)])
    for row, wav in zip(batch.rows, batch.wav):
        start, stop = told[row]
        whole = read_audio(files[row])
        assert torch.equal(wav, whole[round(start * 16_000) : round(stop * 16_000)])
    assert len(set(told.values())) > 4


def test_files_that_cannot_be_read_are_left_out_and_told(tones, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    dataset = LabelledDataset([str(bad), tones[0][0]], ClipTargets(torch.tensor([7, 8])))
    batch = dataset.__getitems__([(0, 0), (0, 1)])
    assert batch.targets.tolist() == [8] and batch.rows == [1]
    assert [file for file, _ in batch.failures] == [str(bad)]
    with pytest.raises(UnreadableAudio, match=r"bad\.wav"):
        dataset.__getitems__([(0, 0)])


def test_balanced_sampling_brings_every_label_as_often(tones):
    targets = torch.tensor([0] * 90 + [1] * 9 + [2])
    sampler = BalancedSampler(balanced_weights(targets), batch_size=10, passes=30)
    drawn = Counter(int(targets[item]) for batch in sampler for _, item in batch)
    assert sum(drawn.values()) == 3000
    for label in range(3):
        assert drawn[label] == pytest.approx(1000, abs=100)


def test_balanced_weights_of_any_number_of_labels_are_sums():
    targets = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]])
    assert balanced_weights(targets) == pytest.approx([1 / 3, 1 / 3, 1 / 3 + 1, 1 / 3])
    with pytest.raises(ValueError, match="no clip has a label"):
        balanced_weights(torch.zeros(3, 2))


def test_balanced_processes_share_one_order_and_no_draw_is_twice():
    weights, options = np.ones(12), dict(batch_size=2, seed=4, passes=2)
    whole = BalancedSampler(weights, 4, seed=4, passes=2)
    whole.set_epoch(5)
    parts = [BalancedSampler(weights, **options, rank=rank, world_size=2) for rank in (0, 1)]
    for part in parts:
        part.set_epoch(5)
    pairs = [key for batch in whole for key in batch]
    shared = [sorted(first + second) for first, second in zip(*parts)]
    assert shared == [sorted(batch) for batch in whole]
    assert len({draw for draw, _ in pairs}) == len(pairs) == 24
    whole.set_epoch(5, batches_done=4)
    assert [key for batch in whole for key in batch] == pairs[16:]
