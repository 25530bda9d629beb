"""Forward and backward of the attention backends on one device, side by side in one run.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --batch 2048

Rows are those of ViT-Base at the three durations: what the context encoder, the target encoder and
the predictor see, without padding, and with a third of the keys masked out. Times are medians of
rounds in which the backends take turns.
"""

import argparse
import statistics
import time

import torch

from speechbrain_jepa.attention import Rows, choose_backend

ROWS = {  # tokens, heads, dims of a head
    "context, 208 frames": (26, 12, 64),
    "targets, 208 frames": (39, 12, 64),
    "all, 208 frames": (65, 12, 64),
    "predictor, 208 frames": (65, 16, 32),
    "all, 320 frames": (100, 12, 64),
    "all, 640 frames": (200, 12, 64),
}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def backends(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Names in the table and what to ask `Rows` for."""
    names = {"sdpa": "sdpa"}
    fastest = choose_backend("auto", torch.device(device), dtype)
    return names | {fastest: "auto"}


def forward_backward(attention, batch, tokens, heads, head_dim, masked, device, dtype):
    """A function that takes the attention of a batch of rows, there and back."""
    dim = heads * head_dim
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * dim, generator=generator).to(device, dtype)
    qkv.requires_grad_()
    valid = None
    if masked:
        valid = (torch.rand(batch, tokens, generator=generator) > 1 / 3).to(device)
        valid[:, 0] = True
    grad = torch.ones(batch, tokens, dim, dtype=dtype, device=device)

    def work():
        rows = Rows(attention, qkv[..., :dim], valid)
        out = rows.unpack(rows.attend(rows.pack(qkv), heads))
        out.backward(grad)
        qkv.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    return work


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    return parser.parse_args()


def main():
    args = parse_arguments()
    dtype = PRECISIONS[args.precision]
    names = backends(args.device, dtype)
    print(f"Forward and backward in ms, batch {args.batch}, {args.precision}, {args.device}\n")
    print("| rows | keys | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for title, (tokens, heads, head_dim) in ROWS.items():
        for masked in (False, True):
            works = {
                name: forward_backward(
                    ask, args.batch, tokens, heads, head_dim, masked, args.device, dtype
                )
                for name, ask in names.items()
            }
            for work in works.values():
                work()
            rounds = [
                {name: seconds(work) for name, work in works.items()} for _ in range(args.repeats)
            ]
            cells = [
                f"{1000 * statistics.median(times[name] for times in rounds):.2f}" for name in names
            ]
            keys = "masked" if masked else "all"
            print(f"| {title} ({tokens}) | {keys} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
