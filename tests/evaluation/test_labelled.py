"""Labelled clips: the csv, who trains and who tests, clips of one length."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa.evaluation.fixed_clips import fixed_length, read_fixed
from speechbrain_jepa.evaluation.labelled import LabelledClips, read_labelled


def test_training_clips_are_cropped_anywhere_test_clips_at_the_start(clips):
    wavs = {
        row: wav
        for rows, batch in read_fixed(clips, range(8), 1.0)
        for row, wav in zip(rows, batch)
    }
    whole = [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in clips.files]
    assert all(len(wav) == 16_000 for wav in wavs.values())
    assert torch.equal(wavs[7], whole[7][:16_000])
    assert torch.equal(wavs[0], torch.cat([whole[0], torch.zeros(8_000)]))
    assert not torch.equal(wavs[4], whole[4][:16_000])
    starts = {int((whole[4].unfold(0, 100, 1) == wavs[4][:100]).all(1).nonzero()) for _ in range(2)}
    assert len(starts) == 1 and 0 < starts.pop() <= 24_000
    other = {r: w for rows, b in read_fixed(clips, [4], 1.0, crop_seed=1) for r, w in zip(rows, b)}
    assert not torch.equal(other[4], wavs[4])


def test_every_crop_that_fits_can_be_drawn():
    wav = torch.arange(5.0)
    assert {int(fixed_length(wav, 3, draw)[0]) for draw in (0, 0.4, 0.999)} == {0, 1, 2}


def test_clips_of_a_cross_validation_are_cropped_at_the_start(clips):
    folds = LabelledClips(clips.ids, clips.files, clips.labels, [""] * 8, [0, 1] * 4)
    ((_, wavs),) = read_fixed(folds, [4], 1.0)
    assert torch.equal(
        wavs[0], torch.from_numpy(soundfile.read(clips.files[4], dtype="float32")[0])[:16_000]
    )


def test_divisions_do_not_share_a_clip_and_seeds_draw_other_validation_clips():
    names = [str(number) for number in range(100)]
    clips = LabelledClips(names, names, ["a", "b"] * 50, [""] * 100, [i % 5 for i in range(100)])
    divisions = {seed: clips.divide(seed) for seed in (0, 1)}
    for rows in divisions[0]:
        parts = [rows.train, rows.valid, rows.test]
        assert [len(part) for part in parts] == [72, 8, 20]
        assert sorted(np.concatenate(parts)) == list(range(100))
        assert {clips.folds[row] for row in rows.test} == {rows.fold}
    assert not np.array_equal(divisions[0][0].valid, divisions[1][0].valid)
    assert np.array_equal(divisions[0][0].test, divisions[1][0].test)


def test_a_named_validation_split_is_the_one_that_validates(clips):
    (rows,) = clips.divide(0, np.array([True] * 7 + [False]))
    assert (rows.train.tolist(), rows.valid.tolist(), rows.test.tolist()) == (
        [0, 1, 2, 3, 4],
        [5],
        [6],
    )
    with pytest.raises(ValueError, match="no valid clip could be used"):
        clips.divide(0, np.arange(8) != 5)


def test_numeric_classes_are_sorted_by_value():
    clips = LabelledClips(["a"] * 3, ["a"] * 3, ["100", "21", "9"], ["train"] * 3, [None] * 3)
    assert clips.classes == ["9", "21", "100"] and clips.targets.tolist() == [2, 1, 0]


# -- the csv -----------------------------------------------------------------------------------


def test_a_manifest_of_a_recipe_and_a_csv_of_a_user_are_read_alike(tmp_path):
    manifest, mine = tmp_path / "manifest.csv", tmp_path / "mine.csv"
    rows = [("a.wav", "1.5", "dog", "train"), ("b.wav", "2", "cat", "train")]
    rows += [("c.wav", "1", "dog", "test")]
    lines = [f"{name},{name},{seconds},{label},{split},\n" for name, seconds, label, split in rows]
    manifest.write_text("ID,wav,duration,label,split,fold\n" + "".join(lines))
    lines = [f"{split},{name},{label}\n" for name, _, label, split in rows]
    mine.write_text("split,file,label\n" + "".join(lines), encoding="utf-8-sig")
    first, second = read_labelled(manifest)["label"], read_labelled(mine)["label"]
    assert first.longest == 2 and second.longest is None
    assert replace(first, longest=None) == second
    assert second.files[0] == str(tmp_path / "a.wav")
    assert read_labelled(mine, "/data")["label"].files[0] == "/data/a.wav"


def test_rows_without_a_label_are_clips_of_no_class_only_where_there_may_be_several(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("file,tags,split\na.wav,x;y,train\nb.wav,,train\nc.wav,x,test\n")
    assert len(read_labelled(path)["tags"]) == 2
    several = read_labelled(path, multilabel=True)["tags"]
    assert several.targets.tolist() == [[1, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    "table, message",
    [
        ("file,label\na.wav,x\n", "it needs file, split"),
        ("file,split\na.wav,train\n", "at least one column of labels"),
        ("file,label,split\n", "no rows"),
        ("file,label,split\na.wav,x,dev\n", "split 'dev' is none of train, valid, test"),
        ("file,label,split\na.wav,x,train\n", "no row of split test"),
        ("file,label,split\na.wav,x,train\na.wav,y,test\n", "'a.wav' occurs twice"),
        ("file,label,split,fold\na.wav,x,,0\nb.wav,x,test,\n", "1 of 2 rows have a fold"),
        ("file,label,fold\na.wav,x,0\nb.wav,x,0\n", "all rows are of fold 0"),
        ("file,label,fold\na.wav,x,0\nb.wav,x,one\n", "line 3: fold 'one' is no number"),
    ],
)
def test_a_table_of_labels_that_is_none_is_named(table, message, tmp_path):
    (tmp_path / "meta.csv").write_text(table)
    with pytest.raises(ValueError, match=f"meta.csv.*{message}"):
        read_labelled(tmp_path / "meta.csv")
