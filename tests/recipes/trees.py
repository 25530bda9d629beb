"""The data sets in small: the same folders, file names, formats and metadata files.

Each function writes a tree and tells what is in it. Sounds are noisy tones, one pitch for each
label, so that a probe has something to find. Metadata columns are those of the data sets; lengths
are shorter unless `seconds` says otherwise.
"""

import csv
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import soundfile


@dataclass
class Tree:
    """A data folder and the truth about it: (wav, label, split, fold) of each clip."""

    folder: Path
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    options: dict = field(default_factory=dict)  # that prepare needs
    multilabel: bool = False

    def add(self, wav, label, split="", fold="", kind=0, **sound):
        """Write a clip; `kind` decides its pitch."""
        write_sound(self.folder / wav, kind, seed=len(self.rows), **sound)
        self.rows.append((wav, label, split, fold))

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(split for _, _, split, _ in self.rows))


def write_sound(path, kind=0, seconds=0.3, rate=16_000, channels=1, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal((len(time), channels))
    tone = np.sin(2 * np.pi * 200 * 2 ** (kind / 3) * time + seed)
    content = BytesIO()  # soundfile's own files are synced to the disk one by one
    options = {"format": path.suffix[1:], **options}
    soundfile.write(content, 0.3 * tone[:, None] + 0.03 * noise, rate, **options)
    path.write_bytes(content.getvalue())


def write_rows(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def link_all(folder, wavs, **sound):
    """Thousands of clips in no time: one sound under many names."""
    write_sound(folder / wavs[0], **sound)
    for parent in {(folder / wav).parent for wav in wavs}:
        parent.mkdir(parents=True, exist_ok=True)
    for wav in wavs[1:]:
        os.link(folder / wavs[0], folder / wav)


def esc50(folder, clips=2, **sound) -> Tree:
    """`clips` of each of 4 sounds in each of 5 folds; a recording gives takes A, B, ..."""
    tree, table = Tree(folder), []
    categories = {"dog": 0, "rain": 10, "church_bells": 46, "hand_saw": 49}
    for fold, (kind, (category, target)) in product("12345", enumerate(categories.items())):
        source = 100_000 + 1000 * int(fold) + target
        for take in "ABCDEFGH"[:clips]:
            name = f"{fold}-{source}-{take}-{target}.wav"
            tree.add(f"audio/{name}", category, "", fold, kind, **{"rate": 44_100, **sound})
            table.append((name, fold, target, category, target == 0, source, take))
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    write_rows(folder / "meta/esc50.csv", header, table)
    return tree


def urbansound8k(folder, clips=2, **sound) -> Tree:
    """`clips` slices of one recording of each of 3 sounds in each of 10 folds; formats vary."""
    tree, table = Tree(folder), []
    classes = {"car_horn": 1, "dog_bark": 3, "siren": 8}
    formats = (
        {"rate": 44_100, "channels": 2, "subtype": "PCM_24"},
        {"rate": 48_000, "channels": 2},
        {"rate": 96_000, "channels": 1, "subtype": "FLOAT"},
        {"rate": 8_000, "channels": 1, "subtype": "MS_ADPCM"},
    )
    for fold, (kind, (name, number)) in product(range(1, 11), enumerate(classes.items())):
        recording = 1000 * fold + number
        for part in range(clips):
            file = f"{recording}-{number}-0-{part}.wav"
            style = {**formats[(fold + kind) % len(formats)], **sound}
            tree.add(f"audio/fold{fold}/{file}", name, "", str(fold), kind, **style)
            table.append((file, recording, part / 2, part / 2 + 4, 1, fold, number, name))
    columns = ("slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class")
    write_rows(folder / "metadata/UrbanSound8K.csv", columns, table)
    return tree


def speech_commands(folder, speakers=7, **sound) -> Tree:
    """4 words by `speakers` speakers, of which 0 and 1 are for validation, 2 and 3 for testing."""
    tree, lists = Tree(folder), {"valid": [], "test": []}
    for speaker in range(speakers):
        split = ("valid", "valid", "test", "test")[speaker] if speaker < 4 else "train"
        for kind, word in enumerate(("bed", "forward", "yes", "zero")):
            for take in range(1 + speaker % 2):
                wav = f"{word}/{speaker:08x}_nohash_{take}.wav"
                tree.add(wav, word, split, "", kind, **sound)
                if split in lists:
                    lists[split].append(wav)
    for split, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        (folder / name).write_text("\n".join(lists[split]) + "\n")
    for name in ("_background_noise_/white_noise.wav", "_background_noise_/doing_the_dishes.wav"):
        write_sound(folder / name, seconds=1)
    for name in ("README.md", "LICENSE", "_background_noise_/README.md"):
        (folder / name).write_text("text\n")
    return tree


def voxceleb1(folder, dev="wav", test="wav", **sound) -> Tree:
    """4 speakers, each with 4 videos of 2 utterances; `dev` and `test` hold the speakers' folders
    of the two archives."""
    tree, lines = Tree(folder), []
    for kind, speaker in enumerate(("id10001", "id10002", "id10270", "id10309")):
        archive = test if "id10270" <= speaker <= "id10309" else dev  # its 40 test speakers
        for number, split in enumerate(("1", "1", "2", "3")):
            for utterance in (1, 2):
                path = f"{speaker}/{'v-_'[number % 3]}ideo{kind}{number}/{utterance:05d}.wav"
                name = {"1": "train", "2": "valid", "3": "test"}[split]
                tree.add(f"{archive}/{path}", speaker, name, "", kind, **sound)
                lines.append(f"{split} {path}")
    (folder / "iden_split.txt").write_text("\n".join(lines) + "\n")
    return tree


EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")


def cremad(folder, **sound) -> Tree:
    """7 speakers, 2 of the 12 sentences, all emotions."""
    tree = Tree(folder)
    speakers = {"train": (1002, 1003, 1091), "valid": (1009, 1082), "test": (1001, 1083)}
    for split, numbers in speakers.items():
        for speaker, (kind, emotion) in product(numbers, enumerate(EMOTIONS)):
            level = "XX" if emotion == "NEU" else "HI"  # of one sentence; the others have none
            for take in (f"DFA_{emotion}_XX", f"IEO_{emotion}_{level}"):
                wav = f"AudioWAV/{speaker}_{take}.wav"
                tree.add(wav, emotion, split, "", kind, **sound)
    (folder / "SentenceFilenames.csv").write_text("text\n")
    return tree


def gtzan(folder, genres="genres", suffix=".wav", **sound) -> Tree:
    """All 1000 names of one short sound for each genre; the lists say which are used."""
    from torchaudio.datasets import gtzan as lists

    tree = Tree(folder)
    split_of = {
        name: split
        for split in ("train", "valid", "test")
        for name in getattr(lists, f"filtered_{split}")
    }
    for kind, genre in enumerate(lists.gtzan_genres):
        names = [f"{genre}.{number:05d}" for number in range(100)]
        wavs = [f"{genres}/{genre}/{name}{suffix}" for name in names]
        link_all(folder, wavs, **{"kind": kind, "rate": 22_050, **sound})
        tree.rows += [
            (wav, genre, split_of[name], "") for name, wav in zip(names, wavs) if name in split_of
        ]
    return tree


def nsynth(folder, **sound) -> Tree:
    """2 notes of each of a few instruments; those of the training split are in no other."""
    tree = Tree(folder)
    instruments = {
        "train": ("bass_synthetic_033", "guitar_acoustic_010", "synth_lead_synthetic_000"),
        "valid": ("bass_synthetic_134", "guitar_acoustic_014"),
        "test": ("bass_synthetic_134", "guitar_acoustic_014"),
    }
    families = ["bass", "guitar", "synth_lead"]
    for split, names in instruments.items():
        notes = {}
        for name, (pitch, velocity) in product(names, ((22, 50), (90, 127))):
            family = name.rsplit("_", 2)[0]
            pitch += split == "test"
            note = f"{name}-{pitch:03d}-{velocity:03d}"
            wav = f"nsynth-{split}/audio/{note}.wav"
            tree.add(wav, family, split, "", families.index(family), **sound)
            notes[note] = {
                **{"note_str": note, "instrument_str": name, "pitch": pitch},
                **{"velocity": velocity, "sample_rate": 16_000, "qualities_str": ["dark"]},
                **{"instrument_family_str": family, "instrument_family": families.index(family)},
            }
        (folder / f"nsynth-{split}/examples.json").write_text(json.dumps(notes))
    return tree


def surge(folder, presets=12, pitches=(21, 60, 108), **sound) -> Tree:
    """`presets` folders; a csv outside of them divides them."""
    tree = Tree(folder, options={"split_csv": folder.with_name("surge_splits.csv")})
    splits = {}
    for number in range(presets):
        preset = f"surge-patches-factory-Basses-Bass-{number}-velocity64"
        splits[preset] = {0: "valid", 1: "test"}.get(number % 6, "train")
        for kind, pitch in enumerate(pitches):
            style = {"rate": 44_100, "subtype": "VORBIS", **sound}
            tree.add(f"{preset}/{pitch}.ogg", str(pitch), splits[preset], "", 3 * kind, **style)
    write_rows(tree.options["split_csv"], ("preset", "split"), splits.items())
    return tree


def custom(folder, multilabel=False, folds=False, **sound) -> Tree:
    """A table beside the audio; formats vary."""
    table = folder / "meta.csv"
    tree = Tree(folder, options={"csv": table, "multilabel": multilabel}, multilabel=multilabel)
    splits = ("train", "train", "train", "valid", "test")
    for (part, split), (kind, label) in product(enumerate(splits), enumerate(("low", "high"))):
        label = {"low": "low", "high": "high;bright"}[label] if multilabel else label
        place = ("", str(part)) if folds else (split, "")
        wav = f"deep/{part} {kind}{('.wav', '.flac', '.ogg')[part % 3]}"
        tree.add(wav, label, *place, kind=3 * kind, **sound)
    header = ("file", "label", "fold" if folds else "split")
    rows = [(wav, label, fold if folds else split) for wav, label, split, fold in tree.rows]
    write_rows(table, header, rows)
    return tree


def audioset20k(folder, **sound) -> Tree:
    """8 segments of each part, named as download scripts do, each with one or two of 3 labels."""
    tree = Tree(folder, multilabel=True)
    names = {"/m/09x0r": "Speech", "/m/0bt9lr": "Dog", "/t/dd00004": "Male speech, man speaking"}
    parts = (("train", "balanced_train_segments", ".flac"), ("test", "eval_segments", ".wav"))
    for split, part, suffix in parts:
        lines = ["# Segments csv", "# num_ytids=8", "# YTID, start_seconds, end_seconds, labels"]
        for number in range(8):
            video = f"-{split[:2]}_{number:07d}"
            mids = list(names)[: 1 + number % 2] if number % 3 else list(names)[2:]
            stem = (
                *(video, f"Y{video}", f"{video}_30", f"{video}_30.000"),
                *(f"{video}_30000", f"{video}_30_40", f"Y{video}_30.000_40.000"),
                f"{video}_30000_40000",
            )[number]
            label = ";".join(names[mid] for mid in mids)
            tree.add(f"{part}/{stem}{suffix}", label, split, "", 3 * (number % 2), **sound)
            lines.append(f'{video}, 30.000, 40.000, "{",".join(mids)}"')
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")
    rows = [(number, *pair) for number, pair in enumerate(names.items())]
    write_rows(folder / "class_labels_indices.csv", ("index", "mid", "display_name"), rows)
    return tree


def events(folder) -> Tree:
    """10 clips of 2 s of noise, with two bursts of a low or a high tone in most of them."""
    tree, rows = Tree(folder), []
    splits = [*["train"] * 6, *["valid"] * 2, *["test"] * 2]
    for number, split in enumerate(splits):
        wav = 0.01 * np.random.default_rng(number).standard_normal(32_000)
        name = f"audio/{number}.wav"
        for label, onset, offset, frequency in (
            ("low", 0.2 + 0.05 * number, 0.6 + 0.05 * number, 300),
            ("high", 1.0, 1.6, 2500),
        )[: 2 if number else 0]:
            time = np.arange(round(onset * 16_000), round(offset * 16_000))
            wav[time] += 0.3 * np.sin(2 * np.pi * frequency / 16_000 * time)
            rows.append((name, onset, offset, label, split))
        if not number:
            rows.append((name, "", "", "", split))
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, wav, 16_000)
        tree.rows.append((name, "", split, ""))
    write_rows(folder / "events.csv", ("file", "onset", "offset", "label", "split"), rows)
    return tree


TREES = {
    function.__name__: function
    for function in (
        *(esc50, urbansound8k, speech_commands, voxceleb1, cremad, gtzan, nsynth, surge),
        audioset20k,
        custom,
    )
}
