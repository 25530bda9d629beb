"""Speed of one whole pretraining step, ours and a plain reference's, side by side in one run.

    python benchmarks/pretrain_step.py --size base --batch 64 --precision bf16
    python benchmarks/pretrain_step.py --device cuda --batch 256 512 1024 2048 --csv steps.csv

A step is all of it: masks, both encoders, predictor, loss, backward, gradient clip, AdamW, EMA.
The two steps (`OurStep` below, `reference_step.py`), each in a process of its own, and a matrix
product take turns, so that whatever else the machine does hits all alike; times are medians of the
rounds, with `--threads 1` on a CPU of the process's own time. GFLOP per clip are what
FlopCounterMode counts in the reference's step; both rates are taken of that same count, so that
work we save shows as speed. Ragged masks (multiblock, time) have no plain counterpart: there our
own step is counted, padding included. Several batch sizes are measured one after the other by the
same processes.
"""

import argparse
import csv
import multiprocessing
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from reference_step import ReferenceStep
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import MultiBlockMasking, TimeMasking, UnstructuredMasking
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

SIZES = {  # encoder, predictor
    "base": (dict(dim=768, depth=12, num_heads=12), dict(dim=512, depth=8, num_heads=16)),
    "small": (dict(dim=384, depth=12, num_heads=6), dict(dim=256, depth=8, num_heads=8)),
    "tiny": (dict(dim=192, depth=12, num_heads=3), dict(dim=128, depth=8, num_heads=4)),
    "toy": (dict(dim=24, depth=1, num_heads=3), dict(dim=24, depth=1, num_heads=3)),
}
STRATEGIES = {
    "unstructured": UnstructuredMasking,
    "multiblock": MultiBlockMasking,
    "time": TimeMasking,
}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCT = {  # rows, inner, columns
    "cpu": (2048, 768, 3072),  # the MLP of 2048 tokens of ViT-Base
    "cuda": (8192, 8192, 8192),  # large enough to show the card's own rate
}
WARMUP_STEPS = 3


class OurStep:
    """One step with speechbrain_jepa, as `JEPABrain` takes it."""

    def __init__(self, grid, encoder, predictor, masking, device, dtype, compiled=False):
        self.device, self.dtype, self.masking = torch.device(device), dtype, masking
        self.jepa = JEPA(
            Encoder(grid, **encoder), Predictor(grid, encoder["dim"], **predictor), SmoothL1()
        ).to(device)
        self.forward = torch.compile(self.jepa) if compiled else self.jepa
        self.parameters = [p for p in self.jepa.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self, spectrogram):
        masks = self.masking(len(spectrogram), device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.forward(spectrogram, masks).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 3.0, foreach=True)
        self.optimizer.step()
        self.jepa.update_target(rate=0.999)
        return loss.detach()


def build(which: str, args):
    """ "ours" or "reference": a callable that trains one step, and one that makes a batch."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    grid = PatchGrid(frames=args.frames)
    encoder, predictor = SIZES[args.size]
    masking = STRATEGIES[args.strategy](grid)
    dtype = PRECISIONS[args.precision]
    if which == "ours":
        step = OurStep(grid, encoder, predictor, masking, args.device, dtype, args.compile)
    else:
        targets = grid.num_patches - masking.num_context
        step = ReferenceStep(grid, encoder, predictor, targets, args.device, dtype)
    return step, lambda clips: torch.randn(clips, grid.bands, grid.frames, device=args.device)


def count_flops(step, batch) -> int:
    """Of matrix products and attention, forward and backward; 2 a multiply-add."""
    aten = torch.ops.aten
    cpu_kernels = {  # the counter knows CUDA's attention kernels only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_kernels) as counter:
        step(batch)
    return counter.get_total_flops()


def seconds(work, device: str) -> float:
    """Of the clock; of one thread on a CPU the process's own, which other work leaves alone."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def serve(which: str, args, pipe) -> None:
    """A process that is told to prepare a batch of so many clips, to take a step, or to end."""
    step, make_batch = build(which, args)
    batch = None
    for order, clips in iter(pipe.recv, ("end", None)):
        if order == "step":
            pipe.send(seconds(partial(step, batch), args.device))
            continue
        batch = None  # its memory is free before the next one is made
        try:
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            batch = make_batch(clips)
            for _ in range(WARMUP_STEPS):
                step(batch)
            memory = peak_memory(args.device)
            pipe.send((memory, count_flops(step, batch) if which == args.counted else None))
        except torch.OutOfMemoryError:
            step.optimizer.zero_grad()
            pipe.send((None, None))


