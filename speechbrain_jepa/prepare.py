"""Decode a corpus once into tar shards, on one machine or on many that share the work.

    python -m speechbrain_jepa.prepare --data_folder /data/audioset --out /fast/audioset
    python -m speechbrain_jepa.prepare ... --shard 3/16       # on the fourth of sixteen machines
    torchrun --nproc_per_node=8 -m speechbrain_jepa.prepare ...     # a share for each process
    python -m speechbrain_jepa.prepare ... --engine ray --address auto     # on a Ray cluster
    python -m speechbrain_jepa.prepare --out /fast/audioset --check

Training takes the folder as it is: `--data_folder /fast/audioset`. Which files are whose follows
from their paths, so the machines need nothing but the two folders. Started again after an
interruption, each goes on behind its last whole shard.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from speechbrain_jepa.data.decoded import FORMATS
from speechbrain_jepa.data.prepared import SHARD_BYTES, Prepared, check_shares, write_share
from speechbrain_jepa.data.scan import read_csv, scan_folder
from speechbrain_jepa.data.shares import Share, share_folders
from speechbrain_jepa.data.workers import available_cpus
from speechbrain_jepa.files import FolderInUse, folder_lock
from speechbrain_jepa.ray_cluster import cause_of, on_cluster


def prepare(
    out: str | os.PathLike,
    data_folder: str | os.PathLike | None = None,
    train_csv: str | os.PathLike | None = None,
    share: Share | None = None,
    kind: str = "flac",
    shard_bytes: int = SHARD_BYTES,
    min_seconds: float = 0.2,
    num_threads: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Scan a share of a corpus and write it as tar shards of 16 kHz mono audio.

    Arguments
    ---------
    out : str or path
        The share gets a folder in it.
    data_folder, train_csv : str or path
        As in `scan_folder` and `read_csv`; one of them at least.
    share : Share or None
        None (default): everything, share 0/1.
    kind, shard_bytes
        As in `write_share`.
    min_seconds : float
        Shorter files are skipped. Default 0.2.
    num_threads : int or None
        That decode. None (default): one for each CPU that this process may use.
    progress : bool
        Show a bar. Default True.

    Returns
    -------
    Prepared

    Raises
    ------
    ValueError
        If there is no audio, or `out` holds shares of another number.
    FolderInUse
        If another process is at work on the share.
    OSError
        If the disk is full.

    Example
    -------
    >>> import numpy as np, soundfile
    >>> folder = getfixture("tmp_path")
    >>> (folder / "audio").mkdir()
    >>> noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    >>> soundfile.write(folder / "audio" / "noise.ogg", noise, 44_100)
    >>> prepare(folder / "out", folder / "audio", progress=False).segments
    1
    >>> manifest, _ = scan_folder(folder / "out", folder / "cache", progress=False)
    >>> manifest.path(0), manifest.length.tolist(), manifest.sample_rate.tolist()
    ('share-00000-of-00001/000000.tar::noise.flac', [16000], [16000])
    """
    share, out = share or Share(), Path(out)
    if data_folder is None and train_csv is None:
        raise ValueError("nothing to prepare: give --data_folder or --train_csv")
    inside = data_folder is not None and Path(data_folder).resolve() in (
        out.resolve(),
        *out.resolve().parents,
    )
    if inside:
        raise ValueError(f"--out {out} lies in --data_folder {data_folder}: name another")
    folder = out / share.folder
    with folder_lock(folder, "wait for it, or give this process another --shard"):
        options: dict = dict(min_seconds=min_seconds, progress=progress, share=share)
        cache = folder / "scan"
        if train_csv is not None:
            manifest, skipped = read_csv(train_csv, cache, data_folder, **options)
        else:
            manifest, skipped = scan_folder(data_folder or "", cache, **options)
        threads = num_threads or available_cpus()
        return write_share(
            *(manifest, skipped, data_folder or "", folder),
            *(kind, shard_bytes, threads, progress),
        )


