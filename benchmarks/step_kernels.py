"""What a pretraining step is made of, counted: operations of PyTorch that compute or copy.

    python benchmarks/step_kernels.py

Counted on ViT-Base's layers at an eighth of their width, in bf16, with sdpa, on a CPU: the numbers
depend on neither. A GPU launches a kernel for each, a few for those of many tensors ("_foreach",
"_fused"). Views are left out.
"""

import argparse
import time
from collections import Counter
from unittest import mock

import numpy as np
import torch
from pretrain_step import SIZES, STRATEGIES, OurStep
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_jepa.vit import PatchGrid

ENCODER = dict(dim=96, depth=12, num_heads=12, attention="sdpa")
PREDICTOR = dict(dim=64, depth=8, num_heads=16, attention="sdpa")
WITHOUT_KERNELS = ("detach", "_unsafe_view", "empty_like", "_record_function")


class Counted(TorchDispatchMode):
    """Operations by kind while it is entered.

    Arguments
    ---------
    parameters : iterable of parameters
        Whose casts, and whose gradients' casts, are kinds of their own.
    """

    def __init__(self, parameters):
        super().__init__()
        self.kinds: Counter[str] = Counter()
        parameters = list(parameters)
        self.weights = {id(parameter) for parameter in parameters}
        self.shapes = {parameter.shape for parameter in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(WITHOUT_KERNELS):
            self.kinds[self._kind(name, args, out)] += 1
        return out

    def _kind(self, name: str, args, out) -> str:
        if name == "_to_copy":
            if id(args[0]) in self.weights:
                return "casts of weights"
            is_gradient = out.dtype == torch.float32 and out.shape in self.shapes
            return "casts of gradients" if is_gradient else "other casts"
        if name.startswith(("_foreach", "_fused")):
            return "of many tensors"
        return "other copies" if name in ("clone", "copy_", "cat", "stack") else "the rest"


def one_by_one():
    """While it is entered, layers cast each weight by itself (before), as compiled code does."""
    return mock.patch.object(torch.compiler, "is_compiling", lambda: True)


def cpu_seconds(step, spectrogram) -> float:
    start = time.process_time()
    step(spectrogram)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=31, help="of timed steps; 0: count alone")
    pairs = parser.parse_args().pairs
    torch.manual_seed(0)
    torch.set_num_threads(1)
    grid = PatchGrid()
    masking = STRATEGIES["unstructured"](grid)
    step = OurStep(grid, ENCODER, PREDICTOR, masking, "cpu", torch.bfloat16)
    spectrogram = torch.randn(4, grid.bands, grid.frames)
    step(spectrogram)  # the optimiser makes its state
    with one_by_one(), Counted(step.jepa.parameters()) as before:
        step(spectrogram)
    with Counted(step.jepa.parameters()) as after:
        step(spectrogram)
    print("| operations of a step | weights cast one by one | a layer's together |\n|---|---|---|")
    for kind in after.kinds | before.kinds:
        print(f"| {kind} | {before.kinds[kind]} | {after.kinds[kind]} |")
    print(f"| all | {before.kinds.total()} | {after.kinds.total()} |")
    if not pairs:
        return
    print("\n| layers of | clips | CPU time together / one by one: median of pairs | quartiles |")
    print("|---|---|---|---|")
    for size, clips in (("tiny", 4), ("tiny", 32), ("base", 4)):
        step = OurStep(grid, *SIZES[size], masking, "cpu", torch.bfloat16)
        spectrogram = torch.randn(clips, grid.bands, grid.frames)
        step(spectrogram)
        ratios = []
        for _ in range(pairs):
            together = cpu_seconds(step, spectrogram)
            with one_by_one():
                ratios.append(together / cpu_seconds(step, spectrogram))
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(f"| ViT-{size.title()} | {clips} | {median:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
