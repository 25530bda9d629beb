"""What is held out for validation, and the crops it is looked at in."""

import numpy as np
import pytest
import soundfile
import torch
from scans import paths, scan, synthetic, write

from speechbrain_jepa.data import (
    CropDataset,
    Manifest,
    cut_segments,
    split_held_out,
)


def test_a_file_stays_on_its_side_when_others_come():
    few, many = synthetic(200), synthetic(1000)
    sides = []
    for manifest in (few, many):
        train, valid = split_held_out(manifest, valid_share=0.1)
        assert sorted([*train, *valid]) == list(range(len(manifest)))
        sides.append({manifest.path(item) for item in valid})
    assert 70 <= len(sides[1]) <= 130  # 0.1 of 1000, three deviations of a binomial
    assert sides[0] == sides[1] & set(paths(few))


def test_segments_of_a_file_are_never_divided():
    manifest = synthetic(100, segments=5)
    for max_valid in (1024, 12):
        train, valid = split_held_out(manifest, valid_share=0.2, max_valid=max_valid)
        assert not {manifest.path(i) for i in train} & {manifest.path(i) for i in valid}
        assert 0 < len(valid) <= max_valid


def test_both_sides_have_a_file_however_few_there_are():
    for rows in (2, 3, 5):
        for share in (0.001, 0.999):
            train, valid = split_held_out(synthetic(rows), valid_share=share)
            assert len(train) and len(valid)
    train, valid = split_held_out(synthetic(3), min_valid=10)
    assert (len(train), len(valid)) == (1, 2)
    with pytest.raises(ValueError, match="a single audio file cannot be split"):
        split_held_out(synthetic(1, segments=4))
    with pytest.raises(ValueError, match=r"valid_share=1\.5"):
        split_held_out(synthetic(3), valid_share=1.5)


def test_broken_files_are_not_held_out_when_they_can_be_looked_at(tmp_path):
    good = {"0.wav", "5.wav"}
    for number in range(8):
        path = write(tmp_path / "audio" / f"{number}.wav", subtype="FLOAT")
        if path.name not in good:
            soundfile.write(path, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    manifest, _ = scan(tmp_path / "audio")
    train, valid = split_held_out(manifest, 0.5, data_folder=tmp_path / "audio", min_valid=2)
    assert {manifest.path(item) for item in valid} <= good
    assert len(valid) and len(train) + len(valid) == 8


def flat(files, seconds, rate=16_000):
    samples = round(seconds * rate)
    return Manifest.from_rows(
        [(f"{number}.wav", 0, samples, rate, samples, 1, 1) for number in range(files)]
    )


def valid_crops(manifest, crop_frames=208, **options):
    """Held-out files and the crops they are looked at in."""
    _, valid = split_held_out(manifest, crop_frames=crop_frames, **options)
    return len(valid), cut_segments(manifest.subset(valid), crop_frames)


@pytest.mark.parametrize(
    ("files", "seconds", "held_out", "crops"),
    [
        (2, 3_600, 1, 16),  # one long file is enough
        (40, 60, 1, 16),
        (40, 10, 4, 16),  # 4 crops each
        (40, 3, 8, 8),  # a fifth at most
        (3, 1, 1, 1),
        (8_000, 3, None, None),  # 2 % are plenty, and stay what they are
    ],
)
def test_small_corpora_get_crops_to_judge_by(files, seconds, held_out, crops):
    manifest = flat(files, seconds)
    number, pieces = valid_crops(manifest)
    if crops is None:
        assert number == len(split_held_out(manifest)[1]) == len(pieces) > 100
    else:
        assert (number, len(pieces)) == (held_out, crops)


def test_max_valid_bounds_what_a_small_corpus_gives():
    assert valid_crops(flat(40, 3), max_valid=3)[0] == 3


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_pieces_cover_a_segment_without_overlap(rate):
    segment = (f"{rate}.wav", 100, 41 * rate, rate, 50 * rate, 7, 8)
    pieces = cut_segments(Manifest.from_rows([segment]), 208)
    ends = pieces.start + pieces.length
    assert len(pieces) == 16 and pieces.start[0] == 100
    assert (pieces.start[1:] == ends[:-1]).all() and 0 <= 100 + 41 * rate - ends[-1] < 16
    assert (pieces.seconds >= 2.08).all()
    assert set(pieces.total) == {50 * rate} and set(pieces.size) == {7}


def test_validation_crops_are_different_places_and_the_same_in_every_epoch(tmp_path):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(640_000) / 2**20, 16_000, subtype="FLOAT")
    rows = [(str(path), 0, 640_000, 16_000, 640_000, 1, 1)]
    pieces = cut_segments(Manifest.from_rows(rows), 64)
    dataset = CropDataset(pieces, crop_frames=64, random_crops=False)
    first, later = (dataset.__getitems__([(epoch, i) for i in range(16)]) for epoch in (0, 5))
    assert first.failures == [] and torch.equal(first.wav, later.wav)
    places = (first.wav[:, 5_000].double() * 2**20).round()
    assert (places.diff() > 64 * 160).all()


