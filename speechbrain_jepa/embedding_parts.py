"""Embeddings on their way to one output file: what they depend on, parts on the disk, formats.

```
<out>.parts/            held by one process (files.folder_lock)
  plan.json             what the embeddings depend on
  normalization.json    mean and deviation of the files' log-mel, if they were measured
  part-000000.npz ...   embeddings of some files each
  complete.json         size and time of the output, written before it takes its place
  share-00003-of-00016/ of a run in shares, each held by its process: plan.json, parts, and
    skipped.csv         the share's files that could not be read
    complete.json       what the share has, and where its time went; written last
```
"""

import functools
import hashlib
import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from speechbrain_jepa.data.clips import ClipBatch
from speechbrain_jepa.data.skipped import csv_line
from speechbrain_jepa.embedded import fingerprint
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.files import whole_file, write_text

LEVELS = ("clip", "frame")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PART_BYTES = 64e6  # a part is put on the disk when it has grown to this size
PART_SECONDS = 60.0  # or after so long: an interruption loses no more than this
PARTS = "part-*.npz"
MAPPED_PARTS = 1024  # at once, when the output is written

Rows = tuple[str, np.ndarray]  # a file and its embeddings [rows, C]


def embedding_plan(model: AudioJEPA, level: str, precision: str) -> dict:
    """What embeddings depend on, beside the files.

    Raises
    ------
    ValueError
        If an option does not fit.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: choose one of {', '.join(LEVELS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    if model.output_all_hiddens:
        raise ValueError(
            "embed_files writes one vector: load AudioJEPA with layers, not output_all_hiddens"
        )
    return {
        "level": level,
        "precision": precision,
        "flat": model.flat,
        "output_norm": model.output_norm,
        "layers": model.embed_layers if level == "clip" else model.step_layers,
        "pooling": model.read_out.pooling if level == "clip" else None,
        "normalization": model.normalize,
        "step_seconds": model.step_seconds,
        "encoder": fingerprint(model),
    }


def embed_batch(model: AudioJEPA, batch: ClipBatch, level: str, precision: str) -> list[Rows]:
    """Each file of a batch with its embeddings [rows, C], float32 on the CPU."""
    device, dtype = next(model.parameters()).device, PRECISIONS[precision]
    wav = batch.wav.to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        if level == "clip":
            rows = list(model.embed(wav, batch.wav_lens)[:, None].float().cpu().numpy())
        else:
            steps = model.num_steps((batch.wav_lens * wav.shape[1]).round().long())
            frames = model(wav, batch.wav_lens).float().cpu().numpy()
            rows = [clip[:count].copy() for clip, count in zip(frames, steps, strict=True)]
    return list(zip(batch.files, rows, strict=True))


def write_part(part: Path, pairs: Sequence[Rows]) -> None:
    """Put embeddings of some files on the disk."""
    files, rows = zip(*pairs, strict=True)
    arrays: dict[str, Any] = {
        "files": np.array(files),
        "rows": np.array([len(array) for array in rows]),
        "width": np.array(rows[0].shape[1]),
        "embeddings": np.concatenate(rows),
    }
    with whole_file(part) as partial:
        np.savez(partial, **arrays)


def part_of(files: Sequence[bytes]) -> str:
    """Name of a part that follows from its files: written again, it takes its own place.

    Example
    -------
    >>> part_of([b"a.wav", b"b.wav"]) == part_of([b"a.wav", b"b.wav"]) != part_of([b"a.wavb.wav"])
    True
    """
    return f"part-{hashlib.sha256(bytes([0]).join(files)).hexdigest()[:24]}.npz"


@functools.lru_cache(MAPPED_PARTS)
def _mapped(part: Path) -> np.ndarray:
    """The embeddings of a part, memory-mapped: with many shares, files come from all in turn."""
    with zipfile.ZipFile(part) as archive:
        place = archive.getinfo("embeddings.npy").header_offset
        with archive.open("embeddings.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
    with open(part, "rb") as file:
        file.seek(place + 26)  # of a zip member's own header: lengths of its name and of the rest
        name, extra = struct.unpack("<HH", file.read(4))
    return np.memmap(part, dtype, "r", place + 30 + name + extra + header, shape)


class Embeddings:
    """Embeddings of files on their way to one output file, in parts that survive an interruption.

    Arguments
    ---------
    out : Path
        Output file, with one of the endings of `embedded.FORMATS`.
    parts : Path
        Folder of the parts, which this process holds.
    plan : dict
        What the embeddings depend on. Parts of another plan are not continued.
    shares : sequence of Path
        Folders of shares, whose parts are taken in. Default: none.
    """

    def __init__(self, out: Path, parts: Path, plan: dict, shares: Sequence[Path] = ()):
        self.out, self.parts = out, parts
        self.place: dict[str, tuple[Path, int, int]] = {}  # file: part, first row, rows
        self.width = 0
        for folder in (parts, *shares):
            self._check_plan(folder, plan)
            self.take_in(folder)
        self._forget_pending()

    def take_in(self, folder: Path) -> None:
        """Enter the parts in a folder; a file that is in two counts once."""
        for part in sorted(folder.glob(PARTS)):
            self._enter(part)

    def _check_plan(self, folder: Path, plan: dict) -> None:
        path = folder / "plan.json"
        if not path.exists():
            write_text(path, json.dumps(plan))
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in plan if plan[name] != begun.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{folder} was begun with {name}={begun.get(name)}, not {plan[name]}: "
                "repeat the options of that run, or remove the folder"
            )

    @property
    def is_complete(self) -> bool:
        """Whether the output was written from these parts, and only removing them is left."""
        marker = self.parts / "complete.json"
        return marker.exists() and self.out.exists() and _state(self.out) == marker.read_text()

    def _enter(self, part: Path) -> None:
        with np.load(part) as arrays:
            ends = arrays["rows"].cumsum()
            for file, end, rows in zip(arrays["files"], ends, arrays["rows"], strict=True):
                self.place[str(file)] = (part, int(end - rows), int(rows))
            self.width = int(arrays["width"])

    def add(self, file: str, rows: np.ndarray) -> None:
        """Embeddings [rows, C] of one file."""
        self.pending.append((file, rows))
        self.pending_bytes += rows.nbytes
        if self.pending_bytes > PART_BYTES or time.monotonic() - self.flushed > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put what was added on the disk."""
        if not self.pending:
            return
        part = self.parts / f"part-{len(list(self.parts.glob(PARTS))):06d}.npz"
        write_part(part, self.pending)
        self._enter(part)
        self._forget_pending()

    def _forget_pending(self) -> None:
        self.pending: list[Rows] = []
        self.pending_bytes = 0
        self.flushed = time.monotonic()

    @contextmanager
    def kept_on_error(self):
        """Put what was added on the disk before an exception goes on."""
        try:
            yield
        except BaseException:
            self.flush()
            raise

    def rows_of(self, files: list[str]) -> Iterator[Rows]:
        """Each file with its embeddings [rows, C], which are read when they are used."""
        for file in files:
            part, first, rows = self.place[file]
            yield file, _mapped(part)[first : first + rows]

    def finish(self, files: list[str], times: Callable[[int], np.ndarray] | None) -> list[str]:
        """Write the output file and remove the parts.

        Arguments
        ---------
        files : list of str
            The order of the output; those without embeddings are left out.
        times : callable
            For frame level: the timestamps of so many time steps.

        Returns
        -------
        list of str
            The files in it.
        """
        self.flush()
        files = [file for file in files if file in self.place]
        if not files:
            raise ValueError("none of the files could be embedded: see the list of skipped files")
        write = {
            ".npz": self._write_npz,
            ".npy": self._write_npy,
            ".csv": self._write_csv,
            ".parquet": self._write_parquet,
        }
        whole = self.parts / f"whole{self.out.suffix}"
        with whole_file(whole) as partial:
            write[self.out.suffix](partial, files, times)
        write_text(self.parts / "complete.json", _state(whole))
        whole.replace(self.out)
        _mapped.cache_clear()
        shutil.rmtree(self.parts)
        return files

    def _counts(self, files: list[str]) -> np.ndarray:
        return np.array([self.place[file][2] for file in files])

    def _write_array(self, out: IO[bytes], files: list[str]) -> None:
        """A .npy of all rows, written from one part after the other."""
        shape = (int(self._counts(files).sum()), self.width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for _, rows in self.rows_of(files):
            out.write(np.ascontiguousarray(rows, "<f4").data)

    def _write_npy(self, path: Path, files: list[str], times) -> None:
        with open(path, "wb") as out:
            self._write_array(out, files)
        counts = self._counts(files)
        index = self.parts / "files.csv"
        with _table(index, ["file", "first_row", "rows"]) as rows:
            for row in zip(files, counts.cumsum() - counts, counts, strict=True):
                rows.write(csv_line(*row))
        index.replace(self.out.with_suffix(".files.csv"))

    def _write_npz(self, path: Path, files: list[str], times) -> None:
        arrays: dict[str, Any] = {"files": np.array(files)}
        if times is not None:
            counts = self._counts(files)
            arrays["rows"] = counts
            arrays["seconds"] = np.concatenate([times(count) for count in counts])
        np.savez(path, **arrays)
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive,
            archive.open("embeddings.npy", "w", force_zip64=True) as out,
        ):
            self._write_array(out, files)

    def _write_csv(self, path: Path, files: list[str], times) -> None:
        columns = ["file", *(["seconds"] if times else []), *range(self.width)]
        with _table(path, columns) as table:
            for file, rows in self.rows_of(files):
                if times is None:
                    table.write(csv_line(file, *rows[0]))
                else:
                    for pair in np.column_stack([times(len(rows)), rows]):
                        table.write(csv_line(file, *pair))

    def _write_parquet(self, path: Path, files: list[str], times) -> None:
        pa, parquet = import_parquet()
        names = pa.string() if all(map(_is_utf8, files)) else pa.binary()
        columns = [("file", names), *([("seconds", pa.float64())] if times else [])]
        schema = pa.schema([*columns, ("embedding", pa.list_(pa.float32(), self.width))])
        with parquet.ParquetWriter(path, schema, use_dictionary=["file"]) as writer:
            for group in _groups(self.rows_of(files), PART_BYTES):
                counts = [len(rows) for _, rows in group]
                named = [os.fsencode(file) for file, rows in group for _ in rows]
                arrays = [pa.array(named, pa.binary()).cast(names)]
                if times is not None:
                    arrays.append(pa.array(np.concatenate([times(count) for count in counts])))
                values = np.concatenate([rows for _, rows in group]).astype("<f4", copy=False)
                vectors = pa.FixedSizeListArray.from_arrays(values.ravel(), self.width)
                writer.write_table(pa.Table.from_arrays([*arrays, vectors], schema=schema))


def import_parquet():
    """pyarrow and pyarrow.parquet.

    Raises
    ------
    ValueError
        If they are not installed: the message says how they are.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: in a clone, pip install '.[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _is_utf8(file: str) -> bool:
    try:
        file.encode()
    except UnicodeEncodeError:
        return False
    return True


def _groups(pairs: Iterator[Rows], size: float) -> Iterator[list[Rows]]:
    """Runs of files, of about so many bytes."""
    group: list[Rows] = []
    held = 0
    for pair in pairs:
        group.append(pair)
        held += pair[1].nbytes
        if held > size:
            yield group
            group, held = [], 0
    if group:
        yield group


@contextmanager
def _table(path: Path, columns: list):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(csv_line(*columns))
        yield file


def _state(path: Path) -> str:
    """Size and modification time, which a rename keeps."""
    stat = path.stat()
    return json.dumps([stat.st_size, stat.st_mtime_ns])
