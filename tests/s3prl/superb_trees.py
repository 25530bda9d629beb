"""Data sets of SUPERB in their layouts, some seconds of generated sounds, and short configs."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import soundfile
import yaml

RATE = 16_000
LETTERS = "ABCD"  # of the language that is spoken here: each is a tone
PITCH = dict(zip(LETTERS, (300, 800, 1_900, 4_200)))
LETTER_SECONDS = 0.12


def tone(frequency, seconds, rng, noise=0.01):
    time = np.arange(round(seconds * RATE)) / RATE
    wav = 0.3 * np.sin(2 * np.pi * frequency * (time + rng.uniform()))
    return wav + noise * rng.standard_normal(len(time))


def speak(text, rng, seconds=LETTER_SECONDS):
    """A tone for each letter, a pause for a space and between two letters."""
    parts = []
    for letter in text:
        pitch = PITCH.get(letter)
        part = np.zeros(round(seconds * RATE)) if pitch is None else tone(pitch, seconds, rng)
        parts += [part, np.zeros(round(0.25 * seconds * RATE))]
    wav = np.concatenate(parts)
    return wav + 0.003 * rng.standard_normal(len(wav))


def voice(speaker, rng, seconds=1.0):
    """A chord that is the speaker's own."""
    wav = sum(tone(f * (1 + speaker), seconds, rng) for f in (220, 330, 510))
    return 0.5 * wav


def write(path, wav):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav.astype(np.float32), RATE)


