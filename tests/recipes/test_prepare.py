"""Preparing the data sets of the linear evaluation: layouts, splits, what is missing or broken."""

import csv
import importlib
import os
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
import soundfile
import trees
from prepare import TASKS, common
from torchaudio.datasets import gtzan as gtzan_lists

from speechbrain_jepa.evaluation.labelled import read_labelled

# what must not be on both sides of a split, as the file's path tells it
GROUPS = {
    "esc50": lambda path: path.name.split("-")[1],  # recording
    "urbansound8k": lambda path: path.name.split("-")[0],  # recording
    "speech_commands": lambda path: path.name.split("_")[0],  # speaker
    "voxceleb1": lambda path: path.parent,  # video
    "cremad": lambda path: path.name.split("_")[0],  # speaker
    "gtzan": lambda path: path,
    "nsynth": lambda path: path,
    "surge": lambda path: path.parent.name,  # preset
    "audioset20k": lambda path: path.stem,
    "custom": lambda path: path,
}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def skipped(manifest):
    return {row["file"]: row["reason"] for row in rows_of(manifest.with_name("skipped.csv"))}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture(params=trees.TREES)
def name(request):
    return request.param


@pytest.fixture
def tree(name, tmp_path):
    return trees.TREES[name](tmp_path / "data")


@pytest.fixture
def module(name, tree, monkeypatch):
    """The task's module, told that the small tree is the whole data set."""
    module = importlib.import_module(f"prepare.{name}")
    labels = [label for _, label, _, _ in tree.rows]
    classes = len(set(";".join(labels).split(";") if tree.multilabel else labels))
    counts = tree.counts if name != "custom" else {}
    monkeypatch.setattr(module, "TASK", replace(module.TASK, counts=counts, classes=classes))
    return module


@pytest.fixture
def prepare(module, tree, tmp_path):
    def prepare(data_folder=tree.folder, **options):
        return module.prepare(data_folder, tmp_path / "save", **{**tree.options, **options})

    return prepare


@pytest.fixture
def headers_read(monkeypatch):
    """How many headers were read."""
    read, original = [], common.read_headers
    monkeypatch.setattr(
        common,
        "read_headers",
        lambda files, *args, **options: read.extend(files) or original(files, *args, **options),
    )
    return read


# Every data set


