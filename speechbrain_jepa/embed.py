"""Embed audio files.

    python -m speechbrain_jepa.embed <pretrained folder> <files or folders> --out emb.npz
    python -m speechbrain_jepa.embed ... --shard 3/16     # the fourth of sixteen jobs of a queue
    python -m speechbrain_jepa.embed ... --join           # when all have ended: the output
    torchrun --nproc_per_node=8 -m speechbrain_jepa.embed ...     # a GPU for each process
    python -m speechbrain_jepa.embed ... --engine ray --address auto     # on a Ray cluster

Stopped and started again with the same command, each goes on where it was. docs/embeddings.md
describes what is written.
"""

import argparse
import csv
import json
import os
import shutil
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from speechbrain_jepa.checkpoints import DEFAULT_ENCODER
from speechbrain_jepa.data.clips import BATCH_SECONDS, find_audio, read_clips
from speechbrain_jepa.data.shares import COMPLETE, Share, missing_shares, share_folders
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.embedded import FORMATS, write_settings
from speechbrain_jepa.embedding_parts import (
    LEVELS,
    PRECISIONS,
    Embeddings,
    embed_batch,
    embedding_plan,
    import_parquet,
)
from speechbrain_jepa.encoder import NORMALIZATIONS, AudioJEPA
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.files import FolderInUse, folder_lock, write_text
from speechbrain_jepa.read_out import add_read_out
from speechbrain_jepa.throughput import Spent

