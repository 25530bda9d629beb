"""Two million files on 1, 8 and 64 GPUs, on paper: what each part of a run costs there.

    python benchmarks/scale.py

The first table is measured here: CPU time of a file, a crop or a step, which other work on the
machine changes little. The second is arithmetic from it and from what is assumed of GPUs, networks
and CPUs (`--gpu_tflops`, `--network_gbit`, `--cpus`), which nothing here measures: the products of
ViT-Base, counted by running one step, over that rate. Two processes that talk over gloo show what
can be shown here of more than one: that together they read no file of an epoch twice, and what
agreeing on something costs them.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from embed import SIZES as ENCODERS
from embed import product_flops
from loading import noise, quickest
from pretrain_step import SIZES, ReferenceStep, count_flops
from torch.multiprocessing import start_processes

from speechbrain_jepa.data import CropSampler, scan_folder, shards
from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.data.crops import read_crop, read_crops
from speechbrain_jepa.data.listing import list_audio
from speechbrain_jepa.embedding_parts import Embeddings, write_part
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.prepare import prepare
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

FRAMES, SECONDS = 208, 10
CLIP = SECONDS * 16_000
GPUS = (1, 8, 64)
DIMS = 3840  # of an embedding of ViT-Base
CROPS = 8  # from one opening
PATH = "a" * 40 + "/{:07d}.flac"


def cpu_seconds(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measured(root: Path, args) -> dict[str, float]:
    """CPU seconds of one of each."""
    corpus, out = root / "corpus", root / "prepared"
    corpus.mkdir()
    costs: dict[str, float] = {}
    for number in range(args.files):
        wav = noise(SECONDS, 44_100, 2, seed=number)
        soundfile.write(corpus / f"{number}.mp3", wav, 44_100, format="MP3")
    many = root / "many"
    many.mkdir()
    for number in range(args.names):
        (many / f"{number}.flac").touch()
    costs["list a file"] = cpu_seconds(lambda: list_audio(str(many))) / args.names
    options = dict(progress=False)
    linked = root / "linked"
    linked.mkdir()
    for number in range(args.scanned):
        os.link(corpus / "0.mp3", linked / f"{number}.mp3")
    scanned = cpu_seconds(lambda: scan_folder(linked, root / "cache", **options))
    costs["list and scan a file"] = scanned / args.scanned
    costs["prepare a file"] = (
        cpu_seconds(lambda: prepare(out, corpus, num_threads=1, **options)) / args.files
    )
    manifest, _ = scan_folder(out, root / "read back", **options)
    member = shards.join(out, manifest.path(0))
    length, firsts = int(manifest.length[0]), np.linspace(0, 1000 - FRAMES, CROPS).astype(int)
    mp3 = corpus / "0.mp3"
    one, eight, raw, whole, whole_mp3 = quickest(
        lambda: read_crop(member, 300, FRAMES, 16_000, 0, length),
        lambda: read_crops(member, firsts.tolist(), FRAMES, 16_000, 0, length),
        lambda: read_crop(mp3, 300, FRAMES, 44_100, 0, SECONDS * 44_100),
        lambda: read_audio(member),
        lambda: read_audio(mp3),
        rounds=args.rounds,
    )
    costs["a crop of mp3, 44.1 kHz stereo"] = raw / 1000
    costs["a crop of prepared FLAC"] = one / 1000
    costs[f"a crop, {CROPS} from one opening"] = eight / CROPS / 1000
    costs["a whole prepared file"] = whole / 1000
    costs["a whole mp3"] = whole_mp3 / 1000
    costs |= embeddings(root, args)
    size = sum(shard.stat().st_size for shard in out.rglob("*.tar"))
    costs["bytes"] = size / args.files
    return costs


def embeddings(root: Path, args) -> dict[str, float]:
    """Writing parts of a share, and joining two shares."""
    parts = root / "emb.npy.parts"
    folders = [parts / "0", parts / "1"]
    files = [PATH.format(number) for number in range(args.rows)]
    rows = np.random.default_rng(0).normal(size=(args.rows, 1, DIMS)).astype("f4")
    for folder in folders:
        folder.mkdir(parents=True)

    def write():
        for share, folder in enumerate(folders):
            mine = range(share, args.rows, 2)
            write_part(folder / "part-000000.npz", [(files[i], rows[i]) for i in mine])

    written = cpu_seconds(write)
    joined = cpu_seconds(
        lambda: Embeddings(root / "emb.npy", parts, {}, folders).finish(files, None)
    )
    assert np.array_equal(np.load(root / "emb.npy"), rows[:, 0])
    return {"write an embedding": written / args.rows, "join an embedding": joined / args.rows}


def products() -> tuple[float, float, int]:
    """Operations of a crop's step and of embedding a file, and weights trained, of ViT-Base."""
    grid = PatchGrid(frames=FRAMES)
    encoder, predictor = SIZES["base"]
    step = ReferenceStep(grid, encoder, predictor, 39, "cpu", torch.bfloat16)
    step_flops = count_flops(step, torch.randn(1, grid.bands, grid.frames))
    dim, depth, heads = ENCODERS["ViT-Base"]
    model = Encoder(grid, dim=dim, depth=depth, num_heads=heads)
    trained = [*model.parameters(), *Predictor(grid, dim, **predictor).parameters()]
    weights = sum(weight.numel() for weight in trained if weight.requires_grad)
    audio_jepa = AudioJEPA((model, Normalization(-7.06, 4.19)))
    return step_flops, product_flops(audio_jepa, CLIP), weights