def test_manifest_holds_every_clip_with_its_label_and_split(tree, prepare, caplog):
    manifest = prepare()
    rows = rows_of(manifest)
    found = [(row["wav"], row["label"], row["split"], row["fold"]) for row in rows]
    assert sorted(found) == sorted(tree.rows)
    for row in rows[:: max(len(rows) // 20, 1)]:
        seconds = soundfile.info(tree.folder / row["wav"]).duration
        assert float(row["duration"]) == pytest.approx(seconds, abs=1e-5)
    assert skipped(manifest) == {}
    assert warnings(caplog) == []
    clips = read_labelled(manifest, tree.folder, tree.multilabel)["label"]
    assert len(clips) == len(tree.rows)
    assert all(rows.train.size and rows.test.size for rows in clips.divide(seed=0))


def test_nothing_is_on_both_sides(name, prepare):
    sides = defaultdict(set)
    for row in rows_of(prepare()):
        sides[GROUPS[name](PurePosixPath(row["wav"]))].add((row["split"], row["fold"]))
    assert len(set.union(*sides.values())) > 1
    assert all(len(side) == 1 for side in sides.values())


def test_a_missing_file_stops_unless_it_may(name, tree, prepare, caplog):
    train = [wav for wav, _, split, fold in tree.rows if split == "train" or fold == "1"]
    (tree.folder / train[0]).unlink()
    with pytest.raises(FileNotFoundError, match="--allow_missing True") as error:
        prepare()
    message = str(error.value)
    assert f"{name}: data_folder={tree.folder} is not complete" in message
    named = name not in ("cremad", "speech_commands", "surge")  # their training files are not
    if not named:
        count = tree.counts["train"]
        assert f"train split: {count} files expected, {count - 1} found" in message
    else:
        assert f"1 of {len(tree.rows)} files are missing, the first: {train[0]}" in message
        folder = "/".join(train[0].split("/")[:-1][:2])
        count = sum("/".join(wav.split("/")[:-1][:2]) == folder for wav, *_ in tree.rows)
        assert f"{folder}: {count} files expected, {count - 1} found" in message
    manifest = prepare(allow_missing=True)
    assert {row["wav"] for row in rows_of(manifest)} == {wav for wav, *_ in tree.rows} - {train[0]}
    assert any("is not complete" in line for line in warnings(caplog))
    assert skipped(manifest) == ({train[0]: "missing"} if named else {})
    with pytest.raises(FileNotFoundError):  # whatever was written in the meantime
        prepare()


def test_two_at_once_read_the_headers_once_and_write_one_manifest(tmp_path, headers_read):
    tree = trees.gtzan(tmp_path / "data")
    module = importlib.import_module("prepare.gtzan")
    barrier = threading.Barrier(4)

    def prepare(_):
        barrier.wait()
        return rows_of(module.prepare(tree.folder, tmp_path / "save", allow_missing=True))

    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(prepare, range(4)))
    assert all(len(rows) == len(tree.rows) and rows == tables[0] for rows in tables)
    assert len(headers_read) == len(tree.rows)


def test_corrupt_files_are_left_out_and_reported(name, tree, prepare, caplog):
    split, count = tree.rows[0][2], tree.counts[tree.rows[0][2]]
    wavs = [wav for wav, _, its_split, _ in tree.rows if its_split == split]
    empty, text, header_only, pointer = wavs[:4]
    for wav, content in (
        (empty, b""),
        (text, b"not audio at all"),
        (pointer, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ):
        (tree.folder / wav).unlink()  # links are to other clips
        (tree.folder / wav).write_bytes(content)
    (tree.folder / header_only).unlink()
    soundfile.write(tree.folder / header_only, [], 16_000, format="WAV")
    manifest = prepare()
    reasons = skipped(manifest)
    assert set(reasons) == {empty, text, header_only, pointer}
    assert reasons[empty] == "empty"
    assert reasons[text].startswith("cannot be opened")
    assert reasons[header_only] == "holds no samples"
    assert "git lfs pull" in reasons[pointer]
    assert len(rows_of(manifest)) == len(tree.rows) - 4
    if name != "custom":  # of which nobody knows how many there should be
        expected = f"{split or 'all folds'}: {count} clips expected, {count - 4} can be used"
        assert any(expected in line for line in warnings(caplog))


def test_another_folder_is_refused_with_the_address(name, module, prepare, tmp_path):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path / "other", tmp_path / "nowhere"):
        if name == "custom":
            with pytest.raises(FileNotFoundError, match="10 of 10 files are missing"):
                prepare(folder, allow_missing=True)
            continue
        with pytest.raises(FileNotFoundError) as error:
            prepare(folder, allow_missing=True)
        assert f"{name}: data_folder={folder} " in str(error.value)
        assert f"Download: {module.TASK.source}" in str(error.value)
    assert not (tmp_path / "save").exists()


def test_headers_are_read_once(tree, prepare, headers_read, caplog):
    manifest = prepare()
    assert len(headers_read) == len(tree.rows)
    first, written = manifest.read_text(), manifest.stat().st_mtime_ns
    headers_read.clear()
    assert prepare() == manifest
    assert not headers_read and manifest.stat().st_mtime_ns == written

    wav = tree.rows[0][0]
    (tree.folder / wav).unlink()
    trees.write_sound(tree.folder / wav, seconds=0.7, format="WAV")
    changed = rows_of(prepare())
    assert headers_read
    assert float(next(row for row in changed if row["wav"] == wav)["duration"]) == 0.7
    assert manifest.read_text() != first


# The manifest


@pytest.fixture
def esc50(tmp_path):
    tree = trees.esc50(tmp_path / "data", seconds=0.1)
    module = importlib.import_module("prepare.esc50")
    task = replace(module.TASK, counts={"": len(tree.rows)}, classes=4)
    clips = [common.Clip(*row) for row in tree.rows]

    def write(clips=clips, **options):
        return common.write_manifest(task, tree.folder, tmp_path / "save", clips, **options)

    return tree, clips, write


def test_a_killed_run_is_done_again(esc50, monkeypatch):
    tree, _, write = esc50
    with monkeypatch.context() as patch:
        patch.setattr(common, "_report", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write()
    manifest = write()
    assert len(rows_of(manifest)) == len(tree.rows)
    assert not list(manifest.parent.glob("*.partial"))


def test_other_labels_or_a_lost_list_are_written_again(esc50, headers_read):
    _, clips, write = esc50
    manifest = write()
    relabelled = [clip._replace(label="cat") for clip in clips]
    assert {row["label"] for row in rows_of(write(relabelled))} == {"cat"}
    headers_read.clear()
    manifest.with_name("skipped.csv").unlink()
    write(relabelled)
    assert headers_read and skipped(manifest) == {}


def test_differences_from_the_published_set_are_told_again(esc50, caplog):
    _, clips, write = esc50
    for _ in range(2):
        caplog.clear()
        write(clips[:30])
        assert any("all folds: 40 clips expected, 30 can be used" in w for w in warnings(caplog))
        assert any("5 folds expected, 4 found" in w for w in warnings(caplog))


@pytest.mark.parametrize("text", ["", '{"format_version": 1, "rep', "[" * 100, "[]"])
def test_a_damaged_stamp_is_made_anew(text, esc50):
    tree, _, write = esc50
    manifest = write()
    manifest.with_name("manifest.json").write_text(text)
    manifest.write_text("")
    assert len(rows_of(write())) == len(tree.rows)


def test_a_named_pipe_is_listed_and_waited_for_by_nobody(esc50):
    tree, clips, write = esc50
    pipe = tree.folder / "return\r.wav"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write, [*clips, clips[0]._replace(wav=pipe.name)])
        try:
            manifest = done.result(20)
        finally:  # a writer would end the wait
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
    assert skipped(manifest) == {"return\r.wav": "is a named pipe: only regular files are opened"}
    assert len(rows_of(manifest)) == len(clips)


def test_a_file_may_be_listed_once(esc50):
    _, clips, write = esc50
    with pytest.raises(ValueError, match=r"esc50: audio/1-101000-A-0\.wav is listed twice"):
        write([*clips, clips[0]._replace(fold="5")])


def test_no_usable_file_is_an_error_with_the_reason(esc50):
    tree, _, write = esc50
    for wav, *_ in tree.rows:
        (tree.folder / wav).write_text("text")
    with pytest.raises(ValueError, match=r"none of the 40 files .*cannot be opened.*skipped\.csv"):
        write()


# Published numbers


def test_tasks_are_those_of_the_paper():
    tasks = {name: importlib.import_module(f"prepare.{name}").TASK for name in TASKS}
    assert list(tasks) == [task.name for task in tasks.values()]
    facts = {  # classes and clips as published
        "esc50": (50, 2000),
        "urbansound8k": (10, 8732),
        "speech_commands": (35, 105_829),
        "voxceleb1": (1251, 153_516),
        "cremad": (6, 7438),
        "gtzan": (10, 930),
        "nsynth": (11, 305_979),
        "surge": (88, 2084 * 88),
    }
    assert facts == {
        name: (task.classes, sum(task.counts.values())) for name, task in tasks.items()
    }
    assert {name: task.folds for name, task in tasks.items() if task.folds} == {
        "esc50": 5,
        "urbansound8k": 10,
    }


def test_whole_urbansound8k_has_8732_clips(tmp_path, caplog):
    from prepare import urbansound8k

    sizes = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)  # of the folds
    table = [
        (f"{100_000 * fold + n}-{n % 10}-0-0.wav", fold, f"class {n % 10}")
        for fold, size in enumerate(sizes, start=1)
        for n in range(size)
    ]
    trees.link_all(tmp_path / "data", [f"audio/fold{fold}/{name}" for name, fold, _ in table])
    columns = ("slice_file_name", "fold", "class")
    trees.write_rows(tmp_path / "data/metadata/UrbanSound8K.csv", columns, table)
    manifest = urbansound8k.prepare(tmp_path / "data", tmp_path / "save")
    assert warnings(caplog) == []
    folds = Counter(int(row["fold"]) for row in rows_of(manifest))
    assert folds == dict(enumerate(sizes, start=1))


