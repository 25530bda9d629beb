"""Embeddings on the disk, as `embed` writes them: read again, with the encoder they are from."""

import csv
import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.files import write_text

FORMATS = (".npz", ".npy", ".csv", ".parquet")
SIDE_FILES = (".files.csv", ".skipped.csv")  # beside an output, and none themselves
ENCODER_OPTIONS = ("flat", "output_norm", "layers", "pooling", "normalization", "step_seconds")


@dataclass
class Embedded:
    """Clips and their embeddings.

    Arguments
    ---------
    path : Path
        The file they were read from.
    files : list of str
        Names as they were given to `embed`.
    vectors : array [n, C], float32
        One a clip; of time steps, their mean.
    settings : dict
        How they were made (`write_settings`); empty where that is not known.
    """

    path: Path
    files: list[str]
    vectors: np.ndarray
    settings: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def paths(self, root: str | os.PathLike | None = None) -> list[str]:
        """Where the files are, absolute.

        Arguments
        ---------
        root : str, Path or None
            The folder that relative names start from. Default None: the one in which `embed` ran,
            where that is known, else the current one.
        """
        start = os.path.abspath(root or self.settings.get("folder") or "")
        return [os.path.normpath(os.path.join(start, file)) for file in self.files]

    def load_encoder(self, source=None) -> AudioJEPA:
        """The encoder that made the embeddings, with the same options.

        Arguments
        ---------
        source : str, Path or None
            See `AudioJEPA`. Default None: what `embed` was given.

        Raises
        ------
        ValueError
            If the source is not known, or is another encoder now.
        """
        source = source or self.settings.get("source")
        if source is None:
            raise ValueError(
                f"{settings_path(self.path)} does not say which encoder made {self.path}: "
                "name it with --encoder"
            )
        options = {name: self.settings[name] for name in ENCODER_OPTIONS if name in self.settings}
        if self.settings.get("level") == "frame":
            options["pooling"] = "mean"  # as `read_embedded` pools them
        model = AudioJEPA(source, **options)
        if model.normalize == "dataset":
            model.normalization.set(self.settings["mean"], self.settings["std"])
        made_by, found = self.settings.get("encoder"), fingerprint(model)
        if made_by not in (None, found):
            raise ValueError(
                f"{self.path} was made by an encoder with the fingerprint {made_by}, {source} has "
                f"{found}: name the right one with --encoder, or embed the files again"
            )
        if model.embedding_dim != self.vectors.shape[1]:
            raise ValueError(
                f"{self.path} has {self.vectors.shape[1]} dims, {source} gives "
                f"{model.embedding_dim}: name the right encoder with --encoder"
            )
        return model


def fingerprint(model: AudioJEPA) -> str:
    """Of the encoder's parameters."""
    digest = hashlib.sha256()
    for name, tensor in model.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def settings_path(path: str | os.PathLike) -> Path:
    """The file beside an output of `embed` that says how it was made."""
    return Path(path).with_suffix(".settings.json")


def write_settings(out: Path, plan: dict, model: AudioJEPA) -> None:
    """Note how embeddings are made, so that a query can be embedded in the same way.

    Arguments
    ---------
    out : Path
        The output file.
    plan : dict
        Options of `embed_files`, the encoder's fingerprint, and its source or None.
    model : AudioJEPA
    """
    source = plan["source"]
    if source is not None and os.path.exists(source):
        source = os.path.abspath(source)
    pair = {name: getattr(model.normalization, name).item() for name in ("mean", "std")}
    settings = {**plan, "source": source, **pair, "folder": os.getcwd()}
    write_text(settings_path(out), json.dumps(settings, indent=1))


