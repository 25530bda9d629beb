"""A small linear probe: what a few minutes of pretraining taught, in a few seconds.

Files are read and embedded once for all label sets; each label set is then probed with a
multinomial logistic regression on the frozen, standardised features.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.data.crops import UnreadableAudio
from speechbrain_jepa.evaluation.labelled import LabelledClips, read_labelled
from speechbrain_jepa.evaluation.linear_probe.logistic import regress, rotated
from speechbrain_jepa.evaluation.logmel import LOG_MEL, logmel_statistics
from speechbrain_jepa.features import N_FFT, SAMPLE_RATE

logger = logging.getLogger(__name__)

INVERSE_PENALTY = 16.0  # C of the regression on rows of unit mean square norm
MAX_ITERATIONS = 200
FILES_AT_ONCE = 64

Embed = Callable[[list[np.ndarray]], np.ndarray]


def read_label_sets(folder) -> dict[str, LabelledClips]:
    """Label sets from the `meta.csv` in a folder, or in each of its subfolders, or from a csv.

    See `labelled` for the csv. A column called label is named after the folder. Rows with an empty
    label are left out of that label set.

    Arguments
    ---------
    folder : str or Path
        Of one or more `meta.csv`, or a csv of any name.

    Returns
    -------
    dict of LabelledClips
        By name.

    Raises
    ------
    FileNotFoundError
        If there is no such file, nor a meta.csv in the folder or in any of its subfolders.
    ValueError
        If a csv does not fit (see `read_labelled`) or has folds in place of splits, or two label
        sets have one name.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "vowels"
    >>> folder.mkdir()
    >>> rows = "file,split,label\\n1.wav,train,a\\n2.wav,train,o\\n3.wav,test,a\\n"
    >>> _ = (folder / "meta.csv").write_text(rows)
    >>> read_label_sets(folder)["vowels"].labels
    ['a', 'o', 'a']
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
    label_sets: dict[str, LabelledClips] = {}
    for table in tables:
        for column, clips in read_labelled(table).items():
            name = table.parent.resolve().name if column == "label" else column
            if name in label_sets:
                raise ValueError(f"{table}: two label sets have one name, {name}")
            if clips.has_folds:
                raise ValueError(f"{table} has folds: this probe needs a split (train, test)")
            label_sets[name] = clips
    return label_sets


def _read(file: str | Path) -> np.ndarray:
    """A whole file [samples] that has at least one window."""
    wav = read_audio(file)
    if len(wav) < N_FFT:
        reason = f"{len(wav)} samples at {SAMPLE_RATE} Hz: fewer than one window, {N_FFT}"
        raise UnreadableAudio(str(file), reason)
    return wav.numpy()