def test_cremad_divides_91_speakers(tmp_path, caplog):
    from prepare import cremad

    speakers = Counter(map(cremad.split_of, cremad.SPEAKERS))
    assert speakers == {"train": 63, "valid": 9, "test": 19}

    # every speaker says 12 sentences in 6 emotions, one of them at three levels: 7462, of which
    # 20 were never there and 4 are not evaluated on
    sentences = ["TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI"]
    takes = [f"{sentence}_{emotion}_XX" for sentence in sentences for emotion in trees.EMOTIONS]
    takes += ["IEO_NEU_XX"]
    takes += [
        f"IEO_{e}_{level}" for e in trees.EMOTIONS if e != "NEU" for level in ("LO", "MD", "HI")
    ]
    names = [f"{speaker}_{take}" for speaker in cremad.SPEAKERS for take in takes]
    assert len(names) == 91 * 82
    absent = Counter(train=8, valid=6, test=6)
    for name in [name for name in names if "TAI_ANG" in name]:
        split = cremad.split_of(int(name[:4]))
        if absent[split]:
            absent[split] -= 1
            names.remove(name)
    assert len(names) == 7442
    trees.link_all(tmp_path / "data", [f"AudioWAV/{name}.wav" for name in names])
    manifest = cremad.prepare(tmp_path / "data", tmp_path / "save")
    assert warnings(caplog) == []
    splits = Counter(row["split"] for row in rows_of(manifest))
    assert splits == {"train": 5155, "valid": 732, "test": 1551}
    assert set(skipped(manifest)) == {
        f"AudioWAV/{name}.wav"
        for name in ("1006_TIE_NEU_XX", "1013_WSI_DIS_XX", "1017_IWW_FEA_XX", "1040_ITH_SAD_XX")
    }