def _process(rank: int, folder: str, files: int, repeats: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    sampler = CropSampler(files, 32, rank=rank, world_size=2)
    drawn = [item for batch in sampler for _, item in batch]
    gathered: list = [None, None]
    torch.distributed.all_gather_object(gathered, drawn)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.distributed.broadcast_object_list([False], src=0)
    agreed = (time.perf_counter() - began) / repeats
    if not rank:
        times = Counter(item for items in gathered for item in items)
        twice = sum(count > 1 for count in times.values())
        print(
            f"\nTwo processes, an epoch of {files} files: {len(times)} read, {twice} of them "
            f"twice; agreeing on something takes {1000 * agreed:.2f} ms\n"
        )
    torch.distributed.destroy_process_group()


def table(costs: dict[str, float], counted: tuple[float, float, int], args) -> None:
    million = args.corpus / 1e6
    *flops, weights = counted
    rate, embedding_rate = (args.gpu_tflops * 1e12 / each for each in flops)
    rows: list[tuple] = []

    def row(what, unit, value):
        rows.append((what, unit, *(value(gpus) for gpus in GPUS)))

    row("crops learned from, by assumption", "a second", lambda n: rate * n)
    row("an epoch of the step alone", "s", lambda n: args.corpus / rate / n)
    for name in (n for n in costs if n.startswith("a crop")):
        row(f"loaders: {name}", "CPUs", lambda n, name=name: rate * n * costs[name])
    row(
        f"bytes read, a whole file for {CROPS} crops",
        "GB/s",
        lambda n: rate * n / CROPS * costs["bytes"] / 1e9,
    )
    row(
        "gradients, ring all-reduce, float32",
        "ms a step",
        lambda n: 2 * (n - 1) / n * 4 * weights * 8 / (args.network_gbit * 1e9) * 1000,
    )
    row("the step, 256 crops a GPU", "ms", lambda n: 1000 * 256 / rate)
    for name in ("list a file", "list and scan a file"):
        row(f"start: {name}", "CPU minutes", lambda n, name=name: args.corpus * costs[name] / 60)
    cpus = args.cpus
    prepared = costs["prepare a file"]
    row("prepare once", "minutes", lambda n: args.corpus * prepared / (cpus * n) / 60)
    row(
        "embed: the GPUs, by assumption", "minutes", lambda n: args.corpus / embedding_rate / n / 60
    )
    for name in ("a whole mp3", "a whole prepared file"):
        row(f"embed: decode {name}", "CPUs", lambda n, name=name: embedding_rate * n * costs[name])
    for name in ("a whole mp3", "a whole prepared file"):
        row(
            f"embed: {name}, {cpus} CPUs a GPU",
            "minutes",
            lambda n, name=name: (
                max(args.corpus / embedding_rate / n, args.corpus * costs[name] / (cpus * n)) / 60
            ),
        )
    written, joined = costs["write an embedding"], costs["join an embedding"]
    row("embed: write the parts", "minutes", lambda n: args.corpus * written / n / 60)
    row("embed: join", "minutes", lambda n: args.corpus * joined / 60)
    print(
        f"{million:g} million files of {SECONDS} s; {args.gpu_tflops:g} TFLOP/s a GPU, "
        f"{args.cpus} CPUs a GPU, {args.network_gbit:g} Gbit/s a GPU are assumed; "
        f"{flops[0] / 1e9:.2f} GFLOP a crop's step, {flops[1] / 1e9:.1f} a file's embedding\n"
    )
    head = ("", "unit", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS))
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for what, unit, *values in rows:
        print(f"| {what} | {unit} | {' | '.join(map(shown, values))} |")


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--corpus", type=float, default=2e6, help="files")
    add("--gpu_tflops", type=float, default=395, help="assumed of a GPU: 0.4 of an H100's 989")
    add("--network_gbit", type=float, default=400, help="assumed, of a GPU's link")
    add("--cpus", type=int, default=16, help="assumed, for each GPU")
    add("--files", type=int, default=24, help="written and prepared here")
    add("--scanned", type=int, default=1000, help="files scanned here")
    add("--names", type=int, default=20_000, help="files listed here")
    add("--rows", type=int, default=4000, help="embeddings written and joined here")
    add("--rounds", type=int, default=20, help="of each crop; the quickest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        costs = measured(Path(folder), args)
        print("| measured here | CPU ms |\n|---|---|")
        for name, seconds in costs.items():
            if name != "bytes":
                print(f"| {name} | {1000 * seconds:.3g} |")
        print(f"\nA prepared file has {costs['bytes'] / 1000:.0f} kB", flush=True)
        start_processes(_process, (folder, 10_001, 200), nprocs=2, start_method="fork")
    table(costs, products(), args)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