def read_embedded(path: str | os.PathLike) -> Embedded:
    """Read what `embed` wrote.

    Arguments
    ---------
    path : str or Path
        Its output file, or a folder that holds one.

    Returns
    -------
    Embedded
        Time steps are averaged over each clip.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or none in the folder.
    ValueError
        If the folder holds several, the file is not `embed`'s, or an embedding is not finite.

    Example
    -------
    >>> path = getfixture("tmp_path") / "emb.npz"
    >>> np.savez(path, files=np.array(["a.wav", "b.wav"]), embeddings=np.eye(2, dtype="f4"))
    >>> embedded = read_embedded(path.parent)
    >>> embedded.files, embedded.vectors.shape
    (['a.wav', 'b.wav'], (2, 2))
    """
    path = _find(Path(path))
    read = {".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv, ".parquet": _read_parquet}[
        path.suffix
    ]
    try:
        files, counts, rows = read(path)
        if not files or int(np.sum(counts)) != len(rows) or rows.ndim != 2:
            raise ValueError(f"{len(files)} files, embeddings of shape {rows.shape}")
    except (KeyError, IndexError, StopIteration, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an output of speechbrain_jepa.embed: {error}") from error
    vectors = np.ascontiguousarray(_means(rows, counts), np.float32)
    for first in range(0, len(vectors), 4096):
        finite = np.isfinite(vectors[first : first + 4096]).all(1)
        if not finite.all():
            raise ValueError(
                f"{path}: the embedding of {files[first + int(finite.argmin())]} is not finite"
            )
    settings = settings_path(path)
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    return Embedded(path, files, vectors, known)


def _find(path: Path) -> Path:
    """The one output of `embed` that a name stands for."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of embeddings")
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: embeddings end in {', '.join(FORMATS)}")
        return path
    found = sorted(file for file in path.iterdir() if _is_output(file))
    if not found:
        raise FileNotFoundError(
            f"{path}: no embeddings here. Make them: python -m speechbrain_jepa.embed ENCODER "
            f"AUDIO --out {path / 'emb.npz'}"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several embeddings, {names}: name one of the files")
    return found[0]


def _is_output(file: Path) -> bool:
    if file.suffix == ".npy":
        return file.with_suffix(".files.csv").exists()
    if file.suffix == ".csv" and not file.name.endswith(SIDE_FILES):
        with _open(file) as lines:
            return lines.readline().startswith(("file,0", "file,seconds,0"))
    return file.suffix in (".npz", ".parquet")


def _open(path: Path):
    return open(path, newline="", encoding="utf-8", errors="surrogateescape")


def _read_npz(path: Path):
    with np.load(path) as arrays:
        files = arrays["files"].tolist()
        counts = arrays["rows"] if "rows" in arrays else np.ones(len(files), np.int64)
        return files, counts, arrays["embeddings"]


def _read_npy(path: Path):
    index = path.with_suffix(".files.csv")
    if not index.exists():
        raise ValueError(f"{index.name} is not there")
    with _open(index) as lines:
        rows = [(row["file"], int(row["rows"])) for row in csv.DictReader(lines)]
    files, counts = (list(column) for column in zip(*rows))
    return files, np.array(counts), np.load(path, mmap_mode="r")


def _read_parquet(path: Path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: in a clone, pip install '.[parquet]'") from error
    files: list[str] = []
    counts: list[int] = []
    vectors = []
    with parquet.ParquetFile(path) as table:
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, ["file", "embedding"])
            for name in rows["file"].cast(pyarrow.binary()).to_pylist():
                file = os.fsdecode(name)
                if files and files[-1] == file:
                    counts[-1] += 1
                else:
                    files.append(file)
                    counts.append(1)
            column = rows["embedding"].combine_chunks()
            vectors.append(column.flatten().to_numpy().reshape(len(column), -1))
    return files, np.array(counts), np.concatenate(vectors)


def _read_csv(path: Path):
    files: list[str] = []
    counts: list[int] = []
    vectors = []
    with _open(path) as lines:
        table = csv.reader(lines)
        header = next(table)
        if header[:1] != ["file"]:
            raise ValueError(f"its first column is {header[:1]}")
        first = 2 if header[1] == "seconds" else 1
        for row in table:
            if files and files[-1] == row[0]:
                counts[-1] += 1
            else:
                files.append(row[0])
                counts.append(1)
            vectors.append(np.array(row[first:], np.float32))
    return files, np.array(counts), np.stack(vectors)


def _means(rows: np.ndarray, counts) -> np.ndarray:
    """Of each clip's rows."""
    if len(counts) == len(rows):
        return rows
    ends = np.cumsum(counts)
    return np.stack([rows[end - n : end].mean(0, dtype=np.float64) for end, n in zip(ends, counts)])