def test_whole_gtzan_has_443_197_290_clips_and_may_lack_the_corrupt_one(tmp_path, caplog):
    from prepare import gtzan

    tree = trees.gtzan(tmp_path / "data", genres="Data/genres_original", seconds=0.05)
    manifest = gtzan.prepare(tree.folder, tmp_path / "save")
    assert warnings(caplog) == []
    splits = Counter(row["split"] for row in rows_of(manifest))
    assert splits == {"train": 443, "valid": 197, "test": 290}

    bad = "Data/genres_original/jazz/jazz.00054.wav"  # as on Kaggle
    (split,) = (split for wav, _, split, _ in tree.rows if wav == bad)
    (tree.folder / bad).unlink()
    (tree.folder / bad).write_bytes(os.urandom(10_000))
    manifest = gtzan.prepare(tree.folder, tmp_path / "save")
    assert len(rows_of(manifest)) == 929
    assert skipped(manifest)[bad].startswith("cannot be opened")
    count = gtzan.TASK.counts[split]
    (line,) = warnings(caplog)
    assert f"{split}: {count} clips expected, {count - 1} can be used" in line


def test_gtzan_lists_are_torchaudios():
    from prepare import gtzan

    for split, names in gtzan.LISTS.items():
        assert names == getattr(gtzan_lists, f"filtered_{split}")


