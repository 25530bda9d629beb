"""Embed audio files.

python -m speechbrain_jepa.embed <pretrained folder> <files or folders> --out emb.npz

Stopped and started again with the same command, it goes on where it was. docs/embeddings.md
describes what is written.

<out>.parts/            held by one process (files.folder_lock)
  plan.json             what the embeddings depend on
  normalization.json    mean and deviation of the files' log-mel, if they were measured
  part-000000.npz ...   embeddings of some files each
  complete.json         size and time of the output, written before it takes its place
"""

import argparse
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_jepa.checkpoints import DEFAULT_ENCODER
from speechbrain_jepa.data.clips import BATCH_SECONDS, find_audio, read_clips
from speechbrain_jepa.data.skipped import SkippedFiles, csv_line
from speechbrain_jepa.embedded import FORMATS, fingerprint, write_settings
from speechbrain_jepa.encoder import NORMALIZATIONS, AudioJEPA
from speechbrain_jepa.files import FolderInUse, folder_lock, whole_file, write_text
from speechbrain_jepa.read_out import add_read_out

LEVELS = ("clip", "frame")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PART_BYTES = 64e6  # a part is put on the disk when it has grown to this size
PART_SECONDS = 60.0  # or after so long: an interruption loses no more than this


class Embeddings:
    """Embeddings of files on their way to one output file, in parts that survive an interruption.

    Arguments
    ---------
    out : Path
        Output file: .npz, .npy or .csv.
    parts : Path
        Folder of the parts, which this process holds.
    plan : dict
        What the embeddings depend on. Parts of another plan are not continued.
    """

    def __init__(self, out: Path, parts: Path, plan: dict):
        self.out, self.parts = out, parts
        self._check_plan(plan)
        self.place: dict[str, tuple[Path, int, int]] = {}  # file: part, first row, rows
        self.width = 0
        for part in sorted(self.parts.glob("part-*.npz")):
            self._enter(part)
        self._forget_pending()

    def _check_plan(self, plan: dict) -> None:
        path = self.parts / "plan.json"
        if not path.exists():
            write_text(path, json.dumps(plan))
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in plan if plan[name] != begun.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.parts} was begun with {name}={begun.get(name)}, not {plan[name]}: "
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
        files, rows = zip(*self.pending, strict=True)
        part = self.parts / f"part-{len(list(self.parts.glob('part-*.npz'))):06d}.npz"
        arrays: dict[str, Any] = {
            "files": np.array(files),
            "rows": np.array([len(array) for array in rows]),
            "width": np.array(rows[0].shape[1]),
            "embeddings": np.concatenate(rows),
        }
        with whole_file(part) as partial:
            np.savez(partial, **arrays)
        self._enter(part)
        self._forget_pending()

    def _forget_pending(self) -> None:
        self.pending: list[tuple[str, np.ndarray]] = []
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

    def rows_of(self, files: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Each file with its embeddings [rows, C], one part in memory at a time."""
        loaded, embeddings = None, np.empty((0, 0))
        for file in files:
            part, first, rows = self.place[file]
            if part != loaded:
                with np.load(part) as arrays:
                    loaded, embeddings = part, arrays["embeddings"]
            yield file, embeddings[first : first + rows]

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
        write = {".npz": self._write_npz, ".npy": self._write_npy, ".csv": self._write_csv}
        whole = self.parts / f"whole{self.out.suffix}"
        with whole_file(whole) as partial:
            write[self.out.suffix](partial, files, times)
        write_text(self.parts / "complete.json", _state(whole))
        whole.replace(self.out)
        shutil.rmtree(self.parts)
        return files

    def normalization(self, measure: Callable[[], dict]) -> dict:
        """What `measure` gives, or gave before an interruption."""
        path = self.parts / "normalization.json"
        if not path.exists():
            write_text(path, json.dumps(measure()))
        return json.loads(path.read_text(encoding="utf-8"))

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


@contextmanager
def _table(path: Path, columns: list):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(csv_line(*columns))
        yield file


def _state(path: Path) -> str:
    """Size and modification time, which a rename keeps."""
    stat = path.stat()
    return json.dumps([stat.st_size, stat.st_mtime_ns])


def embed_files(
    model: AudioJEPA,
    files: list[str],
    out,
    level: str = "clip",
    precision: str = "fp32",
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    progress: bool = True,
    source: str | None = None,
) -> tuple[list[str], SkippedFiles]:
    """Embed files into one output file; an interrupted call is continued by the same call.

    Arguments
    ---------
    model : AudioJEPA
        With normalization="dataset" it is fitted on the files, unless it has been.
    files : list of str
        See `speechbrain_jepa.data.clips.find_audio`.
    out : str or Path
        .npz, .npy or .csv.
    level : str
        "clip" (default): one embedding a file. "frame": one a time step.
    precision : str
        "fp32" (default), "bf16" or "fp16".
    batch_seconds, num_workers
        See `speechbrain_jepa.data.clips.read_clips`.
    progress : bool
        Show a progress bar. Default True.
    source : str or None
        What the model was loaded from, noted beside the output. Default None: unknown.

    Returns
    -------
    files : list of str
        Those in the output.
    skipped : SkippedFiles
        The others, also in `<out without ending>.skipped.csv`.

    Raises
    ------
    FileExistsError
        If `out` exists. If a call with the same arguments was killed after it had written `out`,
        that is what this call returns.
    FolderInUse
        If another process is embedding to `out`.
    OSError
        If the disk is full: the message names it.
    ValueError
        If an option does not fit, or no file can be embedded.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: choose one of {', '.join(LEVELS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    if model.output_all_hiddens:
        raise ValueError(
            "embed_files writes one vector: load AudioJEPA with layers, not output_all_hiddens"
        )
    plan = {
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
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: the name must end in {', '.join(FORMATS)}")
    parts = out.with_name(out.name + ".parts")
    if out.exists() and not parts.exists():
        raise _exists(out)
    with folder_lock(parts, fix="wait for it, or name another --out"):
        embeddings = Embeddings(out, parts, plan)
        skipped = SkippedFiles(out.with_suffix(".skipped.csv"))
        if embeddings.is_complete:
            shutil.rmtree(parts)
            done = [file for file in files if file in embeddings.place]
            if len(done) + len(skipped) == len(files):
                return done, skipped
        if out.exists():
            raise _exists(out)
        skipped.path.unlink(missing_ok=True)  # files that could not be read are tried again
        skipped = SkippedFiles(skipped.path)
        if not model.is_fitted:
            _fit(model, embeddings, files, num_workers)
        _embed(
            model,
            embeddings,
            skipped,
            files,
            level,
            precision,
            batch_seconds,
            num_workers,
            progress,
        )
        write_settings(out, {**plan, "source": source}, model)
        times = (lambda steps: model.timestamps(steps).numpy()) if level == "frame" else None
        return embeddings.finish(files, times), skipped


def _exists(out: Path) -> FileExistsError:
    return FileExistsError(f"{out} exists already: remove it, or name another --out")


def _fit(model: AudioJEPA, embeddings: Embeddings, files: list[str], num_workers: int) -> None:
    def measure():
        fitted = model.fit_normalization(files, num_workers=num_workers).normalization
        return {"mean": fitted.mean.item(), "std": fitted.std.item()}

    model.normalization.set(**embeddings.normalization(measure))


def _embed(
    model: AudioJEPA,
    embeddings: Embeddings,
    skipped: SkippedFiles,
    files: list[str],
    level: str,
    precision: str,
    batch_seconds: float,
    num_workers: int,
    progress: bool,
) -> None:
    """Embed the files that no part has."""
    left = [file for file in files if file not in embeddings.place]
    device = next(model.parameters()).device
    dtype = PRECISIONS[precision]
    with (
        embeddings.kept_on_error(),
        tqdm(total=len(files), initial=len(files) - len(left), disable=not progress) as bar,
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):

        def skip(error):
            skipped.add(error.path, error.reason)
            bar.update()

        for batch in read_clips(left, batch_seconds, num_workers, skip):
            wav = batch.wav.to(device)
            if level == "clip":
                rows = list(model.embed(wav, batch.wav_lens)[:, None].float().cpu().numpy())
            else:
                steps = model.num_steps((batch.wav_lens * wav.shape[1]).round().long())
                frames = model(wav, batch.wav_lens).float().cpu().numpy()
                rows = [clip[:count].copy() for clip, count in zip(frames, steps, strict=True)]
            for file, array in zip(batch.files, rows, strict=True):
                embeddings.add(file, array)
            bar.update(len(batch.files))


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.embed",
        description="Embed audio files; started again after an interruption, it goes on.",
    )
    add = parser.add_argument
    add(
        "encoder",
        help="pretrained folder, experiment folder, Hugging Face repo id, or name of an encoder "
        "that comes with the package; may be left out where audio is a single file or folder",
    )
    add("audio", nargs="*", help="audio files, and folders to search")
    add("--out", required=True, help="output file: .npz, .npy or .csv")
    add("--level", choices=LEVELS, default="clip", help="one embedding a file or a time step")
    add_read_out(parser, "as the encoder's config.json says; the last with --level frame")
    add("--step", type=float, help="seconds of a time step, finer than the encoder's own")
    add("--flat", action="store_true", help="average frequency patches, not concatenate")
    add("--normalization", choices=NORMALIZATIONS, default="pretraining")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_seconds", type=float, default=BATCH_SECONDS, help="of audio at once")
    add("--num_workers", type=int, default=2, help="decoding threads")
    options = parser.parse_args(arguments)
    if not options.audio:
        options.encoder, options.audio = None, [options.encoder]
    try:
        files = find_audio(options.audio)
        model = AudioJEPA(
            options.encoder,
            layers=options.layers,
            pooling=options.pooling,
            flat=options.flat,
            normalization=options.normalization,
            step_seconds=options.step,
            device=options.device,
        )
        done, skipped = embed_files(
            model,
            files,
            options.out,
            options.level,
            options.precision,
            options.batch_seconds,
            options.num_workers,
            source=options.encoder or DEFAULT_ENCODER,
        )
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"embed: {error}") from error
    print(f"{len(done)} files embedded in {options.out}")
    if len(skipped):
        print(f"{len(skipped)} files skipped, listed in {skipped.path}")


if __name__ == "__main__":
    main()
