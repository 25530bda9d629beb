"""The free corpus, from packages that the tests make: what goes in, what stays out."""

import csv
import importlib.util
import io
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

FOLDER = Path(__file__).parents[2] / "recipes" / "pretraining" / "free_audio"


@pytest.fixture(scope="module")
def corpus():
    """The script, under a name that does not clash with the linear evaluation's `prepare`."""
    sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location("free_audio_prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def tone(seconds, frequency=440.0, rate=16_000, level=0.3):
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def wav_bytes(wav, rate=16_000, kind="WAV"):
    stream = io.BytesIO()
    soundfile.write(stream, wav, rate, format=kind)
    return stream.getvalue()


def write(path, wav, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate)


def names(sounds):
    return [sound.path.rsplit("/", 1)[-1] for sound in sounds]


# --- what goes in, what stays out -------------------------------------------------------------


def test_held_out_files_stay_out_whatever_separates_their_words(corpus, tmp_path):
    package = replace(
        next(p for p in corpus.RECORDED if p.name == "singularity-music"), pattern=r"\.wav$"
    )
    for name in ("Media Threat", "Media_Threat", "Media-Threat", "Media Threatened"):
        write(tmp_path / "music" / f"{name}.wav", tone(3))
    assert names(corpus.sounds_of(package, tmp_path)) == ["Media Threatened.wav"]


def test_a_prompt_is_held_out_by_its_folder_and_name(corpus, tmp_path):
    package = next(p for p in corpus.RECORDED if p.name == "asterisk-core-sounds-en-wav")
    sounds = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name in ("digits/17", "digits/16", "17", "goodbye"):
        write(sounds / f"{name}.wav", tone(1, rate=8_000), 8_000)
    assert names(corpus.sounds_of(package, tmp_path)) == ["17.wav", "16.wav"]


def test_a_held_out_name_of_no_file_stops_the_script(corpus, tmp_path, monkeypatch):
    package = corpus.Package("music", "GPL-2", "music", r"\.wav$", held_out=("there", "misspelt"))
    monkeypatch.setattr(corpus, "RECORDED", (package,))
    write(tmp_path / "there.wav", tone(1))
    with pytest.raises(SystemExit, match=r"none of the packages: misspelt\."):
        corpus.check_held_out({"music": tmp_path})


def test_no_held_out_program_is_ever_played(corpus):
    rng = np.random.default_rng(0)
    played = set()
    for kind in ("notes", "bands"):
        for number in range(300):
            for at, message in corpus.render._part(rng, kind, 12.0 * number, 12.0 * number + 10):
                assert 12.0 * number - 0.01 <= at <= 12.0 * number + 10
                if message[0] >> 4 == 0xC and message[0] & 15 != 9:
                    played.add(message[1])
    assert played == set(range(128)) - set(corpus.HELD_OUT_PROGRAMS)


def test_held_out_voices_are_not_among_the_variants(corpus, monkeypatch):
    listed = {
        "--voices": "Pty Language  Age/Gender VoiceName  File\n 5  fr-fr  --/M  French  roa/fr\n",
        "--voices=variant": "Pty Language\n 5  variant  --/M  male1  !v/m1   \n"
        " 5  variant  --/M  Mr_serious  !v/Mr serious    \n 5  variant  --/F  f1  !v/f1  \n",
    }

    def run(command, **_):
        return type("Done", (), {"stdout": listed[command[1]]})

    monkeypatch.setattr(corpus.render.subprocess, "run", run)
    assert corpus.render.voices() == (["fr-fr"], ["Mr serious", "f1"])


def test_sounds_are_found_and_read_inside_archives(corpus, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pk3", "w") as archive:
        archive.writestr("music/low.ogg", wav_bytes(tone(1, 200), kind="OGG"))
        archive.writestr("music/readme.txt", "no sound")
    contents = [wav_bytes(tone(seconds, 300, 11_025), 11_025) for seconds in (0.5, 1.0)]
    (tmp_path / "b.cat").write_bytes(b"header" + b"name".join(contents))
    write(tmp_path / "c.ogg", np.stack([tone(2, rate=44_100)] * 2, 1), 44_100)
    package = corpus.Package("all", "MIT", "effects", r"\.(ogg|wav)$")
    sounds = corpus.sounds_of(package, tmp_path)
    lengths = {sound.path: len(sound.read()) for sound in sounds}
    assert list(lengths) == ["a.pk3//music/low.ogg", "b.cat//000.wav", "b.cat//001.wav", "c.ogg"]
    assert list(lengths.values()) == [16_000, 8_000, 16_000, 32_000]


def test_texts_are_those_of_the_voices_languages(corpus, tmp_path):
    for number in range(60):
        lines = [f"A thing {number}.", f"fr.utf8=Une chose {number}.", f"xx.utf8=Xyz {number}."]
        (tmp_path / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = corpus.sentences(tmp_path, ["de", "en-gb", "fr-be"])
    assert set(texts) == {"en-gb", "fr-be"}
    assert len(texts["fr-be"]) == 60
    assert "Une chose 7." in texts["fr-be"]


# --- pieces -----------------------------------------------------------------------------------


def test_tracks_are_cut_into_ten_seconds_without_silence(corpus):
    track = np.concatenate([tone(10), np.zeros(160_000, np.float32), tone(12), tone(0.5)])
    assert [len(piece) for piece in corpus.cut(track)] == [160_000, 160_000, 40_000]
    assert list(corpus.cut(tone(1.9))) == []  # a rest of less than two seconds


def test_midi_files_are_read_back_as_written(corpus):
    """By the standard's own rules: chunks, delta times of variable length, end of track."""
    events = [(0.5, b"\x90\x3c\x40"), (0.0, b"\xc0\x05"), (300.0, b"\x80\x3c\x00")]
    content = corpus.render.midi_file(events)
    kind, tracks, ticks = struct.unpack(">HHH", content[8:14])
    assert (content[:4], kind, tracks) == (b"MThd", 0, 1)
    track = content[22:]
    assert struct.unpack(">I", content[18:22])[0] == len(track)
    place, tick, read = 0, 0, []
    while place < len(track):
        delta = 0
        while True:
            delta = delta << 7 | track[place] & 127
            place += 1
            if track[place - 1] < 128:
                break
        tick += delta
        size = {0x9: 3, 0x8: 3, 0xC: 2, 0xF: 3}[track[place] >> 4]
        read.append((tick / ticks / 2, track[place : place + size]))  # 120 quarter notes a minute
        place += size
    assert read == [*sorted(events), (300.0, b"\xff\x2f\x00")]


def test_drum_patterns_repeat_and_last_ten_seconds(corpus):
    rng = np.random.default_rng(0)
    piece = corpus.render.drum_pattern(rng, [tone(0.1), tone(0.2, 1000), tone(0.1, 3000)])
    assert len(piece) == 160_000
    assert np.abs(piece).max() > 0.05


def test_a_room_keeps_the_direct_sound_and_adds_a_tail(corpus):
    click = np.zeros(16_000, np.float32)
    click[100] = 1.0
    for seed in range(5):
        heard = corpus.render.in_room(np.random.default_rng(seed), click)
        assert len(heard) == 16_000
        assert np.abs(heard[:99]).max() < 1e-4  # nothing before the sound
        assert heard[100] == pytest.approx(1.0, abs=1e-3)
        early, late = (np.square(heard[s]).sum() for s in (slice(101, 2000), slice(14_000, None)))
        assert early > 0.005
        assert late < early / 2


def test_levels_in_a_mixture_lie_in_their_range(corpus, monkeypatch):
    monkeypatch.setattr(corpus.render, "in_room", lambda rng, wav: wav)
    ratios = []
    for seed in range(200):
        pair = [tone(1, 500), tone(1, 2000, level=0.01)]
        mixed = corpus.render.mixture(np.random.default_rng(seed), pair)
        spectrum = np.abs(np.fft.rfft(mixed))
        ratios.append(20 * np.log10(spectrum[2000] / spectrum[500]))
    assert -12.1 < min(ratios) < -10
    assert 4 < max(ratios) < 6.1


def test_loud_sounds_are_turned_down_and_not_clipped(corpus):
    read, rate = soundfile.read(io.BytesIO(corpus.render.encode_flac(tone(1, level=3.0))))
    assert rate == 16_000
    np.testing.assert_allclose(read * 3.0 / 0.98, tone(1, level=3.0), atol=2e-3)


# --- the whole, with small packages and without the tools -------------------------------------


@pytest.fixture
def small(corpus, tmp_path, monkeypatch):
    """Two packages, and stand-ins for fluidsynth and espeak-ng. Gives a function that makes it."""
    packages = (
        corpus.Package("tracks", "GPL-2", "music", r"\.wav$", held_out=("secret",)),
        corpus.Package("hydrogen-drumkits", "MIT", "percussion", r"/(\w+)/[^/]+\.wav$", True),
    )
    source = tmp_path / "unpacked"
    write(source / "tracks" / "first.wav", tone(23, 300))
    write(source / "tracks" / "secret.wav", tone(23, 400))
    for number in range(6):
        write(source / "hydrogen-drumkits/kits/one" / f"{number}.wav", tone(1, 100 * (number + 1)))
    (source / "hydrogen-drumkits/kits/one/6.wav").write_text("broken")
    (source / "fluid-soundfont-gm").mkdir()
    (source / "fluid-soundfont-gm" / "font.sf2").touch()
    (source / corpus.TEXTS).mkdir()
    for number in range(60):
        (source / corpus.TEXTS / f"{number}.txt").write_text(f"Thing {number}.")
    monkeypatch.setattr(corpus, "RECORDED", packages)
    monkeypatch.setattr(corpus, "unpack", lambda name, *_: source / name)
    monkeypatch.setattr(corpus.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(corpus.render, "voices", lambda: (["en-gb"], ["f1"]))
    monkeypatch.setattr(
        corpus.render, "say", lambda text, voice, speed, pitch: tone(0.5, 10 * len(text) + pitch)
    )
    monkeypatch.setattr(
        corpus.render,
        "music",
        lambda rng, kind, pieces, font: [tone(10, rng.uniform(100, 999)) for _ in range(pieces)],
    )
    hours = dict.fromkeys(corpus.RENDERED_HOURS, 120 / 3600)  # twelve pieces of each
    monkeypatch.setattr(corpus, "RENDERED_HOURS", hours)
    names = [*(p.name for p in packages), corpus.TEXTS]
    monkeypatch.setattr(corpus, "PACKAGES", sorted({*names, corpus.SOUND_FONT.name}))

    def make(output, *options):
        corpus.main([str(output), "--workers", "1", *options])
        files = sorted((output / "audio").rglob("*.flac"))
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}

    return make


def test_a_text_that_crashes_espeak_is_left_out(corpus, tmp_path, monkeypatch, caplog):
    """As some texts do in some voices: hy+Mario, seen with espeak-ng 1.51."""
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\ngrep -q crash && kill -SEGV $$\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert len(corpus.render.say("a crash", "hy+Mario", 184, 52)) == 0
    assert "hy+Mario" in caplog.text and "a crash" in caplog.text
    with pytest.raises(subprocess.CalledProcessError):  # any other failure is ours to mend
        corpus.render.say("a text", "no such voice", 184, 52)


def test_the_same_seed_makes_the_same_corpus(small, tmp_path):
    first, again = small(tmp_path / "a"), small(tmp_path / "b")
    assert first == again
    other = small(tmp_path / "c", "--seed", "1")
    assert other.keys() == first.keys()
    changed = {name.split("/")[1] for name in first if first[name] != other[name]}
    assert changed == {"percussion", "notes", "bands", "tts", "mixtures"}


def test_tables_say_where_every_piece_is_from(small, tmp_path, capsys):
    files = small(tmp_path / "a")
    with open(tmp_path / "a" / "files.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(f"audio/{row['file']}" for row in rows) == sorted(files)
    for row in rows:
        seconds = soundfile.info(tmp_path / "a" / "audio" / row["file"]).duration
        assert float(row["seconds"]) == pytest.approx(seconds, abs=1e-3)
    assert not [row for row in rows if "secret" in row["file"]]
    table = (tmp_path / "a" / "packages.md").read_text()
    assert "| tracks | GPL-2 | music | 3 | 0.01 |" in table
    assert "| espeak-ng | GPL-3+ | tts | 12 | 0.03 |" in table
    output = capsys.readouterr()
    assert table in output.out
    assert "Skipped kits/one/6.wav" in output.err


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(
    corpus, small, tmp_path, monkeypatch
):
    whole = small(tmp_path / "a")
    encode, left = corpus.render.encode_flac, [30]

    def dies(wav):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(wav)

    monkeypatch.setattr(corpus.render, "encode_flac", dies)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "b")
    assert not (tmp_path / "b" / "files.csv").exists()
    left[0] = 10**6
    assert small(tmp_path / "b") == whole
    assert 10**6 - left[0] < len(whole)  # what was done was not done again


def test_a_folder_has_one_seed(small, tmp_path):
    small(tmp_path / "a")
    with pytest.raises(SystemExit, match="was begun with --seed 0, not 1"):
        small(tmp_path / "a", "--seed", "1")


def test_more_hours_later_are_what_they_would_have_been_at_once(small, tmp_path):
    """Mixtures too, which are drawn from all the rest."""
    less = small(tmp_path / "a")
    more = small(tmp_path / "a", "--scale", "2")
    assert more == small(tmp_path / "b", "--scale", "2")
    changed = {name.split("/")[1] for name in less if less[name] != more[name]}
    assert len(more) > len(less) and changed == {"mixtures"}


def test_missing_tools_and_packages_are_named_with_the_fix(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="apt-get install fluidsynth espeak-ng"):
        corpus.main([str(tmp_path)])
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    with pytest.raises(
        SystemExit, match=r"no-such-package failed: .*\n.*put the package of Debian"
    ):
        corpus.fetch("no-such-package", tmp_path)