MEASURING_SECONDS = 86_400.0  # to wait for the share that measures the files' normalisation


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
    share: Share | None = None,
    join: bool = False,
    ray_address: str | None = None,
    spent: Spent | None = None,
) -> tuple[list[str], SkippedFiles]:
    """Embed files into one output file; an interrupted call is continued by the same call.

    Arguments
    ---------
    model : AudioJEPA
        With normalization="dataset" it is fitted on the files, unless it has been.
    files : list of str
        See `speechbrain_jepa.data.clips.find_audio`.
    out : str or Path
        .npz, .npy, .csv or .parquet.
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
    share : Share or None
        Embed those of the files that are in this share, and write no output. Default None.
    join : bool
        Write the output from the parts of all shares, embedding nothing. Default False.
    ray_address : str or None
        Of a Ray cluster that embeds (`embed_ray.embed_on_ray`), "local" for this machine alone.
        Default None: this process embeds.
    spent : Spent or None
        Gets what the work took; of all shares, where they are joined.

    Returns
    -------
    files : list of str
        Those in the output, or embedded by the share.
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
        If an option does not fit, no file can be embedded, or shares or files of them are missing.
    """
    plan = embedding_plan(model, level, precision)
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: the name must end in {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        import_parquet()
    parts = out.with_name(out.name + ".parts")
    if out.exists() and not parts.exists():
        raise _exists(out)
    spent = Spent() if spent is None else spent
    reading = (level, precision, batch_seconds, num_workers, progress)
    if share is not None:
        return _embed_share(model, files, out, parts / share.folder, plan, share, reading, spent)
    with folder_lock(parts, fix="wait for it, or name another --out"):
        shares = [parts / found.folder for found in share_folders(parts)]
        embeddings = Embeddings(out, parts, plan, shares)
        skipped = SkippedFiles(out.with_suffix(".skipped.csv"))
        if embeddings.is_complete:
            shutil.rmtree(parts)
            done = [file for file in files if file in embeddings.place]
            if len(done) + len(skipped) == len(files):
                return done, skipped
        if out.exists():
            raise _exists(out)
        if join:
            skipped = _check_shares(embeddings, skipped, files, spent)
        elif shares:
            raise ValueError(
                f"{parts} was begun in shares: embed each (--shard) and --join them, or remove it"
            )
        else:
            skipped.path.unlink(missing_ok=True)  # files that could not be read are tried again
            skipped = SkippedFiles(skipped.path)
        if not model.is_fitted:
            _fit(model, parts, files, num_workers)
        if ray_address is not None and not join:
            from speechbrain_jepa.embed_ray import embed_on_ray

            embed_on_ray(ray_address, model, embeddings, skipped, files, *reading[:3], spent)
        elif not join:
            _embed(model, embeddings, skipped, files, *reading, spent)
        write_settings(out, {**plan, "source": source}, model)
        times = (lambda steps: model.timestamps(steps).numpy()) if level == "frame" else None
        return embeddings.finish(files, times), skipped


def _embed_share(
    model: AudioJEPA,
    files: list[str],
    out: Path,
    folder: Path,
    plan: dict,
    share: Share,
    reading: tuple[str, str, float, int, bool],
    spent: Spent,
) -> tuple[list[str], SkippedFiles]:
    """Embed a share of the files; its folder says so when it is complete."""
    own = [file for file in files if share.has(file)]
    with folder_lock(folder, "wait for it, or give this process another --shard"):
        missing_shares(folder.parent)  # an error where there are shares of another number
        embeddings = Embeddings(out, folder, plan)
        skipped, marker = SkippedFiles(folder / "skipped.csv"), folder / COMPLETE
        done = [file for file in own if file in embeddings.place]
        if out.exists() or (marker.exists() and len(done) + len(skipped) == len(own)):
            return done, skipped  # an output that exists is the business of `join`
        marker.unlink(missing_ok=True)
        skipped.path.unlink(missing_ok=True)
        skipped = SkippedFiles(skipped.path)
        if not model.is_fitted:
            _fit(model, folder.parent, files, reading[3])
        _embed(model, embeddings, skipped, own, *reading, spent)
        embeddings.flush()
        write_text(marker, json.dumps(asdict(spent)))
        return [file for file in own if file in embeddings.place], skipped


def _check_shares(
    embeddings: Embeddings, skipped: SkippedFiles, files: list[str], spent: Spent
) -> SkippedFiles:
    """Whether the shares have every file; the list of those that they skipped."""
    parts = embeddings.parts
    shares = share_folders(parts)
    if not shares:
        raise ValueError(f"{parts} holds no shares: embed them with --shard 0/n to n-1/n")
    missing = missing_shares(parts)
    if missing:
        named = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise ValueError(
            f"{parts}: of {missing[0].number} shares {len(missing)} are missing or unfinished: run "
            f"the command again with --shard {named}"
        )
    unread: dict[str, str] = {}
    took = []
    for share in shares:
        folder = parts / share.folder
        unread.update(_skipped_lines(folder / "skipped.csv"))
        took.append(Spent(**json.loads((folder / COMPLETE).read_text(encoding="utf-8"))))
    spent.sum_of(took)
    nowhere = [file for file in files if file not in embeddings.place and file not in unread]
    if nowhere:
        again = sorted({s.index for s in shares for file in nowhere[:1000] if s.has(file)})
        raise ValueError(
            f"{parts}: {len(nowhere)} files are in no share, {nowhere[0]} for one: they were added "
            f"since; run again --shard {', '.join(f'{i}/{len(shares)}' for i in again[:20])}"
        )
    lines = [(file, unread[file]) for file in files if file in unread]
    skipped.path.unlink(missing_ok=True)
    return SkippedFiles.write(skipped.path, lines) if lines else SkippedFiles(skipped.path)


def _skipped_lines(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [(row["file"], row["reason"]) for row in csv.DictReader(file)]


def _exists(out: Path) -> FileExistsError:
    return FileExistsError(f"{out} exists already: remove it, or name another --out")


def _fit(model: AudioJEPA, parts: Path, files: list[str], num_workers: int) -> None:
    """Set the files' mean and deviation: measured, or as another share or run measured them."""
    path = parts / "normalization.json"
    if not path.exists():
        with folder_lock(parts / "normalization", "wait for it", wait=MEASURING_SECONDS):
            if not path.exists():
                fitted = model.fit_normalization(files, num_workers=num_workers).normalization
                pair = {"mean": fitted.mean.item(), "std": fitted.std.item()}
                write_text(path, json.dumps(pair))
    model.normalization.set(**json.loads(path.read_text(encoding="utf-8")))


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
    spent: Spent,
) -> None:
    """Embed the files that no part has."""
    left = [file for file in files if file not in embeddings.place]
    with (
        spent.on("whole"),
        embeddings.kept_on_error(),
        tqdm(total=len(files), initial=len(files) - len(left), disable=not progress) as bar,
    ):

        def skip(error):
            skipped.add(error.path, error.reason)
            bar.update()

        batches = read_clips(left, batch_seconds, num_workers, skip)
        while True:
            with spent.on("reading"):
                batch = next(batches, None)
            if batch is None:
                return
            with spent.on("encoding"):
                pairs = embed_batch(model, batch, level, precision)
            with spent.on("writing"):
                for file, rows in pairs:
                    embeddings.add(file, rows)
            spent.files += len(pairs)
            spent.audio += float(batch.wav_lens.sum()) * batch.wav.shape[1] / SAMPLE_RATE
            bar.update(len(pairs))


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
    add(
        "--out",
        help="output file: .npz, .npy, .csv, .parquet; without it the last of the names before "
        "is the output, and .npz where it has no ending",
    )
    add("--level", choices=LEVELS, default="clip", help="one embedding a file or a time step")
    add_read_out(parser, "as the encoder's config.json says; the last with --level frame")
    add("--step", type=float, help="seconds of a time step, finer than the encoder's own")
    add("--flat", action="store_true", help="average frequency patches, not concatenate")
    add("--normalization", choices=NORMALIZATIONS, default="pretraining")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_seconds", type=float, default=BATCH_SECONDS, help="of audio at once")
    add("--num_workers", type=int, default=2, help="decoding threads")
    add("--shard", help="i/n: embed this one of n shares, as a job of a queue")
    add("--join", action="store_true", help="write the output from all shares, which must be there")
    add("--engine", choices=("process", "ray"), default="process", help="what embeds")
    add("--address", default="local", help="of the Ray cluster: auto, or host:port")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = _output_at_the_end(parser, options.audio)
    if not options.audio:
        options.encoder, options.audio = None, [options.encoder]
    world = int(os.environ.get("WORLD_SIZE", 1))
    spent = Spent()
    try:
        _check_engine(options, world)
        if world > 1:
            done, skipped = _under_torchrun(options, spent)
        else:
            share = Share.parse(options.shard) if options.shard else None
            done, skipped = _run(options, find_audio(options.audio), share, options.join, spent)
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"embed: {error}") from error
    if int(os.environ.get("RANK", 0)):
        return
    where = options.out if not options.shard else f"share {options.shard} of {options.out}"
    print(f"{len(done)} files embedded in {where}")
    if len(skipped):
        print(f"{len(skipped)} files skipped, listed in {skipped.path}")
    print(spent.sentence())