# Layouts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gtzan", {"genres": "genres", "suffix": ".au"}),
        ("gtzan", {"genres": "genres_original"}),
        ("gtzan", {"genres": "."}),
        ("voxceleb1", {"dev": "vox1_dev_wav/wav", "test": "vox1_test_wav/wav"}),
        ("voxceleb1", {"dev": "dev/wav", "test": "test/wav"}),
        ("voxceleb1", {"dev": ".", "test": "."}),
    ],
)
def test_other_ways_to_unpack_are_found(name, options, tmp_path):
    tree = trees.TREES[name](tmp_path / "data", seconds=0.05, **options)
    module = importlib.import_module(f"prepare.{name}")
    found = [
        (row["wav"], row["label"], row["split"], row["fold"])
        for row in rows_of(module.prepare(tree.folder, tmp_path / "save"))
    ]
    assert sorted(found) == sorted((row[0].removeprefix("./"), *row[1:]) for row in tree.rows)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("esc50", "ESC-50-master"),
        ("urbansound8k", "UrbanSound8K"),
        ("speech_commands", "SpeechCommands/speech_commands_v0.02"),
        ("cremad", "CREMA-D"),
        ("nsynth", "nsynth"),
        ("surge", "surge"),
    ],
)
def test_the_folder_above_will_do(name, folder, tmp_path):
    tree = trees.TREES[name](tmp_path / "data" / folder, seconds=0.05)
    module = importlib.import_module(f"prepare.{name}")
    manifest = module.prepare(
        tmp_path / "data", tmp_path / "save", allow_missing=True, **tree.options
    )
    assert {row["wav"] for row in rows_of(manifest)} == {f"{folder}/{wav}" for wav, *_ in tree.rows}


def test_voxceleb1_says_where_the_list_of_splits_is(tmp_path):
    from prepare import voxceleb1

    tree = trees.voxceleb1(tmp_path / "data")
    listed = tmp_path / "elsewhere.txt"
    (tree.folder / "iden_split.txt").rename(listed)
    with pytest.raises(FileNotFoundError, match=r"iden_split\.txt .*meta/iden_split\.txt"):
        voxceleb1.prepare(tree.folder, tmp_path / "save")
    manifest = voxceleb1.prepare(tree.folder, tmp_path / "save", iden_split=listed)
    assert len(rows_of(manifest)) == len(tree.rows)
    listed.write_text("4 id10001/video/00001.wav\n")
    with pytest.raises(ValueError, match=r"elsewhere\.txt, line 1: '4' is none of 1, 2, 3"):
        voxceleb1.prepare(tree.folder, tmp_path / "save", iden_split=listed)


def test_speech_commands_needs_both_lists(tmp_path):
    from prepare import speech_commands

    tree = trees.speech_commands(tmp_path / "data")
    (tree.folder / "validation_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no validation_list\.txt"):
        speech_commands.prepare(tree.folder, tmp_path / "save", allow_missing=True)


def test_cremad_files_with_other_names_are_reported(tmp_path):
    from prepare import cremad

    tree = trees.cremad(tmp_path / "data")
    for name in ("1001_DFA.wav", "1092_DFA_ANG_XX.wav", "1001_DFA_JOY_XX.wav"):
        trees.write_sound(tree.folder / "AudioWAV" / name)
    manifest = cremad.prepare(tree.folder, tmp_path / "save", allow_missing=True)
    assert len(rows_of(manifest)) == len(tree.rows)
    assert len(skipped(manifest)) == 3
    assert all(reason.startswith("the name is not") for reason in skipped(manifest).values())


def test_other_columns_are_said(tmp_path):
    from prepare import esc50

    trees.write_rows(tmp_path / "meta/esc50.csv", ("file", "fold", "category"), [("a", 1, "b")])
    with pytest.raises(ValueError, match=r"no column filename: its columns are file, fold, cat"):
        esc50.prepare(tmp_path, tmp_path / "save")


# Surge's own split


def test_surge_presets_are_divided_as_published_and_always_the_same():
    from prepare import surge

    presets = [f"preset {number}" for number in range(2084)]
    splits = surge.split_presets(presets)
    assert Counter(splits.values()) == surge.PRESETS == {"train": 1692, "valid": 195, "test": 197}
    assert surge.split_presets(reversed(presets)) == splits
    # pinned: a manifest of another day or machine must be the same
    tested = [name for name in presets if splits[name] == "test"]
    assert tested[:3] == ["preset 0", "preset 23", "preset 26"]
    # half of them in the first half of the names, within five deviations (of 6.7)
    assert abs(len(set(tested) & set(presets[:1042])) - 197 / 2) < 35


