"""What a pretraining step is made of, counted: operations of PyTorch that compute or copy.

    python benchmarks/step_kernels.py

ViT-Base's layers at an eighth of their width, in bf16, with scaled_dot_product_attention, on a CPU:
the numbers depend on neither. A GPU launches a kernel for each, a few for those of many tensors
("_foreach", "_fused"). Views are left out.
"""

from collections import Counter

import torch
from pretrain_step import STRATEGIES, OurStep
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


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    grid = PatchGrid()
    masking = STRATEGIES["unstructured"](grid)
    step = OurStep(grid, ENCODER, PREDICTOR, masking, "cpu", torch.bfloat16)
    spectrogram = torch.randn(4, grid.bands, grid.frames)
    step(spectrogram)  # the optimiser makes its state
    with Counted(step.jepa.parameters()) as counted:
        step(spectrogram)
    total = counted.kinds.total()
    print("| operations of a step | number | share |\n|---|---|---|")
    for kind, number in [*counted.kinds.most_common(), ("all", total)]:
        print(f"| {kind} | {number} | {100 * number / total:.0f} % |")


if __name__ == "__main__":
    main()
