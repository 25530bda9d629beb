"""The optimiser of the pretraining recipe: AdamW, or Muon for the blocks' matrices beside it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def make_optimizer(params, jepa: nn.Module, muon: bool = False, **adamw) -> torch.optim.Optimizer:
    """What `opt_class` of the yaml calls.

    Arguments
    ---------
    params : iterable of parameters or of groups
        As SpeechBrain gives them.
    jepa : nn.Module
        Whose blocks' matrices are Muon's.
    muon : bool
        Default False: `torch.optim.AdamW(params, **adamw)`.
    **adamw
        Of AdamW: lr, betas, weight_decay, fused, ...
    """
    if not muon:
        return torch.optim.AdamW(params, **adamw)
    return MuonAdamW(params, block_matrices(jepa), **adamw)


def block_matrices(jepa: nn.Module) -> list[nn.Parameter]:
    """The trained matrices inside transformer blocks: neither embeddings nor projections in or out.

    Example
    -------
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(208), dim=24, depth=2, num_heads=3)
    >>> len(block_matrices(encoder))  # qkv, proj, fc1 and fc2 of each layer
    8
    """
    return [
        parameter
        for name, parameter in jepa.named_parameters()
        if "blocks." in name and parameter.ndim == 2 and parameter.requires_grad
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices, AdamW for everything else, as one optimiser.

    Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon/). Its
    updates are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982, section 2.2), so
    that one learning rate and one weight decay serve both. Queries, keys and values of a block are
    one matrix.

    Arguments
    ---------
    params : iterable of parameters or of groups
    matrices : iterable of parameters
        Those for Muon.
    momentum : float
        Of Muon. Default 0.95.
    **adamw
        Of AdamW; lr and weight_decay are Muon's too.

    Raises
    ------
    ImportError
        If torch has no Muon, that is before 2.9.
    """

    def __init__(self, params, matrices: Iterable[nn.Parameter], momentum: float = 0.95, **adamw):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"muon: True needs torch.optim.Muon, which torch {torch.__version__} does not "
                "have: install torch 2.9 or newer, or keep muon: False"
            )
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        chosen = {id(matrix) for matrix in matrices}
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            members = list(group["params"])
            for is_muons, part in parts.items():
                own = [p for p in members if (id(p) in chosen) == is_muons]
                if own:
                    part.append({**group, "params": own})
        shared = {name: adamw[name] for name in ("lr", "weight_decay") if name in adamw}
        self.muon = torch.optim.Muon(
            parts[True], momentum=momentum, adjust_lr_fn="match_rms_adamw", **shared
        )
        self.adamw = torch.optim.AdamW(parts[False], **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure=None):
        """One step of both."""
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def state_dict(self) -> dict:
        """Of both, by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict) -> None:
        """Of both; the groups are theirs again."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
