"""Speed of one whole pretraining step, ours and the plain reference's, side by side in one run.

    python benchmarks/pretrain_step.py --size base --batch 64 --precision bf16

A step is all of it: masks, both encoders, predictor, loss, backward, gradient clip, AdamW, EMA.
The two steps and the matrix product take turns, so that what else the machine does hits all
alike; times are medians. GFLOP per clip are what FlopCounterMode counts in the reference's step,
and both rates are taken of that same count.
"""

import torch
from torch.utils.flop_counter import sdpa_flop

from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.masking import MultiBlockMasking, TimeMasking, UnstructuredMasking
from speechbrain_jepa.vit import Encoder, Predictor

SIZES = {  # encoder, predictor: the paper's Base, and M2D's smaller cuts of it
    "base": (dict(dim=768, depth=12, num_heads=12), dict(dim=512, depth=8, num_heads=16)),
    "small": (dict(dim=384, depth=12, num_heads=6), dict(dim=256, depth=8, num_heads=8)),
    "tiny": (dict(dim=192, depth=12, num_heads=3), dict(dim=128, depth=8, num_heads=4)),
}
STRATEGIES = {
    "unstructured": UnstructuredMasking,
    "multiblock": MultiBlockMasking,
    "time": TimeMasking,
}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_FLOPS = {  # the counter knows the CUDA kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
}


class OurStep:
    """The same step with speechbrain_jepa: what `JEPABrain` does with one batch."""

    def __init__(self, grid, encoder, predictor, strategy, device, dtype, compile):
        self.device, self.dtype = torch.device(device), dtype
        self.masking = STRATEGIES[strategy](grid)
        self.jepa = JEPA(
            Encoder(grid, **encoder), Predictor(grid, encoder["dim"], **predictor), SmoothL1()
        ).to(device)
        self.forward = torch.compile(self.jepa) if compile else self.jepa
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
        torch.nn.utils.clip_grad_norm_(self.parameters, 3.0)
        self.optimizer.step()
        self.jepa.update_target(rate=0.999)
        return loss.detach()
