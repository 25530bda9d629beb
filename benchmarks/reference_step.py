"""The plain way to write the same pretraining step: what `pretrain_step.py` is measured against.

Layers, shapes, numbers of context and target patches and optimiser are those of speechbrain_jepa;
only the manner is plain. All patches are embedded and then picked with boolean masks, mask tokens
enter the predictor by masked scatter, torch.autocast casts op by op over a float32 residual stream,
attention is scaled_dot_product_attention, and EMA and AdamW loop over the parameters.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from speechbrain_jepa.vit import PatchGrid, sincos_positions


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, grid, dim, depth, num_heads):
        super().__init__()
        patch = (grid.patch_frequency, grid.patch_time)
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)
        positions = sincos_positions(grid.frequency_patches, grid.time_patches, dim)
        self.register_buffer("positions", positions)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, spectrogram, visible):
        x = self.patch_embed(spectrogram[:, None]).flatten(2).transpose(1, 2) + self.positions
        x = x[visible].view(len(x), -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, grid, encoder_dim, dim, depth, num_heads):
        super().__init__()
        self.proj_in = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        positions = sincos_positions(grid.frequency_patches, grid.time_patches, dim)
        self.register_buffer("positions", positions)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, encoder_dim)

    def forward(self, context, target):
        context = self.proj_in(context)
        x = self.mask_token.to(context.dtype).expand(*target.shape, -1)
        x = x.masked_scatter(~target[..., None], context) + self.positions
        for block in self.blocks:
            x = block(x)
        x = x[target].view(len(x), -1, x.shape[-1])
        return self.proj_out(self.norm(x))


class ReferenceStep:
    """Masks, both encoders, predictor, loss, backward, clip, AdamW and EMA, plainly.

    Called with a spectrogram [B, bands, frames] it trains one step and returns the loss.
    """

    def __init__(self, grid: PatchGrid, encoder: dict, predictor: dict, num_targets, device, dtype):
        self.num_patches, self.num_targets = grid.num_patches, num_targets
        self.device, self.dtype = torch.device(device), dtype
        self.context_encoder = Encoder(grid, **encoder).to(device)
        self.predictor = Predictor(grid, encoder["dim"], **predictor).to(device)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.parameters = [*self.context_encoder.parameters(), *self.predictor.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), foreach=False)

    def __call__(self, spectrogram):
        noise = torch.rand(len(spectrogram), self.num_patches, device=self.device)
        target = noise.argsort(1).argsort(1) < self.num_targets
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                targets = self.target_encoder(spectrogram, target).float()
                targets = F.layer_norm(targets, targets.shape[-1:], eps=1e-6)
            predictions = self.predictor(self.context_encoder(spectrogram, ~target), target)
            loss = F.smooth_l1_loss(predictions.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 3.0)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(
                self.target_encoder.parameters(), self.context_encoder.parameters(), strict=True
            )
            for average, parameter in pairs:
                average.mul_(0.999).add_(parameter, alpha=1 - 0.999)
        return loss.detach()