def test_surge_without_a_csv_keeps_presets_together(tmp_path):
    from prepare import surge

    tree = trees.surge(tmp_path / "data", presets=20)
    rows = rows_of(surge.prepare(tree.folder, tmp_path / "save", allow_missing=True))
    splits = defaultdict(set)
    for row in rows:
        splits[row["wav"].split("/")[0]].add(row["split"])
    assert all(len(sides) == 1 for sides in splits.values())
    assert Counter(side for sides in splits.values() for side in sides) == {
        **{"train": 16, "valid": 2, "test": 2}
    }


def test_only_surge_without_its_csv_has_a_split_of_its_own():
    from prepare import gtzan, surge

    assert surge.TASK.has_own_split({"split_csv": None}) and surge.TASK.has_own_split({})
    assert not surge.TASK.has_own_split({"split_csv": "splits.csv"})
    assert not gtzan.TASK.has_own_split({})


def test_surge_takes_a_published_split(tmp_path):
    from prepare import surge

    tree = trees.surge(tmp_path / "data")
    table = tree.options["split_csv"]
    text = table.read_text()
    table.write_text(text.replace("preset,split", "tone,split"))
    rows = rows_of(surge.prepare(tree.folder, tmp_path / "a", True, split_csv=table))
    assert {(row["wav"], row["split"]) for row in rows} == {
        (wav, split) for wav, _, split, _ in tree.rows
    }
    for wrong, message in (
        (text.replace("valid", "dev"), "split 'dev' of surge-patches.* is none of train, valid"),
        (text.replace("Bass-3", "Bass-X"), "no row for 1 presets, as surge-patches.*Bass-3"),
        (text.replace("preset", "name"), "needs the columns preset and split"),
    ):
        table.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            surge.prepare(tree.folder, tmp_path / "b", True, split_csv=table)


# Custom


@pytest.mark.parametrize("options", [{"folds": True}, {"multilabel": True}])
def test_custom_takes_folds_and_several_labels(options, tmp_path):
    from prepare import custom

    tree = trees.custom(tmp_path / "data", **options)
    manifest = custom.prepare(tree.folder, tmp_path / "save", **tree.options)
    clips = read_labelled(manifest, tree.folder, tree.multilabel)["label"]
    assert clips.has_folds == ("folds" in options)
    assert clips.classes == (["bright", "high", "low"] if tree.multilabel else ["high", "low"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.wav,x\n", "has neither split nor fold"),
        ("file,label,split\n", "has neither split nor fold, or no rows"),
        ("file,label,split,fold\na.wav,x,train,1\n", "has both split and fold"),
        ("file,split\na.wav,train\n", "has no column label: its columns are file, split"),
        ("file,label,split\na.wav,x,dev\n", r"row 1 \(a\.wav\): split 'dev' is none of train, val"),
        ("file,label,fold\na.wav,x,one\n", r"row 1 \(a\.wav\): fold 'one' is not a number"),
        ("file,label,fold\na.wav,x\n", r"row 1 \(a\.wav\): fold '' is not a number"),
        ("file,label,split\na.wav,x;y,train\n", r"label 'x;y' is 2 labels: .*--multilabel True"),
        ("file,label,split\na.wav,,train\n", "label '' is 0 labels"),
    ],
)
def test_custom_errors_name_the_row_and_the_fix(text, message, tmp_path):
    from prepare import custom

    table = tmp_path / "labels.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        custom.prepare(tmp_path, tmp_path / "save", csv=table)


def test_custom_needs_its_csv(tmp_path):
    from prepare import custom

    with pytest.raises(FileNotFoundError, match=r"labels\.csv does not exist"):
        custom.prepare(tmp_path, tmp_path / "save", csv=tmp_path / "labels.csv")