def embed_files(
    files: Sequence[str | Path], embedders: Mapping[str, Sequence[Embed]]
) -> tuple[dict[str, list[np.ndarray]], list[str | Path]]:
    """Read every file once and embed it with every embedder.

    Arguments
    ---------
    files : sequence of str or Path
        Repetitions are embedded once. Files that cannot be read are skipped, each with a warning.
    embedders : dict of sequences of callables
        For each name one embedder per seed: `embed(list of n float32 arrays [samples] at 16 kHz)`
        gives an array [n, dims].

    Returns
    -------
    features : dict of lists of arrays [files read, dims], float32
    read : list of str or Path
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
    parts: dict[str, list[list[np.ndarray]]] = {
        name: [[] for _ in seeds] for name, seeds in embedders.items()
    }
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
    classes, targets = np.unique(train_y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"train has one class only, {classes}: a probe needs two or more")
    mean, deviation = train_x.mean(0), train_x.std(0)
    scale = np.where(deviation > 1e-8, deviation, np.inf) * np.sqrt(train_x.shape[1])
    train_x, test_x = (torch.from_numpy((x - mean) / scale).float() for x in (train_x, test_x))
    blocks, basis = rotated([(train_x, torch.from_numpy(targets))])
    weight, bias, _ = regress(blocks, len(classes), INVERSE_PENALTY, MAX_ITERATIONS)
    test_x = test_x if basis is None else test_x @ basis
    found = classes[(test_x @ weight.T + bias).argmax(1).numpy()]
    return float(np.mean(found == np.asarray(test_y)))


@dataclass(frozen=True)
class ProbeTable:
    """Accuracies and what they say.

    Arguments
    ---------
    accuracy : pandas.DataFrame
        In per cent. One row per features and seed (a two-level index), one column per label set.
    split : str
        Whose accuracy it is. Default "test".
    """

    accuracy: pd.DataFrame
    split: str = "test"

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
        title = f"Linear probe, {self.split} accuracy in %"
        if most > 1:
            title += f", mean ± deviation over {most} seeds"
        return f"{title}\n{table.to_string()}"


def probe_table(
    features: Mapping[str, Sequence[np.ndarray]],
    files: Sequence[str | Path],
    label_sets: dict[str, LabelledClips],
    split: str = "test",
) -> ProbeTable:
    """Probe every label set with every set of features.

    Arguments
    ---------
    features : dict of sequences of arrays [files, dims]
        One array per seed, as `embed_files` gives them.
    files : sequence of str or Path
        The files behind the rows. A label set's other files are left out.
    label_sets : dict of LabelledClips
        See `read_label_sets`.
    split : str
        Whose accuracy: "test", or "valid", by which recipes are chosen. Default "test".

    Returns
    -------
    ProbeTable

    Raises
    ------
    ValueError
        If the files read leave a label set without train rows or rows of `split`.

    Example
    -------
    >>> files = [f"{i}.wav" for i in range(6)]
    >>> splits = ["train"] * 4 + ["test"] * 2
    >>> task = LabelledClips(files, files, list("ababab"), splits, [None] * 6)
    >>> x = np.array([[0.0], [1.0]] * 3)
    >>> features = {"untrained": [x * 0, x * 0], "trained": [x, x]}
    >>> table = probe_table(features, files, {"parity": task})
    >>> print(table)
    Linear probe, test accuracy in %, mean ± deviation over 2 seeds
                    parity      average
    untrained   50.0 ± 0.0   50.0 ± 0.0
    trained    100.0 ± 0.0  100.0 ± 0.0
    """
    row_of = {str(file): row for row, file in enumerate(files)}
    accuracy = {}
    for task, clips in label_sets.items():
        rows: dict[str, list[int]] = {"train": [], split: []}
        labels: dict[str, list[str]] = {"train": [], split: []}
        for file, label, part in zip(clips.files, clips.labels, clips.splits):
            if part in rows and file in row_of:
                rows[part].append(row_of[file])
                labels[part].append(label)
        for part, found in rows.items():
            if not found:
                raise ValueError(f"label set {task}: no {part} file could be read")
        accuracy[task] = {
            (name, seed): 100
            * probe(x[rows["train"]], labels["train"], x[rows[split]], labels[split])
            for name, seeds in features.items()
            for seed, x in enumerate(seeds)
        }
    index = pd.MultiIndex.from_tuples(next(iter(accuracy.values())), names=["features", "seed"])
    return ProbeTable(pd.DataFrame(accuracy, index=index), split)


def files_used(
    label_sets: dict[str, LabelledClips], splits: Sequence[str] = ("train", "test")
) -> list[str]:
    """The files that `probe_table` needs: those of train and test."""
    pairs = (zip(clips.files, clips.splits) for clips in label_sets.values())
    return [file for rows in pairs for file, split in rows if split in splits]


def quick_probe(folder, embedders: Mapping[str, Sequence[Embed]]) -> ProbeTable:
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
    files = files_used(label_sets)
    features, read = embed_files(files, {LOG_MEL: [logmel_statistics], **embedders})
    return probe_table(features, read, label_sets)