@pytest.fixture
def half_broken(tmp_path):
    """24 files of 3 s, every third of which is NaN from its first second on."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = write(tmp_path / "audio" / f"{number}.wav", 3.0, subtype="FLOAT")
        if number % 3 == 0:
            wav = rng.normal(0, 0.1, 48_000)
            wav[16_000:] = np.nan
            soundfile.write(path, wav, 16_000, subtype="FLOAT")
    return scan(tmp_path / "audio")[0], tmp_path / "audio"


@pytest.fixture
def crops_read(monkeypatch):
    """Rows of the validation set that are read to be judged."""
    rows, problem = [], CropDataset.problem
    monkeypatch.setattr(
        CropDataset, "problem", lambda self, row: (rows.append(row), problem(self, row))[1]
    )
    return rows


def held_out(manifest, folder, verdicts=None, **options):
    options = {"valid_share": 0.4, "crop_frames": 64, "seed": 5, "verdicts": verdicts, **options}
    return split_held_out(manifest, data_folder=folder, **options)[1].tolist()


def test_what_validation_draws_can_be_read(half_broken):
    manifest, folder = half_broken
    whole = split_held_out(manifest, 0.4, crop_frames=64)[1]
    valid = held_out(manifest, folder)
    pieces = cut_segments(manifest.subset(valid), 64)
    dataset = CropDataset(pieces, folder, 64, seed=5, random_crops=False)
    assert dataset.__getitems__([(9, row) for row in range(len(pieces))]).failures == []
    names = {manifest.path(item) for item in whole} - {manifest.path(item) for item in valid}
    assert names and all(int(name.split(".")[0]) % 3 == 0 for name in names)


def test_a_resume_reads_no_held_out_file_again(half_broken, crops_read, tmp_path):
    manifest, folder = half_broken
    verdicts = tmp_path / "split" / "verdicts.json"
    first = held_out(manifest, folder, verdicts)
    assert first == held_out(manifest, folder) and len(crops_read) >= 2 * len(first)
    crops_read.clear()
    assert held_out(manifest, folder, verdicts) == first
    assert crops_read == []
    # of a file that has changed, its crops alone
    changed = manifest.path(first[0])
    write(folder / changed, 3.0, subtype="FLOAT")
    again, _ = scan(folder)
    assert held_out(again, folder, verdicts) == first
    pieces = cut_segments(again.subset(first), 64)
    rows = [row for row in range(len(pieces)) if pieces.path(row) == changed]
    assert sorted(crops_read) == rows != []
    # other crops are other crops
    crops_read.clear()
    held_out(again, folder, verdicts, seed=6)
    assert len(crops_read) >= len(first)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"good": 1, "broken": []}', '{"good": [], "broken": [1]}']
)
def test_verdicts_that_cannot_be_read_are_found_anew(text, half_broken, tmp_path):
    manifest, folder = half_broken
    verdicts = tmp_path / "verdicts.json"
    first = held_out(manifest, folder, verdicts)
    kept = verdicts.read_text()
    verdicts.write_text(text)
    assert held_out(manifest, folder, verdicts) == first and verdicts.read_text() == kept


def test_only_the_validation_crops_are_decoded(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / "audio" / f"{number}.wav", 120.0)
    manifest, _ = scan(tmp_path / "audio")
    read, sizes = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames, **options: (sizes.append(frames), read(self, frames, **options))[1],
    )
    held_out(manifest, tmp_path / "audio", crop_frames=208)
    assert len(sizes) == 16 and max(sizes) <= 208 * 160 + 240  # of 1.9 million samples a file
