"""Hours of audio embedded a minute, and the share of the machine's matrix-product rate in that.

    python benchmarks/embed.py
    python benchmarks/embed.py --device cuda --seconds 36000

Random noise in clips of 10 s through `AudioJEPA.embed`, log-mel included, reading files not. The
rate of matrix products is that of one large product in the same precision on the same threads,
taken in turns with the encoder. Products counted: linear layers and attention of the encoder.
"""

import argparse
import time

import torch

from speechbrain_jepa.embed import PRECISIONS
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import SAMPLE_RATE, Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

SIZES = {"ViT-Tiny": (192, 12, 3), "ViT-Base": (768, 12, 12)}  # dims, layers, heads
CLIP_SECONDS = 10
PRODUCT = {  # a GPU needs a larger one to show its rate
    "cpu": ((4096, 768), (768, 3072)),
    "cuda": ((8192, 8192), (8192, 8192)),
}


def product_flops(model: AudioJEPA, samples: int) -> float:
    """Floating-point operations of the products for one clip: 2 for each multiplication."""
    grid, dim, depth = model.encoder.grid, model.encoder.dim, len(model.encoder.blocks)
    steps, flops = model.num_steps(samples), 0.0
    while steps > 0:
        tokens = min(steps, grid.time_patches) * grid.frequency_patches
        linear = 12 * dim * dim * depth + grid.patch_values * dim
        flops += 2 * tokens * (linear + 2 * tokens * dim * depth)
        steps -= grid.time_patches
    return flops


def timed(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=int, default=320, help="of audio in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the fastest counts")
    return parser.parse_args()


@torch.inference_mode()
def main():
    args = parse_arguments()
    clips = max(args.seconds // CLIP_SECONDS, 1)
    wav = torch.randn(clips, CLIP_SECONDS * SAMPLE_RATE).to(args.device)
    print(f"{clips} clips of {CLIP_SECONDS} s, {args.device}, {torch.get_num_threads()} threads\n")
    print("| encoder | precision | hours of audio a minute | GFLOP/s | of one product's rate |")
    print("|---|---|---|---|---|")
    for size in args.sizes:
        dim, depth, heads = SIZES[size]
        encoder = Encoder(PatchGrid(), dim=dim, depth=depth, num_heads=heads)
        model = AudioJEPA((encoder, Normalization(-7.06, 4.19)), device=args.device)
        flops = product_flops(model, wav.shape[1]) * clips
        for precision in args.precisions:
            dtype = PRECISIONS[precision]
            left, right = (
                torch.randn(shape, device=args.device, dtype=dtype or torch.float32)
                for shape in PRODUCT[args.device]
            )

            def embed(model=model, dtype=dtype):
                with torch.autocast(args.device, dtype, enabled=dtype is not None):
                    model.embed(wav)

            def product(left=left, right=right):
                left @ right

            embed()
            product()
            rounds = [
                (timed(embed, args.device), timed(product, args.device))
                for _ in range(args.repeats)
            ]
            seconds, product_seconds = (min(times) for times in zip(*rounds))
            rate = flops / seconds / 1e9
            product_rate = 2 * left.numel() * right.shape[1] / product_seconds / 1e9
            hours = clips * CLIP_SECONDS / 3600 / (seconds / 60)
            share = f"{100 * rate / product_rate:.0f} % of {product_rate:.0f}"
            print(f"| {size} | {precision} | {hours:.2f} | {rate:.0f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
