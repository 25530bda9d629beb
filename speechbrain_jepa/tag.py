"""Apply a classifier to audio files.

python -m speechbrain_jepa.tag <classifier folder> <files or folders> --out labels.csv

A classifier of clips gives file,label,score: the best label, `--top_k` of them, or with any number
of labels a clip all above `--threshold`. One of time steps gives file,onset,offset,label,score, in
seconds, the score being the mean over the event. A file in which nothing is found has one row with
its name alone.

Without --out rows are printed. Stopped and started again with the same command, it goes on where it
was: <out>.parts/ holds what is done.
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from speechbrain_jepa.classifier import AudioClassifier, Decoding
from speechbrain_jepa.data.clips import BATCH_SECONDS, find_audio, read_clips
from speechbrain_jepa.data.skipped import SkippedFiles, csv_line
from speechbrain_jepa.embed import PRECISIONS
from speechbrain_jepa.events import decode, median_filter
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import FolderInUse, folder_lock, full_disk_named

CLIP_COLUMNS = ("file", "label", "score")
STEP_COLUMNS = ("file", "onset", "offset", "label", "score")

Row = tuple  # of one of the two


@torch.inference_mode()
def tag_files(
    model: AudioClassifier,
    files: list[str],
    top_k: int = 1,
    threshold: float | None = None,
    precision: str = "fp32",
    batch_seconds: float = BATCH_SECONDS,
    num_workers: int = 2,
    on_failure=None,
) -> Iterator[tuple[str, list[Row]]]:
    """Labels of files, one after another.

    Arguments
    ---------
    model : AudioClassifier
    files : list of str
        See `speechbrain_jepa.data.clips.find_audio`.
    top_k : int
        Labels of a clip, best first. Default 1. Of no effect where a clip may have any number.
    threshold : float or None
        Of the scores of labels that a clip may have any number of (default 0.5), and of events
        (default None: those that training found on its validation clips).
    precision : str
        "fp32" (default), "bf16" or "fp16".
    batch_seconds, num_workers, on_failure
        See `speechbrain_jepa.data.clips.read_clips`.

    Yields
    ------
    file : str
    rows : list of tuples
        file, label, score; for time steps file, onset, offset, label, score.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    device = next(model.parameters()).device
    dtype = PRECISIONS[precision]
    for batch in read_clips(files, batch_seconds, num_workers, on_failure):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch.wav.to(device), batch.wav_lens)
        lengths = (batch.wav_lens * batch.wav.shape[1]).round().long()
        if model.level == "clip":
            assert logits.clip is not None
            scores = model.scores(logits.clip).float().cpu()
            for file, values in zip(batch.files, scores):
                yield file, _clip_rows(model, file, values, top_k, threshold)
        else:
            assert logits.steps is not None
            scores = model.scores(logits.steps).float().cpu()
            steps = model.encoder.num_steps(lengths).tolist()
            for file, values, count, length in zip(batch.files, scores, steps, lengths.tolist()):
                seconds = length / SAMPLE_RATE
                yield file, _event_rows(model, file, values[:count].numpy(), seconds, threshold)


def _clip_rows(model, file, scores, top_k, threshold) -> list[Row]:
    order = scores.argsort(descending=True, stable=True).tolist()
    if model.multilabel:
        limit = 0.5 if threshold is None else threshold
        order = [number for number in order if scores[number] > limit]
    else:
        order = order[:top_k]
    return [(file, model.labels[number], float(scores[number])) for number in order]


def _event_rows(model, file, scores, seconds, threshold) -> list[Row]:
    step, decoding = model.encoder.step_seconds, model.decoding
    filtered = median_filter(scores, decoding.median_seconds, step)
    thresholds = decoding.thresholds if threshold is None else [threshold] * len(model.labels)
    rows = []
    for onset, offset, label in decode(filtered, model.labels, step, Decoding(thresholds), seconds):
        part = slice(round(onset / step), max(round(offset / step), round(onset / step) + 1))
        score = filtered[part, model.labels.index(label)].mean()
        rows.append((file, onset, offset, label, float(score)))
    return rows