def prepare_on_ray(
    address: str, out: str | os.PathLike, number: int | None = None, num_threads=None, **options
) -> Prepared:
    """Prepare all shares of a corpus on a Ray cluster, a task each.

    A task that is lost, or its node, is begun again by Ray and goes on behind its last whole shard.
    Every node sees the corpus and `out` under the same paths.

    Arguments
    ---------
    address : str
        See `ray_cluster.on_cluster`.
    out : str or path
    number : int or None
        Of shares. None (default): as many as `out` holds, else four for each task that fits the
        cluster at once.
    num_threads : int or None
        Of a task. None (default): the CPUs of the smallest node.
    options
        Of `prepare`.

    Returns
    -------
    Prepared
        All shares together.

    Raises
    ------
    OSError, ValueError
        Whatever ended a task, other than its loss.
    """
    out = Path(os.path.abspath(out))
    for name in ("data_folder", "train_csv"):
        if options.get(name) is not None:
            options[name] = os.path.abspath(options[name])
    with on_cluster(address) as ray:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = num_threads or min(filter(None, nodes), default=1)
        if number is None:
            begun = share_folders(out) if out.is_dir() else []
            number = begun[0].number if begun else 4 * max(sum(nodes) // threads, 1)
        task = ray.remote(num_cpus=threads, max_retries=-1)(prepare)
        options = {**options, "num_threads": threads, "progress": False}
        pending = [task.remote(out, share=Share(i, number), **options) for i in range(number)]
        with tqdm(desc="Preparing", total=number, unit=" shares") as bar:
            try:
                while pending:
                    ready, pending = ray.wait(pending)
                    ray.get(ready)
                    bar.update(len(ready))
            except ray.exceptions.RayError as error:
                cause = cause_of(error)
                raise OSError(f"a worker ended with {type(cause).__name__}: {cause}") from error
    return check_shares(out)


def own_share() -> Share:
    """That of this process under torchrun, else everything."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def summary(prepared: Prepared) -> str:
    """What there is, in one line."""
    return (
        f"{prepared.segments} segments, {prepared.hours:.1f} hours, {prepared.size / 1e9:.2f} GB; "
        f"{prepared.skipped} files skipped"
    )


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.prepare",
        description="Decode a corpus once into tar shards of 16 kHz mono audio that training reads "
        "without a scan; started again after an interruption, it goes on.",
    )
    add = parser.add_argument
    add("--out", required=True, help="folder of the shards: give it to training as --data_folder")
    add("--data_folder", help="any folder of audio files or tar shards")
    add("--train_csv", help="SpeechBrain's columns; relative paths begin in --data_folder")
    add("--shard", type=str, help="i/n: prepare this one of n shares (torchrun: one a process)")
    add("--format", choices=tuple(FORMATS), default="flac", help="of the audio in the shards")
    add("--shard_bytes", type=float, default=SHARD_BYTES, help="of one tar, about")
    add("--min_seconds", type=float, default=0.2, help="shorter files are skipped")
    add("--num_threads", type=int, help="that decode (one for each CPU)")
    add("--engine", choices=("process", "ray"), default="process", help="what prepares")
    add("--address", default="local", help="of the Ray cluster: auto, or host:port")
    add("--shares", type=int, help="on Ray: how many (four for each task that runs at once)")
    add("--check", action="store_true", help="write nothing: say whether all shares are there")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            print(f"{options.out} is complete: {summary(check_shares(options.out))}")
            return
        if options.engine == "ray":
            prepared = prepare_on_ray(
                options.address,
                options.out,
                options.shares,
                options.num_threads,
                data_folder=options.data_folder,
                train_csv=options.train_csv,
                kind=options.format,
                shard_bytes=int(options.shard_bytes),
                min_seconds=options.min_seconds,
            )
            print(f"{options.out} is complete: {summary(prepared)}")
            return
        torch.set_num_threads(1)
        share = Share.parse(options.shard) if options.shard else own_share()
        began = time.perf_counter()
        prepared = prepare(
            options.out,
            options.data_folder,
            options.train_csv,
            share,
            options.format,
            int(options.shard_bytes),
            options.min_seconds,
            options.num_threads,
        )
    except (OSError, ValueError, FolderInUse) as error:
        raise SystemExit(f"prepare: {error}") from error
    minutes = (time.perf_counter() - began) / 60
    print(f"share {share} in {options.out}: {summary(prepared)}; {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
