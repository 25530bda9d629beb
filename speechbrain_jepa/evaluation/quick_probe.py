"""A small linear probe: what a few minutes of pretraining taught, in a few seconds.

Files are read and embedded once for all label sets; each label set is then probed with a
multinomial logistic regression on the frozen, standardised features.
"""

import csv
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.data.crops import UnreadableAudio
from speechbrain_jepa.features import N_FFT, SAMPLE_RATE, LogMelSpectrogram

logger = logging.getLogger(__name__)

INVERSE_PENALTY = 16.0  # C of the regression on rows of unit mean square norm
MAX_ITERATIONS = 200
FILES_AT_ONCE = 64

Embed = Callable[[list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class LabelSet:
    """One classification task over audio files.

    Arguments
    ---------
    name : str
    files : list of Path
    labels : list of str
        None is empty.
    splits : list of str
        Each "train", "valid" or "test".
    """

    name: str
    files: list[Path]
    labels: list[str]
    splits: list[str]


def read_label_sets(folder) -> list[LabelSet]:
    """Label sets from the `meta.csv` in a folder, or in each of its subfolders, or from a csv.

    The csv has the columns file (relative to its folder), split (train, valid or test) and one
    column per label set. A column called label is named after the folder. Rows with an empty label
    are left out of that label set.

    Arguments
    ---------
    folder : str or Path
        Of one or more `meta.csv`, or a csv of any name.

    Returns
    -------
    list of LabelSet

    Raises
    ------
    FileNotFoundError
        If there is no such file, nor a meta.csv in the folder or in any of its subfolders.
    ValueError
        If a column is missing, a split has another name, or a label set has no train or test rows.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "vowels"
    >>> folder.mkdir()
    >>> rows = "file,split,label\\n1.wav,train,a\\n2.wav,train,o\\n3.wav,test,a\\n"
    >>> _ = (folder / "meta.csv").write_text(rows)
    >>> task = read_label_sets(folder)[0]
    >>> task.name, task.labels
    ('vowels', ['a', 'o', 'a'])
    """
    folder = Path(folder)
    tables = [folder if folder.is_file() else folder / "meta.csv"]
    if not tables[0].is_file():
        tables = sorted(folder.glob("*/meta.csv"))
    if not tables:
        raise FileNotFoundError(
            f"{folder}: no meta.csv here or in a subfolder; it lists the labelled files with the "
            "columns file, split and one per label set"
        )
    return [label_set for table in tables for label_set in _read_table(table)]


def _read_table(table: Path) -> list[LabelSet]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    names = [column for column in columns if column not in ("file", "split")]
    if not {"file", "split"} <= set(columns) or not names:
        raise ValueError(
            f"{table} has the columns {', '.join(columns)}: "
            "it needs file, split and at least one column of labels"
        )
    label_sets = []
    for name in names:
        labelled = [row for row in rows if row[name]]
        splits = [row["split"] for row in labelled]
        unknown = set(splits) - {"train", "valid", "test"}
        if unknown:
            raise ValueError(f"{table}: split {unknown.pop()!r} is none of train, valid, test")
        for split in ("train", "test"):
            if split not in splits:
                raise ValueError(f"{table}: no row of split {split} has a label in {name}")
        label_sets.append(
            LabelSet(
                name=table.parent.resolve().name if name == "label" else name,
                files=[table.parent / row["file"] for row in labelled],
                labels=[row[name] for row in labelled],
                splits=splits,
            )
        )
    return label_sets


def _read(file: Path) -> np.ndarray:
    """A whole file [samples] that has at least one window."""
    wav = read_audio(file)
    if len(wav) < N_FFT:
        reason = f"{len(wav)} samples at {SAMPLE_RATE} Hz: fewer than one window, {N_FFT}"
        raise UnreadableAudio(str(file), reason)
    return wav.numpy()


def embed_files(
    files: Sequence[Path], embedders: dict[str, Sequence[Embed]]
) -> tuple[dict[str, list[np.ndarray]], list[Path]]:
    """Read every file once and embed it with every embedder.

    Arguments
    ---------
    files : sequence of Path
        Repetitions are embedded once. Files that cannot be read are skipped, each with a warning.
    embedders : dict of sequences of callables
        For each name one embedder per seed: `embed(list of n float32 arrays [samples] at 16 kHz)`
        gives an array [n, dims].

    Returns
    -------
    features : dict of lists of arrays [files read, dims], float32
    read : list of Path
        The files behind the rows.

    Raises
    ------
    RuntimeError
        If no file can be read.

    Example
    -------
    >>> import soundfile
    >>> file = getfixture("tmp_path") / "noise.wav"
    >>> soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    >>> features, read = embed_files([file], {"log-mel": [logmel_statistics]})
    >>> features["log-mel"][0].shape
    (1, 160)
    """
    files = list(dict.fromkeys(files))
    parts = {name: [[] for _ in seeds] for name, seeds in embedders.items()}
    read = []
    for start in range(0, len(files), FILES_AT_ONCE):
        wavs = []
        for file in files[start : start + FILES_AT_ONCE]:
            try:
                wavs.append(_read(file))
                read.append(file)
            except UnreadableAudio as error:
                logger.warning("skipped %s", error)
        for name, seeds in embedders.items() if wavs else ():
            for embed, rows in zip(seeds, parts[name]):
                rows.append(np.asarray(embed(wavs), np.float32))
    if not read:
        raise RuntimeError(f"none of {len(files)} files could be read, the first is {files[:1]}")
    return {name: [np.concatenate(rows) for rows in seeds] for name, seeds in parts.items()}, read


@torch.inference_mode()
def logmel_statistics(
    wavs: Sequence[np.ndarray] | torch.Tensor, log_mel: LogMelSpectrogram | None = None
) -> np.ndarray:
    """Mean and deviation over time of each log-mel band: the baseline of any encoder.

    Arguments
    ---------
    wavs : sequence of arrays [samples], or Tensor [n, samples]
        At 16 kHz. Lengths may differ.
    log_mel : LogMelSpectrogram, or None
        Computes where it is. None: a new one, where the waveforms are.

    Returns
    -------
    array [n, 160], float32
        80 means, then 80 deviations.

    Example
    -------
    >>> logmel_statistics(torch.randn(2, 16_000)).shape
    (2, 160)
    """
    if log_mel is None:
        log_mel = LogMelSpectrogram().to(getattr(wavs, "device", "cpu"))
    device, rows = log_mel.window.device, []
    for wav in wavs:
        spectrogram = log_mel(torch.as_tensor(wav).to(device)[None])[0]
        rows.append(torch.cat([spectrogram.mean(1), spectrogram.std(1, correction=0)]))
    return torch.stack(rows).cpu().numpy()


def probe(train_x, train_y, test_x, test_y) -> float:
    """Test accuracy of a multinomial logistic regression on frozen features.

    Features are standardised on train and scaled by 1 / sqrt(dims), so that one penalty serves
    any width: with 160 dims it is C = 0.1 on standardised features. The optimum is unique, so
    there is no seed. Where there are more dims than rows, the rows are rotated into the space
    they span, which changes nothing but the time.

    Arguments
    ---------
    train_x, test_x : array [rows, dims]
    train_y, test_y : sequence of str or int

    Returns
    -------
    float
        From 0 to 1. A test label that train lacks counts as an error.

    Raises
    ------
    ValueError
        If a feature is not finite, or train has fewer than two classes.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(200) % 4
    >>> x = rng.normal(size=(200, 50)) + 6 * np.eye(4, 50)[y]
    >>> probe(x[:100], y[:100], x[100:], y[100:]) > 0.9
    True
    """
    train_x, test_x = np.asarray(train_x, np.float64), np.asarray(test_x, np.float64)
    for split, x in (("train", train_x), ("test", test_x)):
        bad = np.count_nonzero(~np.isfinite(x).all(axis=1))
        if bad:
            raise ValueError(f"{bad} of {len(x)} {split} embeddings are not finite")
    classes = np.unique(train_y)
    if len(classes) < 2:
        raise ValueError(f"train has one class only, {classes}: a probe needs two or more")
    mean, deviation = train_x.mean(0), train_x.std(0)
    scale = np.where(deviation > 1e-8, deviation, np.inf) * np.sqrt(train_x.shape[1])
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    if train_x.shape[1] > train_x.shape[0]:
        basis = np.linalg.qr(train_x.T)[0]
        train_x, test_x = train_x @ basis, test_x @ basis
    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(train_x.astype(np.float32), train_y)
    return float(regression.score(test_x.astype(np.float32), test_y))


@dataclass(frozen=True)
class ProbeTable:
    """Test accuracies and what they say.

    Arguments
    ---------
    accuracy : pandas.DataFrame
        In per cent. One row per features and seed (a two-level index), one column per label set.
    """

    accuracy: pd.DataFrame

    @property
    def with_average(self) -> pd.DataFrame:
        """`accuracy` with a last column, the average over the label sets."""
        return self.accuracy.assign(average=self.accuracy.mean(axis=1))

    def gain(self, features: str = "trained", over: str = "untrained") -> tuple[float, float]:
        """Gain in average accuracy, and the deviation between seeds, in points.

        The deviation is the larger of the two rows' sample deviations; a row with a single seed
        has none, and with a single seed in both it is NaN.
        """
        seeds = self.with_average["average"].groupby(level=0)
        mean, deviation = seeds.mean(), seeds.std()
        return mean[features] - mean[over], deviation[[features, over]].max()

    def verdict(self, features: str = "trained", over: str = "untrained") -> str:
        """`gain` as a sentence."""
        gain, deviation = self.gain(features, over)
        line = f"{features} over {over}: {gain:+.1f} points on average over the label sets"
        if np.isnan(deviation):
            return f"{line}; a single seed has no deviation to compare with"
        times = gain / max(deviation, 1e-9)
        return f"{line}, {times:.1f} times the deviation between seeds ({deviation:.1f})"

    def __str__(self) -> str:
        seeds = self.with_average.groupby(level=0, sort=False)
        mean, deviation, count = seeds.mean(), seeds.std(), seeds.size()
        cells = {
            column: [
                f"{m:.1f}" if np.isnan(d) else f"{m:.1f} ± {d:.1f}"
                for m, d in zip(mean[column], deviation[column])
            ]
            for column in mean
        }
        table = pd.DataFrame(cells, index=mean.index.rename(None))
        most = count.max()
        title = "Linear probe, test accuracy in %"
        if most > 1:
            title += f", mean ± deviation over {most} seeds"
        return f"{title}\n{table.to_string()}"


def probe_table(
    features: dict[str, Sequence[np.ndarray]], files: Sequence[Path], label_sets: list[LabelSet]
) -> ProbeTable:
    """Probe every label set with every set of features.

    Arguments
    ---------
    features : dict of sequences of arrays [files, dims]
        One array per seed, as `embed_files` gives them.
    files : sequence of Path
        The files behind the rows. A label set's other files are left out.
    label_sets : list of LabelSet

    Returns
    -------
    ProbeTable

    Raises
    ------
    ValueError
        If two label sets have one name, or the files read leave a label set without train or test
        rows.

    Example
    -------
    >>> files = [Path(f"{i}.wav") for i in range(6)]
    >>> task = LabelSet("parity", files, list("ababab"), ["train"] * 4 + ["test"] * 2)
    >>> x = np.array([[0.0], [1.0]] * 3)
    >>> table = probe_table({"untrained": [x * 0, x * 0], "trained": [x, x]}, files, [task])
    >>> print(table)
    Linear probe, test accuracy in %, mean ± deviation over 2 seeds
                    parity      average
    untrained   50.0 ± 0.0   50.0 ± 0.0
    trained    100.0 ± 0.0  100.0 ± 0.0
    """
    names = [label_set.name for label_set in label_sets]
    if len(set(names)) < len(names):
        raise ValueError(f"two label sets have one name: {', '.join(sorted(names))}")
    row_of = {file: row for row, file in enumerate(files)}
    accuracy = {}
    for label_set in label_sets:
        rows, labels = {"train": [], "test": []}, {"train": [], "test": []}
        for file, label, split in zip(label_set.files, label_set.labels, label_set.splits):
            if split in rows and file in row_of:
                rows[split].append(row_of[file])
                labels[split].append(label)
        for split, found in rows.items():
            if not found:
                raise ValueError(f"label set {label_set.name}: no {split} file could be read")
        accuracy[label_set.name] = {
            (name, seed): 100
            * probe(x[rows["train"]], labels["train"], x[rows["test"]], labels["test"])
            for name, seeds in features.items()
            for seed, x in enumerate(seeds)
        }
    index = pd.MultiIndex.from_tuples(next(iter(accuracy.values())), names=["features", "seed"])
    return ProbeTable(pd.DataFrame(accuracy, index=index))


def quick_probe(folder, embedders: dict[str, Sequence[Embed]]) -> ProbeTable:
    """Read a folder's label sets, embed their files once, and probe.

    Arguments
    ---------
    folder : str or Path
        See `read_label_sets`.
    embedders : dict of sequences of callables
        See `embed_files`. The log-mel statistics are added to them.

    Returns
    -------
    ProbeTable
    """
    label_sets = read_label_sets(folder)
    files = [
        file
        for task in label_sets
        for file, split in zip(task.files, task.splits)
        if split != "valid"
    ]
    features, read = embed_files(files, {"log-mel statistics": [logmel_statistics], **embedders})
    return probe_table(features, read, label_sets)
