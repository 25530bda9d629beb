"""CPU time of a training step with each option of the recipe, beside the plain step.

    python benchmarks/step_options.py
    python benchmarks/step_options.py --dim 768 --depth 12 --heads 12 --predictor 512 8 16

Of the quickstart's encoder unless asked for another; one thread, in turns, medians of the rounds.
It is the process's own time: what else the machine does is not in it. A step sees as many clips
whatever the option, so that with many masks it computes more for each.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace

import torch

from speechbrain_jepa.augment import Augment
from speechbrain_jepa.features import LogMelSpectrogram, crop_samples
from speechbrain_jepa.inverse_blocks import InverseBlockMasking
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import UnstructuredMasking, for_grid
from speechbrain_jepa.optimizers import make_optimizer
from speechbrain_jepa.regularizers import SIGReg, VarianceCovariance
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor


@dataclass
class Option:
    """What is other than in the plain step."""

    jepa: dict = field(default_factory=dict)
    predictor: dict = field(default_factory=dict)
    masks_per_clip: int = 1
    inverse: bool = False
    share: float | None = None
    frames: int = 208
    muon: bool = False
    augment: Augment | None = None
    n_fft: int = 400


LATENT = {"target_masking": "latent"}
OPTIONS = {
    "plain": Option(),
    "latent": Option(LATENT),
    "latent, targets of all layers": Option({**LATENT, "target_layers": "all"}),
    "latent, 8 inverse block masks a clip": Option(LATENT, masks_per_clip=8, inverse=True),
    "cross-attention in the predictor": Option(predictor={"cross_attention": True}),
    "half of the targets": Option(share=0.5),
    "crops of 96 frames, 69 in place of 32": Option(frames=96),
    "Muon": Option(muon=True),
    "background and gain": Option(augment=Augment(0.3, 6.0)),
    "n_fft 1024": Option(n_fft=1024),
}
# a few hundredths of a step, which its noise would hide: timed by themselves, forward and backward
REGULARIZERS = {"VarianceCovariance": VarianceCovariance, "SIGReg": SIGReg}
CALLS = 20  # of a regulariser in a round


def make_step(option: Option, args):
    """A callable that trains one step."""
    torch.manual_seed(0)
    grid = PatchGrid(frames=208)
    dim, depth, heads = args.predictor
    jepa = JEPA(
        Encoder(grid, args.dim, args.depth, args.heads),
        Predictor(grid, args.dim, dim, depth, heads, **option.predictor),
        SmoothL1(),
        **option.jepa,
    )
    parameters = [p for p in jepa.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, jepa, option.muon, lr=1e-3, fused=True)
    masking = UnstructuredMasking(grid)
    if option.inverse:
        masking = InverseBlockMasking(grid)
    masking = for_grid(masking, PatchGrid(frames=option.frames))
    features = LogMelSpectrogram(option.n_fft)
    clips = args.batch * 208 // option.frames
    wav = torch.randn(clips, crop_samples(option.frames, option.n_fft))

    def step():
        heard = wav if option.augment is None else option.augment(wav)
        spectrogram = features(heard, margins=True)
        masks = replace(masking(clips * option.masks_per_clip), frames=option.frames)
        if option.share is not None:
            masks = masks.predicting(option.share)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = jepa(spectrogram, masks).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=True)
        optimizer.step()
        jepa.update_target(0.99)

    return step


def make_terms(regularizer, args):
    """A callable that computes a regulariser and its gradient, for the tokens of a plain step."""
    patches = UnstructuredMasking(PatchGrid(frames=208)).num_context
    tokens = torch.randn(args.batch, patches, args.dim, requires_grad=True)
    module = regularizer()

    def terms():
        for _ in range(CALLS):
            module(tokens).backward()

    return terms


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="clips of 208 frames")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--predictor", type=int, nargs=3, default=(96, 2, 3))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: make_step(option, args) for name, option in OPTIONS.items()}
    steps |= {name: make_terms(regularizer, args) for name, regularizer in REGULARIZERS.items()}
    rounds = []
    for _ in range(1 + args.repeats):
        times = {}
        for name, step in steps.items():
            start = time.process_time()
            step()
            calls = CALLS if name in REGULARIZERS else 1
            times[name] = (time.process_time() - start) / calls
        rounds.append(times)
    print("| step | ms | of the plain one |\n|---|---|---|")
    for name in steps:
        ms = 1000 * statistics.median(times[name] for times in rounds[1:])
        ratio = statistics.median(times[name] / times["plain"] for times in rounds[1:])
        if name in REGULARIZERS:
            print(f"| {name}, by itself | {ms:.1f} | {ratio:.3f} |")
        else:
            print(f"| {name} | {ms:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