def _output_at_the_end(parser: argparse.ArgumentParser, audio: list[str]) -> str:
    """Takes the output's name from the end of the audio's."""
    if not audio or Path(audio[-1]).is_dir():
        last = f" ({audio[-1]} is a folder)" if audio else ""
        parser.error(f"where the embeddings go is missing{last}: add --out emb.npz")
    out = Path(audio.pop())
    return str(out if out.suffix else out.with_suffix(".npz"))


def _check_engine(options, world: int) -> None:
    given = {
        "--shard": options.shard,
        "--join": options.join,
        "--engine ray": options.engine == "ray",
        "torchrun": world > 1,
    }
    chosen = [name for name, value in given.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: choose one of them")


def _run(options, files, share: Share | None, join: bool, spent: Spent):
    """Load the encoder and embed, as the options say."""
    model = AudioJEPA(
        options.encoder,
        layers=options.layers,
        pooling=options.pooling,
        flat=options.flat,
        normalization=options.normalization,
        step_seconds=options.step,
        device="cpu" if join or options.engine == "ray" else options.device,
    )
    return embed_files(
        model,
        files,
        options.out,
        options.level,
        options.precision,
        options.batch_seconds,
        options.num_workers,
        progress=int(os.environ.get("RANK", 0)) == 0,
        source=options.encoder or DEFAULT_ENCODER,
        share=share,
        join=join,
        ray_address=options.address if options.engine == "ray" else None,
        spent=spent,
    )


def _under_torchrun(options, spent: Spent):
    """A share for each process, on its own GPU where the device is cuda; the first joins them."""
    if options.device == "cuda":
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        share = Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
        # one process looks at the folders
        listing = [find_audio(options.audio) if share.index == 0 else None]
        torch.distributed.broadcast_object_list(listing)
        result = _run(options, listing[0], share, False, spent)
        torch.distributed.barrier()
        if share.index == 0:
            result = _run(options, listing[0], None, True, spent)
        return result
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