def write_yaml(path, runner, expert, lr=2e-3):
    """A config of run_downstream.py: few steps, evaluated and saved at the end."""
    steps = runner["total_steps"]
    runner = {
        "gradient_clipping": 1,
        "gradient_accumulate_steps": 1,
        "log_step": steps,
        "eval_step": steps,
        "save_step": steps,
        "max_keep": 2,
        "eval_dataloaders": ["dev"],
    } | runner
    optimizer = {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": lr}
    content = {"runner": runner, "optimizer": optimizer, "downstream_expert": expert}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def utterance_level(**datarc):
    return {
        "datarc": {"num_workers": 0, "train_batch_size": 8, "eval_batch_size": 4} | datarc,
        "modelrc": {
            "projector_dim": 32,
            "select": "UtteranceLevel",
            "UtteranceLevel": {"pooling": "MeanPooling"},
        },
    }


# --- each makes the data in `data` and the config in the clone `s3prl` ---------------------------


def keyword_spotting(data, s3prl, rng):
    frequencies = {"yes": 300, "no": 2_500}

    def speaker(wanted):
        """A name that s3prl's hash puts there: under 10 is validation, from 20 on training."""
        for number in range(10_000):
            name = f"{rng.integers(1 << 30):08x}"
            share = int(hashlib.sha1(name.encode()).hexdigest(), 16) % (1 << 27) * 100 / (1 << 27)
            if (share < 10) == (wanted == "valid") and not 10 <= share < 20:
                return f"{name}_nohash_{number}.wav"

    train, test = data / "speech_commands_v0.01", data / "speech_commands_test_set_v0.01"
    for word, frequency in frequencies.items():
        for part, clips in (("train", 8), ("valid", 3)):
            for _ in range(clips):
                wav = tone(frequency * rng.uniform(0.9, 1.1), 0.5, rng)
                write(train / word / speaker(part), wav)
        for number in range(4):
            write(test / word / f"{number}.wav", tone(frequency, 0.5, rng))
    for number in range(2):
        noise = 0.05 * rng.standard_normal(RATE + 8_000)
        write(train / "_background_noise_" / f"{number}.wav", noise)
        write(test / "_silence_" / f"{number}.wav", noise[:RATE])
    write_yaml(
        s3prl / "downstream/speech_commands/config.yaml",
        {"total_steps": 30},
        utterance_level(batch_size=8),
    )


def intent_classification(data, s3prl, rng):
    intents = {("on", "lamp"): 300, ("off", "lamp"): 1_500, ("on", "music"): 3_500}
    (data / "data").mkdir(parents=True)
    for part, clips in (("train", 8), ("valid", 2), ("test", 3)):
        lines = [",path,action,object,location"]
        for (action, what), frequency in intents.items():
            for number in range(clips):
                name = f"wavs/speakers/{part}/{action}_{what}_{number}.wav"
                write(data / name, tone(frequency, 0.6, rng))
                lines.append(f"{len(lines)},{name},{action},{what},none")
        (data / "data" / f"{part}_data.csv").write_text("\n".join(lines) + "\n")
    config = s3prl / "downstream/fluent_commands/config.yaml"
    write_yaml(config, {"total_steps": 30}, utterance_level())


def voxceleb(data, rng, speakers, clips):
    """dev/wav/<speaker>/<video>/<number>.wav, and the last speaker's files in test/wav."""
    names = []
    for speaker in range(speakers):
        for number in range(clips):
            name = f"id1000{speaker + 1}/video/{number:05d}.wav"
            wav = np.concatenate([voice(speaker, rng, 1.2), np.zeros(4_000), voice(speaker, rng)])
            write(data / "dev" / "wav" / name, wav)
            names.append((speaker, number, name))
    return names


def speaker_identification(data, s3prl, rng):
    clips = {1: range(4), 2: range(4, 6), 3: range(6, 8)}  # train, dev, test
    names = voxceleb(data, rng, 3, 8)
    (data / "test" / "wav").mkdir(parents=True)
    parts = {number: part for part, numbers in clips.items() for number in numbers}
    split = s3prl / "downstream/voxceleb1/veri_test_class.txt"
    split.write_text("".join(f"{parts[number]} {name}\n" for _, number, name in names))
    expert = utterance_level(meta_data=str(split), max_timestep=128_000)
    expert["datarc"]["train_batch_size"] = 4
    write_yaml(s3prl / "downstream/voxceleb1/config.yaml", {"total_steps": 40}, expert)


def speaker_verification(data, s3prl, rng):
    names = voxceleb(data, rng, 3, 4)
    for speaker, _, name in names:
        write(data / "test" / "wav" / name, voice(speaker, rng, 2.0))
    pairs = [
        f"{int(a == b)} {first} {second}\n"
        for index, (a, _, first) in enumerate(names)
        for b, _, second in names[index + 1 :]
    ]
    pair_file = s3prl / "downstream/sv_voxceleb1/pairs.txt"
    pair_file.write_text("".join(pairs))
    expert = {
        "datarc": {
            "vad_config": {"min_sec": 16_000},
            "train_meta_data": "unused",
            "dev_meta_data": str(pair_file),
            "test_meta_data": str(pair_file),
            "max_timestep": 128_000,
            "train_batch_size": 4,
            "eval_batch_size": 1,
            "num_workers": 0,
        },
        "modelrc": {
            "module": "XVector",
            "input_dim": 32,
            "agg_module": "SP",
            "utter_module": "UtteranceExtractor",
            "module_config": {"XVector": {"agg_dim": 32, "dropout_p": 0.0, "batch_norm": False}},
            "ObjectiveLoss": "SoftmaxLoss",
            "LossConfig": {"SoftmaxLoss": {"no_args": True}},
        },
    }
    config = s3prl / "downstream/sv_voxceleb1/config.yaml"
    write_yaml(config, {"total_steps": 20, "save_step": 10, "eval_dataloaders": []}, expert)


def librispeech(data, rng, parts, extension="flac"):
    """<part>/<speaker>/<chapter>/<utterance>.flac and its transcripts."""
    for part, utterances in parts.items():
        folder, lines = data / part / "19" / "198", []
        for number in range(utterances):
            words = ["".join(rng.choice(list(LETTERS), rng.integers(2, 4))) for _ in range(3)]
            name = f"19-198-{number:04d}"
            write(folder / f"{name}.{extension}", speak(" ".join(words), rng))
            lines.append(f"{name} {' '.join(words)}")
        (folder / "19-198.trans.txt").write_text("\n".join(lines) + "\n")


PARTS = {"train-clean-100": 16, "dev-clean": 3, "test-clean": 4}


def speech_recognition(data, s3prl, rng):
    librispeech(data, rng, PARTS)
    dictionary = s3prl / "downstream/asr/char.dict"
    dictionary.write_text("".join(f"{letter} 1\n" for letter in f"|{LETTERS}"))
    expert = {
        "datarc": {
            "train": ["train-clean-100"],
            "dev-clean": ["dev-clean"],
            "test-clean": ["test-clean"],
            "num_workers": 0,
            "batch_size": 8,
            "eval_batch_size": 2,
            "dict_path": str(dictionary),
            "zero_infinity": True,
            "decoder_args": {"decoder_type": "None"},
        },
        "modelrc": {
            "project_dim": 64,
            "select": "RNNs",
            "RNNs": {
                "total_rate": -1,
                "module": "LSTM",
                "bidirection": True,
                "dim": [64],
                "dropout": [0.0],
                "layer_norm": [False],
                "proj": [False],
                "sample_rate": [1],
                "sample_style": "concat",
            },
        },
    }
    runner = {"total_steps": 150, "eval_dataloaders": ["dev-clean"]}
    write_yaml(s3prl / "downstream/asr/config.yaml", runner, expert, lr=1e-2)


def diarization(data, s3prl, rng):
    """Two speakers who take turns; Kaldi's files."""
    for part, recordings in (("train", 6), ("dev", 2), ("test", 2)):
        folder = data / part
        tables = {name: [] for name in ("segments", "utt2spk", "wav.scp", "reco2dur", "spk2utt")}
        for number in range(recordings):
            name, start, wavs = f"rec{number}", 0.0, []
            for turn in range(4):
                speaker, seconds = turn % 2, rng.uniform(0.5, 1.2)
                wavs.append(voice(2 * speaker, rng, seconds))
                utterance = f"{name}_{turn}"
                end = start + len(wavs[-1]) / RATE
                tables["segments"].append(f"{utterance} {name} {start:.4f} {end:.4f}")
                tables["utt2spk"].append(f"{utterance} {name}_spk{speaker}")
                tables["spk2utt"].append(f"{name}_spk{speaker} {utterance}")
                start = end
            write(folder / f"{name}.wav", np.concatenate(wavs))
            tables["wav.scp"].append(f"{name} {folder / name}.wav")
            tables["reco2dur"].append(f"{name} {start:.4f}")
        for table, lines in tables.items():
            (folder / table).write_text("\n".join(lines) + "\n")
    expert = {
        "datarc": {
            "chunk_size": 2_000,
            "subsampling": 1,
            "label_delay": 0,
            "num_speakers": 2,
            "rate": RATE,
            "frame_shift": None,
        },
        "loaderrc": {"num_workers": 0, "train_batchsize": 2, "eval_batchsize": 1},
        "scorerc": {"save_predictions": True},
        "modelrc": {"rnn_layers": 1, "hidden_size": 32},
    }
    config = s3prl / "downstream/diarization/config.yaml"
    write_yaml(config, {"total_steps": 60}, expert, lr=1e-2)


# In the place of the database's own, which is Java: it prints in its format the share of queries
# whose best utterance is one that holds them.
SCORER = """\
import re, sys
from xml.etree import ElementTree
right = total = 0
truth = dict(line.split() for line in open(sys.argv[2] + "/truth.txt"))
for query in ElementTree.parse(sys.argv[1] + "/benchmark.stdlist.xml").getroot():
    best = max(query, key=lambda term: float(term.get("score")))
    right += best.get("file") == truth[query.get("termid")]
    total += 1
print(f"actTWV: 0.1  maxTWV: {right / total}  Threshold: 2.0188")
"""


def query_by_example(data, s3prl, rng):
    texts = ["ABAB", "CDCD", "ADAD", "BCBC", "ACAC", "BDBD"]
    scoring = data / "scoring"
    documents, lists = [], {"utterances": [], "dev": [], "eval": []}
    for number, text in enumerate(texts):
        name = f"quesst14_{number:05d}"
        write(data / "Audio" / f"{name}.wav", speak(f"{text} {text}", rng, 0.2))
        lists["utterances"].append(f"quesst14Database/Audio/{name}.wav nnenglish")
        documents.append(name)
    for split in ("dev", "eval"):
        truth = scoring / f"groundtruth_quesst14_{split}" / "truth.txt"
        truth.parent.mkdir(parents=True)
        lines = []
        for number, text in enumerate(texts[:4] if split == "dev" else texts[2:]):
            name = f"quesst14_{split}_{number:04d}"
            write(data / f"{split}_queries" / f"{name}.wav", speak(text, rng, 0.2))
            lists[split].append(f"quesst14Database/{split}_queries/{name}.wav nnenglish")
            lines.append(f"{name} {documents[texts.index(text)]}\n")
        truth.write_text("".join(lines))
    for name, lines in lists.items():
        (scoring / f"language_key_{name}.lst").write_text("\n".join(lines) + "\n")
    (scoring / "score.py").write_text(SCORER)
    (scoring / "score-TWV-Cnxe.sh").write_text(f'{sys.executable} score.py "$1" "$2"\n')
    config = {
        "runner": {},
        "downstream_expert": {
            "max_workers": 2,
            "feature_normalization": True,
            "silence_frame": None,
            "datarc": {"num_workers": 0, "batch_size": 1},
            "dtwrc": {
                "dist_method": "cosine_exp",
                "minmax_norm": True,
                "step_pattern": "asymmetric",
                "subsequence": True,
            },
        },
    }
    file = s3prl / "downstream/quesst14_dtw/config.yaml"
    file.write_text(yaml.safe_dump(config))


def stft_masks(data, config, first, conditions, runner, rng):
    """Kaldi's wav.scp of the mixtures and of what they are made of."""
    for part, clips in ((first, 4), ("dev", 2), ("test", 2)):
        tables = {condition: [] for condition in conditions}
        for number in range(clips):
            sources = [tone(rng.uniform(300, 700), 1.5, rng), tone(rng.uniform(2e3, 4e3), 1.5, rng)]
            if len(conditions) == 2:  # speech and noise
                # syllables: PESQ wants something that starts and stops
                rhythm = np.arange(len(sources[0])) // 3_200 % 2
                sources[0] = sources[0] * rhythm
                sources[1] = 0.03 * rng.standard_normal(len(sources[0]))
            for condition, wav in zip(conditions, [sum(sources), *sources]):
                path = data / "wav" / part / condition / f"{number}.wav"
                write(path, wav)
                tables[condition].append(f"{number} {path}\n")
        for condition, lines in tables.items():
            table = data / part / condition / "wav.scp"
            table.parent.mkdir(parents=True)
            table.write_text("".join(lines))
    single = len(conditions) == 2
    expert = {
        "datarc": {
            "num_speakers": 1 if single else 2,
            "rate": RATE,
            "src": [conditions[0]],
            "tgt": list(conditions[1:]),
            "n_fft": 512,
            "win_length": 512,
            "window": "hann",
            "center": True,
        },
        "loaderrc": {"num_workers": 0, "train_batchsize": 2, "eval_batchsize": 1},
        "modelrc": {
            "model": "SepRNN",
            "rnn": "LSTM",
            "rnn_layers": 1,
            "hidden_size": 64,
            "dropout": 0.0,
            "non_linear": "relu",
            "bidirectional": True,
            "loss_type": "MSE",
            "mask_type": "AM" if single else "NPSM",
            "log": "log1p",
        },
    }
    write_yaml(config, {"total_steps": 60} | runner, expert, lr=5e-3)


def enhancement(data, s3prl, rng):
    config = s3prl / "downstream/enhancement_stft/configs/cfg_voicebank.yaml"
    stft_masks(data, config, "train", ("noisy", "clean"), {}, rng)


def separation(data, s3prl, rng):
    config = s3prl / "downstream/separation_stft/configs/cfg.yaml"
    stft_masks(data, config, "train-100", ("mix_clean", "s1", "s2"), {}, rng)


# These want a clone: PyPI's packages lack downstream/ctc/corpus


def ctc(corpus, text, metric, higher_is_better, model="RNNs"):
    runner = {"total_steps": 150}
    expert = {
        "corpus": {"bucketing": True, "batch_size": 8, "num_workers": 0} | corpus,
        "text": text,
        "model": {
            "project_dim": 64,
            "zero_infinity": True,
            "select": model,
            "RNNs": {
                "total_rate": -1,
                "module": "LSTM",
                "bidirection": True,
                "dim": [64],
                "dropout": [0.0],
                "layer_norm": [False],
                "proj": [False],
                "sample_rate": [1],
                "sample_style": "concat",
            },
        },
        "save_best_on": ["dev"],
        "metric": metric,
        "metric_higher_better": higher_is_better,
    }
    return runner, expert


def phoneme_recognition(data, s3prl, rng):
    librispeech(data, rng, PARTS)
    phones = dict(zip(LETTERS, ("AA1", "B", "S", "IY1")))
    words = {
        word
        for file in data.rglob("*.trans.txt")
        for line in file.read_text().splitlines()
        for word in line.split()[1:]
    }
    lexicon = data / "lexicon.txt"
    lines = [f"{word}\t{' '.join(phones[letter] for letter in word)}\n" for word in sorted(words)]
    lexicon.write_text("".join(lines))
    corpus = {
        "name": "libriphone",
        "lexicon": [str(lexicon)],
        "train": ["train-clean-100"],
        "dev": ["dev-clean"],
        "test": ["test-clean"],
    }
    text = {"mode": "word", "vocab_file": str(s3prl / "downstream/ctc/vocab/phoneme.txt")}
    config = s3prl / "downstream/ctc/libriphone.yaml"
    write_yaml(config, *ctc(corpus, text, ["per"], False), lr=1e-2)


def slot_filling(data, s3prl, rng):
    """A word that stands for a city is in its slot, BOS and EOS around the sentence."""
    cities, others, lines = ("AB", "CD"), ("DA", "BC", "ACA"), []
    for part, clips in (("train", 24), ("valid", 3), ("test", 4)):
        for number in range(clips):
            words = [rng.choice(others), rng.choice(cities), rng.choice(others)]
            name = f"Ivy-snips-{part}-{number}"
            write(data / part / f"{name}.wav", speak(" ".join(words), rng, 0.18))
            lines.append(f"{name} BOS {' '.join(words)} EOS\tO O city O play")
    (data / "all.iob.snips.txt").write_text("\n".join(lines) + "\n")
    (data / "slots.txt").write_text("O\ncity")
    corpus = {"name": "snips", "train": ["train"], "dev": ["valid"], "test": ["test"]}
    corpus |= {f"{part}_speakers": ["Ivy"] for part in ("train", "valid", "test")}
    vocabulary = str(s3prl / "downstream/ctc/vocab/character.txt")
    text = {"mode": "character-slot", "vocab_file": vocabulary}
    config = s3prl / "downstream/ctc/snips.yaml"
    write_yaml(config, *ctc(corpus, text, ["slot_type_f1", "slot_value_cer"], True), lr=1e-2)


def common_voice(data, s3prl, rng):
    for part, clips in (("train", 16), ("dev", 3), ("test", 4)):
        lines = ["path\tsentence"]
        for number in range(clips):
            words = ["".join(rng.choice(list(LETTERS), rng.integers(2, 4))) for _ in range(3)]
            write(data / "clips" / f"{part}{number}.wav", speak(" ".join(words), rng))
            lines.append(f"{part}{number}.wav\t{' '.join(words)}")
        (data / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    vocabulary = str(s3prl / "downstream/ctc/vocab/character.txt")
    text = {"mode": "character", "vocab_file": vocabulary}
    config = s3prl / "downstream/ctc/cv_config/cv_es.yaml"
    write_yaml(config, *ctc({"name": "common_voice"}, text, ["wer"], False), lr=1e-2)


TREES = {
    "KS": keyword_spotting,
    "IC": intent_classification,
    "SID": speaker_identification,
    "ASV": speaker_verification,
    "ASR": speech_recognition,
    "SD": diarization,
    "QbE": query_by_example,
    "SE": enhancement,
    "SS": separation,
    "PR": phoneme_recognition,
    "SF": slot_filling,
    "OOD-ASR": common_voice,
}


def make_tree(task, data: Path, s3prl: Path):
    """Data of a task in `data`, its config in the package `s3prl`."""
    TREES[task](data, s3prl, np.random.default_rng(0))
    return data
