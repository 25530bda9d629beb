"""The demo corpus is whole or absent, the same for a seed, and sounds like what its labels say."""

import csv
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_jepa.data import demo
from speechbrain_jepa.data.demo import (
    MELODIES,
    PITCHES,
    RHYTHMS,
    SPLITS,
    STAMP,
    default_demo_folder,
    make_demo_corpus,
)
from speechbrain_jepa.data.demo_sounds import (
    PERCUSSION,
    PITCHED,
    SCENES,
    SOUNDS,
)
from speechbrain_jepa.data.synthesis import Score, record
from speechbrain_jepa.features import SAMPLE_RATE

SMALL = 8  # clips per sound


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_demo_corpus(tmp_path_factory.mktemp("cache") / "demo", clips_per_sound=SMALL)


def rows_of(folder):
    with open(folder / "meta.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- the folder --------------------------------------------------------------------------------


def test_every_row_is_a_16_khz_mono_flac_file_of_3_to_5_seconds(corpus):
    rows = rows_of(corpus)
    assert len(rows) == len(SOUNDS) * SMALL == len(list(corpus.glob("*/*.flac")))
    for row in rows:
        info = soundfile.info(corpus / row["file"])
        assert (info.format, info.subtype) == ("FLAC", "PCM_16")
        assert (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
        assert 3 <= info.duration <= 5


def test_levels_vary_and_nothing_clips(corpus):
    peaks = [np.abs(soundfile.read(corpus / row["file"])[0]).max() for row in rows_of(corpus)]
    assert 0.04 < min(peaks) < 0.1 and 0.6 < max(peaks) < 0.95


def test_a_seed_gives_the_same_corpus_and_another_seed_another(corpus, tmp_path):
    same = make_demo_corpus(tmp_path / "same", clips_per_sound=SMALL, workers=1)
    other = make_demo_corpus(tmp_path / "other", clips_per_sound=SMALL, seed=1)
    assert (same / "meta.csv").read_bytes() == (corpus / "meta.csv").read_bytes()
    for row in rows_of(corpus)[::5]:
        expected = (corpus / row["file"]).read_bytes()
        assert (same / row["file"]).read_bytes() == expected
        assert (other / row["file"]).read_bytes() != expected


def test_a_finished_corpus_is_not_made_again(corpus, monkeypatch):
    monkeypatch.setattr(demo, "_write_corpus", None)  # to call it would be an error
    assert make_demo_corpus(corpus, clips_per_sound=SMALL) == corpus


@pytest.mark.parametrize("damage", ["lost file", "older version", "torn stamp"])
def test_a_damaged_or_older_corpus_is_made_anew(corpus, damage, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(corpus, folder)
    lost = folder / rows_of(folder)[3]["file"]
    if damage == "lost file":
        lost.unlink()
    elif damage == "older version":
        stamp = json.loads((folder / STAMP).read_text())
        (folder / STAMP).write_text(json.dumps({**stamp, "version": 0}))
    else:
        (folder / STAMP).write_text('{"versi')
    (folder / "old").touch()
    make_demo_corpus(folder, clips_per_sound=SMALL)
    assert lost.is_file() and not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_an_interrupted_run_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(*arguments):
        if arguments[2] == 20:
            raise KeyboardInterrupt
        write(*arguments)

    write = demo._write_clip
    monkeypatch.setattr(demo, "_write_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo_corpus(tmp_path / "demo", clips_per_sound=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_runs_half_is_never_taken_for_a_corpus_and_goes_after_an_hour(corpus, tmp_path):
    half = tmp_path / f".demo-{'0123abcd' * 4}.partial"
    own = tmp_path / ".demo-backup"
    for folder in (half, own):
        shutil.copytree(corpus / "train", folder / "train")
        os.utime(folder, (0, 0))
    folder = make_demo_corpus(tmp_path / "demo", clips_per_sound=SMALL)
    assert len(list(folder.glob("*/*.flac"))) == len(SOUNDS) * SMALL
    assert own.exists() and not half.exists()


def test_two_processes_may_make_it_at_once(corpus, monkeypatch, tmp_path):
    def overtaken(folder, *arguments):
        write(folder, *arguments)
        shutil.copytree(folder, tmp_path / "demo")  # the other process is done first

    write = demo._write_corpus
    monkeypatch.setattr(demo, "_write_corpus", overtaken)
    folder = make_demo_corpus(tmp_path / "demo", clips_per_sound=SMALL)
    assert len(rows_of(folder)) == len(SOUNDS) * SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        make_demo_corpus(tmp_path, clips_per_sound=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_few_clips_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="clips_per_sound=3"):
        make_demo_corpus(tmp_path / "demo", clips_per_sound=3)


def test_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_demo_folder() == tmp_path / "speechbrain_jepa" / "demo-v1"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        expected = tmp_path / "home" / ".cache" / "speechbrain_jepa" / "demo-v1"
        assert default_demo_folder() == expected


# -- the labels --------------------------------------------------------------------------------


def full_plan():
    return list(demo._plan(demo.CLIPS_PER_SOUND, np.random.default_rng(0)))


def test_labels_apply_where_they_mean_something():
    for clip in full_plan():
        assert bool(clip.pitch) != bool(clip.melody) or clip.sound not in PITCHED
        assert clip.sound in PITCHED or not (clip.pitch or clip.melody)
        assert bool(clip.rhythm) == (clip.sound not in SCENES)


@pytest.mark.parametrize("column", ["sound", "pitch", "melody", "rhythm"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_classes_are_balanced_in_every_split(column, split):
    labels = [getattr(clip, column) for clip in full_plan() if clip.split == split]
    counts = Counter(label for label in labels if label)
    expected = {"sound": SOUNDS, "pitch": PITCHES, "melody": MELODIES, "rhythm": RHYTHMS}
    assert set(counts) == {str(label) for label in expected[column]}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_rhythm_patterns_differ_in_their_gaps():
    rng = np.random.default_rng(0)
    ratio, rate = {}, {}
    for rhythm in RHYTHMS:
        gaps = np.fromiter(demo._gaps(rhythm, rng), float, 30)
        ratio[rhythm], rate[rhythm] = gaps.max() / gaps.min(), 1 / gaps.mean()
    assert ratio["steady"] == ratio["running"] == ratio["roll"] == 1
    assert rate["steady"] < 3 < rate["running"] < 8 < rate["roll"]
    assert ratio["gallop"] == pytest.approx(2) and ratio["bursts"] > 3


def test_contours_go_where_their_names_say():
    for seed in range(20):
        notes = {
            name: demo._contour(name, 16, np.random.default_rng(seed)).astype(float)
            for name in MELODIES
        }
        steps = {name: np.diff(contour) for name, contour in notes.items()}
        assert (steps["rising"] > 0).mean() > 0.7 > 0.3 > (steps["falling"] > 0).mean()
        assert (np.abs(steps["trill"]) <= 2).all() and (np.abs(steps["leaps"]) >= 7).all()
        turns = np.count_nonzero(np.diff(np.sign(steps["wave"])))
        assert 1 <= turns < 10


# -- the sounds --------------------------------------------------------------------------------


def one_note(pitch=220.0, seconds=3.0):
    """A single note from 0.5 s on."""
    return Score(
        samples=int(seconds * SAMPLE_RATE),
        onsets=np.array([0.5]),
        lengths=np.array([1.0]),
        pitches=np.array([pitch]),
        velocities=np.array([0.9]),
    )


def play(sound, score, seed=0):
    return SOUNDS[sound](score, np.random.default_rng(seed), np.random.default_rng(seed + 1))


@pytest.mark.parametrize("sound", SOUNDS)
def test_every_instrument_gives_finite_sound_of_the_scores_length(sound):
    score = one_note()
    waves = [play(sound, score, seed) for seed in range(4)]
    for wav in waves:
        assert wav.shape == (score.samples,) and wav.dtype == np.float32
        assert np.isfinite(wav).all() and wav.std() > 1e-3
    assert not np.array_equal(waves[0], waves[1])


@pytest.mark.parametrize("sound", [*PITCHED, *PERCUSSION])
def test_a_note_starts_at_its_onset(sound):
    wav = play(sound, one_note())
    onset = SAMPLE_RATE // 2
    assert not wav[: onset - 1].any()
    assert np.abs(wav[onset : onset + SAMPLE_RATE // 4]).max() > 0.05 * np.abs(wav).max()


@pytest.mark.parametrize("pitch", [165.0, 330.0])
@pytest.mark.parametrize("sound", PITCHED)
def test_a_pitched_note_has_its_pitch(sound, pitch):
    wav = play(sound, one_note(pitch))[SAMPLE_RATE // 2 :][: SAMPLE_RATE // 2]
    power = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), 8 * SAMPLE_RATE)) ** 2
    hertz = np.arange(len(power)) / 8
    if sound in ("bell", "marimba", "organ"):  # inharmonic overtones; sub-octave pipe
        near = power[np.abs(hertz - pitch) < 15]
        peak = hertz[np.abs(hertz - pitch) < 15][near.argmax()]
    else:  # the pitch whose harmonics gather most of the power
        trial = pitch * 2 ** np.linspace(-0.4, 0.4, 321)
        comb = [np.interp(f * np.arange(1, 9), hertz, np.sqrt(power)).sum() for f in trial]
        peak = trial[int(np.argmax(comb))]
    assert abs(1200 * np.log2(peak / pitch)) < 60


def test_struck_sounds_decay_and_blown_sounds_hold():
    for seed in range(3):
        for sound in ("plucked", "marimba", "flute", "organ", "bowed"):
            wav = play(sound, one_note(), seed)
            early, late = (
                np.square(wav[int(a * SAMPLE_RATE) :][:2400]).mean() for a in (0.6, 1.25)
            )
            assert (late < 0.4 * early) == (sound in ("plucked", "marimba"))


def test_recordings_of_one_sound_differ_and_keep_their_length():
    wav = play("brass", one_note())
    takes = [record(wav, np.random.default_rng(seed)) for seed in range(3)]
    assert all(take.shape == wav.shape and take.dtype == np.float32 for take in takes)
    assert all(0.04 < np.abs(take).max() < 0.95 for take in takes)
    assert not np.allclose(takes[0], takes[1], atol=1e-3)