def peak_memory(device: str) -> int:
    """Bytes; on a CPU the process's own peak, over all its batches."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Process:
    """One of the steps, in a process of its own: neither sees the other's freed memory."""

    def __init__(self, which: str, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(which, args, other), daemon=True)
        self.process.start()
        other.close()  # so that a process that dies is an EOFError here

    def ask(self, order: str, clips: int | None = None):
        self.pipe.send((order, clips))
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(("end", None))
        self.process.join()


def matrix_product(args):
    """The product repeated for a tenth of a second or so, and its FLOPs."""
    rows, inner, columns = PRODUCT[args.device]
    dtype = PRECISIONS[args.precision]
    left = torch.randn(rows, inner, device=args.device).to(dtype)
    right = torch.randn(inner, columns, device=args.device).to(dtype)
    for _ in range(WARMUP_STEPS):
        seconds(lambda: torch.mm(left, right), args.device)
    once = seconds(lambda: torch.mm(left, right), args.device)
    times = max(3, round(0.1 / once))
    return lambda: [torch.mm(left, right) for _ in range(times)], times * 2 * rows * inner * columns


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--strategy", choices=STRATEGIES, default="unstructured")
    parser.add_argument("--frames", type=int, default=208, help="of a crop: 208, 320 or 640")
    parser.add_argument("--compile", action="store_true", help="torch.compile our model")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--csv", type=Path, help="file that gets a line for each step and batch")
    return parser.parse_args()


def measure(clips: int, steps: dict, product, product_flops: int, args) -> None:
    """One batch size: print its table, and append its rows."""
    prepared = {name: step.ask("prepare", clips) for name, step in steps.items()}
    flops = prepared[args.counted][1]
    if flops is None:
        print(f"batch {clips}: out of memory ({args.counted}), nothing to compare with\n")
        return
    names = [name for name, (memory, _) in prepared.items() if memory is not None]
    turns = {name: lambda name=name: steps[name].ask("step") for name in names}
    turns["product"] = lambda: seconds(product, args.device)
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(1 + args.repeats)][1:]
    median = {name: statistics.median(times[name] for times in rounds) for name in turns}
    peak = product_flops / median["product"]

    compiled = ", compiled" if args.compile else ""
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    print(
        f"ViT-{args.size.capitalize()}, batch {clips}, {args.frames} frames, "
        f"{args.precision}, {args.strategy}{compiled}; {where}, torch {torch.__version__}; "
        f"{args.repeats} rounds\n"
        f"{flops / clips / 1e9:.2f} GFLOP per clip; matrix product "
        f"{' x '.join(map(str, PRODUCT[args.device]))}: {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| step | clips/s | GFLOP/s | of the product | peak memory, GB |\n|---|---|---|---|---|")
    for name in names:
        rate, memory = flops / median[name], prepared[name][0] / 1e9
        row = {
            "size": args.size,
            "strategy": args.strategy,
            "batch": clips,
            "step": name,
            "compiled": args.compile and name == "ours",
            "clips/s": f"{clips / median[name]:.4g}",
            "GFLOP/s": f"{rate / 1e9:.0f}",
            "of the product": f"{rate / peak:.2f}",
            "peak memory, GB": f"{memory:.2f}",
        }
        print(f"| {name} | {' | '.join(list(row.values())[5:])} |")
        if args.csv is not None:
            append(args.csv, {**row, "device": where, "precision": args.precision})
    if len(names) == 2:
        ratios = sorted(times["reference"] / times["ours"] for times in rounds)
        print(
            f"\nours / reference: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in single rounds)"
        )
    print(flush=True)


def append(path: Path, row: dict) -> None:
    begin = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if begin:
            writer.writeheader()
        writer.writerow(row)


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)  # of the product
    names = ["ours", "reference"] if args.strategy == "unstructured" else ["ours"]
    args.counted = names[-1]
    steps = {name: Process(name, args) for name in names}
    product = matrix_product(args)
    for clips in args.batch:
        measure(clips, steps, *product, args)
    for step in steps.values():
        step.end()


if __name__ == "__main__":
    sys.exit(main())