def tag_to_csv(model: AudioClassifier, files: list[str], out, **options) -> tuple[int, int]:
    """Write the labels of files to a csv; an interrupted call is continued by the same call.

    Arguments
    ---------
    model : AudioClassifier
    files : list of str
    out : str or Path
        The csv. Files that cannot be read are listed in `<out without ending>.skipped.csv`.
    **options
        Those of `tag_files`.

    Returns
    -------
    tagged, skipped : int
        Numbers of files.

    Raises
    ------
    FileExistsError
        If `out` exists.
    OSError
        If the disk is full: the message names it.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it, or name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    parts, skipped = (
        out.with_name(out.name + ".parts"),
        SkippedFiles(out.with_suffix(".skipped.csv")),
    )
    columns = CLIP_COLUMNS if model.level == "clip" else STEP_COLUMNS
    with folder_lock(parts, "wait for it, or name another --out"):
        part = parts / "rows.csv"
        done = _complete(part, columns)
        left = [file for file in files if file not in done]
        tagged = len(files) - len(left)
        with (
            full_disk_named(out.parent),
            open(part, "a", newline="", encoding="utf-8", errors="surrogateescape") as table,
            tqdm(total=len(files), initial=tagged, disable=None) as bar,
        ):

            def skip(error):
                skipped.add(error.path, error.reason)
                bar.update()

            for file, rows in tag_files(model, left, on_failure=skip, **options):
                table.write("".join(map(_line, rows or [(file,)])))
                table.flush()
                tagged += 1
                bar.update()
        part.replace(out)
        shutil.rmtree(parts)
    return tagged, len(files) - tagged


def _complete(part: Path, columns: tuple[str, ...]) -> set[str]:
    """Files of which an unfinished csv has all rows; the last one's may be cut, and are removed."""
    rows = []
    if part.exists():
        with open(part, newline="", encoding="utf-8", errors="surrogateescape") as table:
            rows = [row for row in csv.reader(table) if row][1:]
    rows = [row for row in rows if row[0] != rows[-1][0]]
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as table:
        table.writelines(csv_line(*row) for row in (columns, *rows))
    return {row[0] for row in rows}


def _line(row: Row) -> str:
    return csv_line(*(f"{value:.4f}" if isinstance(value, float) else value for value in row))


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.tag",
        description="Apply a classifier to audio files; started again after an interruption, it "
        "goes on.",
    )
    add = parser.add_argument
    add("classifier", help="folder that recipes/finetuning or recipes/event_detection wrote")
    add("audio", nargs="+", help="audio files, and folders to search")
    add("--out", help="csv to write; without it rows are printed")
    add("--top_k", type=int, default=1, help="labels of a clip, where it has one")
    add("--threshold", type=float, help="of scores, for any number of labels and for events")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_seconds", type=float, default=BATCH_SECONDS, help="of audio at once")
    add("--num_workers", type=int, default=2, help="decoding threads")
    given = parser.parse_args(arguments)
    options = {
        name: getattr(given, name)
        for name in ("top_k", "threshold", "precision", "batch_seconds", "num_workers")
    }
    try:
        files = find_audio(given.audio)
        model = AudioClassifier.load(given.classifier, device=given.device)
        if given.out is None:
            _print(model, files, options)
            return
        tagged, skipped = tag_to_csv(model, files, given.out, **options)
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"tag: {error}") from error
    print(f"{tagged} files tagged in {given.out}")
    if skipped:
        print(f"{skipped} files skipped, listed in {Path(given.out).with_suffix('.skipped.csv')}")


def _print(model: AudioClassifier, files: list[str], options: dict) -> None:
    def skip(error):
        print(f"skipped {error}", file=sys.stderr)

    for file, rows in tag_files(model, files, on_failure=skip, **options):
        print("".join(map(_line, rows or [(file,)])), end="", flush=True)


if __name__ == "__main__":
    main()
