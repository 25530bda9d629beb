"""What a run spends beside the products of its steps, before and after, in one run.

    python benchmarks/beside_the_step.py --size base

"Before" is the plain way, written out here; "after" is what the package does. The two take turns;
times are CPU seconds of this process where nothing is waited for, else seconds, medians of the
rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from pretrain_step import SIZES, STRATEGIES, OurStep
from torch.multiprocessing import spawn

from speechbrain_jepa.checkpointer import AtomicCheckpointer
from speechbrain_jepa.data import CropDataset, CropSampler, crop_loader, scan_folder
from speechbrain_jepa.monitors import effective_rank
from speechbrain_jepa.validation import KeptBatches
from speechbrain_jepa.vit import PatchGrid

SIZES["quickstart"] = (
    dict(dim=192, depth=4, num_heads=3),
    dict(dim=96, depth=2, num_heads=3),
)
RATE = 0.9999
PARTS = ("ema", "rank", "clips", "checkpoint", "agree")


def take_turns(ways: dict, repeats: int, clock=time.process_time) -> dict[str, float]:
    """Median seconds of each way; the first round does not count."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, way in ways.items():
            start = clock()
            way()
            rounds[name].append(clock() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in rounds.items()}


def show(what: str, seconds: dict[str, float], base: str = "before") -> None:
    for name, value in seconds.items():
        ratio = seconds[base] / value
        print(f"| {what} | {name} | {1000 * value:.4g} | {ratio:.3g} |", flush=True)


def ema(step: OurStep, repeats: int) -> None:
    """A moving average of the weights: plain, compensated in six passes, and in two."""
    jepa = step.jepa
    target = [p.data for p in jepa.target_encoder.parameters()]
    rest = [p.data for p in jepa.target_rest]
    context = [p.data for p in jepa.context_encoder.parameters()]

    def plain():
        torch._foreach_lerp_(target, context, 1 - RATE)

    def six_passes():
        group, held = [], 0
        for number, row in enumerate(zip(target, rest, context), 1):
            group.append(row)
            held += row[0].numel()
            if held >= 2**20 or number == len(target):
                update(*map(list, zip(*group)))
                group, held = [], 0

    def update(target, rest, context):
        scratch = torch._foreach_sub(context, target)
        torch._foreach_add_(rest, scratch, alpha=1 - RATE)
        torch._foreach_copy_(scratch, target)
        torch._foreach_add_(target, rest)
        torch._foreach_sub_(scratch, target)
        torch._foreach_add_(rest, scratch)

    ways = {"before": six_passes, "after": lambda: jepa.update_target(RATE), "plain": plain}
    show("EMA", take_turns(ways, repeats))


def rank(dim: int, repeats: int) -> None:
    """The effective rank of a validation batch of 256 clips' patches."""
    rows = torch.randn(256 * 65, dim)

    def svd():
        singular = torch.linalg.svdvals(rows)
        shares = singular / singular.sum()
        return torch.special.entr(shares).sum().exp().item()

    ways = {"before": svd, "after": lambda: effective_rank(rows)}
    assert abs(svd() / effective_rank(rows) - 1) < 1e-4
    show(f"effective rank, {len(rows)} x {dim}", take_turns(ways, repeats))


def validation_clips(clips: int, repeats: int) -> None:
    """Reading a validation set of flac files of ten seconds, in a round that is not the first."""
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        for number in range(clips):
            noise = random.normal(0, 0.1, 160_000)
            soundfile.write(Path(folder) / f"{number}.flac", noise, 16_000)
        manifest, _ = scan_folder(folder, Path(folder) / "cache", progress=False)
        dataset = CropDataset(manifest, folder, random_crops=False)
        loader = crop_loader(dataset, CropSampler(len(dataset), 64, shuffle=False))
        kept = KeptBatches(loader)
        ways = {"before": lambda: list(loader), "after": lambda: list(kept)}
        show(f"{clips} validation clips, read", take_turns(ways, repeats))


def checkpoint(step: OurStep, repeats: int) -> None:
    """How long training stands still, and how long until the checkpoint is on the disk."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpointer = AtomicCheckpointer(folder, {"jepa": step.jepa, "optimizer": step.optimizer})
        held, whole = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            checkpointer.save_and_keep_only(verbosity=0)
            held.append(time.perf_counter() - start)
            checkpointer.finish()
            whole.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
    seconds = {"before": statistics.median(whole), "after": statistics.median(held)}
    show(f"checkpoint of {size / 1e6:.0f} MB, training held", seconds)


def _agree(rank: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    ways = {"before": lambda: torch.distributed.broadcast_object_list([False], src=0)}
    seconds = take_turns(ways, 100 * repeats, time.perf_counter)
    if not rank:
        print(
            f"| agreeing on a checkpoint, 2 processes | before: every batch | "
            f"{1000 * seconds['before']:.3g} | 1 |\n"
            f"| | after: every 50 batches | {1000 * seconds['before'] / 50:.3g} | 50 |"
        )
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    grid = PatchGrid()
    encoder, predictor = SIZES[args.size]
    masking = STRATEGIES["unstructured"](grid)
    step = OurStep(grid, encoder, predictor, masking, "cpu", torch.bfloat16)

    print(f"{args.size}, {args.threads} threads, torch {torch.__version__}\n")
    print("| what | way | ms | times as fast |\n|---|---|---|---|")
    if "ema" in args.parts:
        ema(step, args.repeats)
    if "rank" in args.parts:
        rank(encoder["dim"], args.repeats)
    if "clips" in args.parts:
        validation_clips(128, args.repeats)
    if "checkpoint" in args.parts:
        step(torch.randn(1, grid.bands, grid.frames))  # the optimiser has its moments
        checkpoint(step, args.repeats)
    if "agree" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_agree, (folder, args.repeats), nprocs=2)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
