"""The Joint-Embedding Predictive Architecture of the paper's section 3: two encoders, a predictor.

Shapes: B clips, M masks of each (1 unless asked for), Kc context and Kt target patches, D dims.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_jepa.losses import PatchLoss
from speechbrain_jepa.masking import PatchMasks
from speechbrain_jepa.regularizers import Regularizer
from speechbrain_jepa.vit import Encoder, Predictor

TARGET_DOMAINS = ("audio", "latent")
TARGET_LAYERS = ("last", "all")
TARGET_NORM_EPS = 1e-6
UPDATED_AT_ONCE = 2**18  # weights on a CPU: few enough to stay in its cache over an update's passes
SGD: dict[str, Any] = dict(
    weight_decay=0.0,
    momentum=1.0,
    lr=-1.0,
    nesterov=False,
    maximize=False,
    is_first_step=False,
)


@dataclass
class JEPAOutput:
    """What one forward pass gives.

    Arguments
    ---------
    loss : Tensor, scalar, float32
        Of the predictions, and the regulariser's terms added to it.
    predictions : Tensor [B * M, Kt, D]
        Of the targets that are predicted, all unless the masks say otherwise.
    targets : Tensor [B * M, Kt, D], float32
        Normalised as the loss saw them, detached.
    target_valid : Tensor [B * M, Kt], bool, or None
    parts : dict of str to Tensor, scalar, detached
        What `loss` is the sum of, by name: "prediction" and the regulariser's terms. Empty without
        a regulariser.
    """

    loss: Tensor
    predictions: Tensor
    targets: Tensor
    target_valid: Tensor | None
    parts: dict[str, Tensor] = field(default_factory=dict)


class JEPA(nn.Module):
    """Predicts the target encoder's view of the target patches from the context patches.

    The target encoder starts as a copy of the context encoder and follows it as an exponential
    moving average (equation 1). It never takes gradients and is always in eval mode. Its average is
    a compensated sum: `target_rest` keeps what float32 could not add to the target encoder yet, and
    is part of the state dict.

    Arguments
    ---------
    encoder : Encoder
        The context encoder f_theta.
    predictor : Predictor
    loss : PatchLoss
    target_masking : str
        "audio": the target encoder sees the target patches only (the paper's choice).
        "latent": it sees all patches, and the targets are picked from its output (Table 3).
    target_layers : str
        "last" (the paper's), or "all": the mean of the outputs of all layers of the target encoder,
        each normalised over its features, without what enters the first (data2vec,
        https://arxiv.org/abs/2202.03555, section 3.3; EAT, https://arxiv.org/abs/2401.03497).
        Default "last".
    normalize_targets : bool
        Each target to zero mean and unit variance over its features (eps 1e-6). Default True.
    regularizer : Regularizer or None
        Added to the loss, computed on the context encoder's tokens. Default None, as in the paper.

    Raises
    ------
    ValueError
        If `target_masking` or `target_layers` is none of its choices.

    Example
    -------
    >>> from speechbrain_jepa.losses import SmoothL1
    >>> from speechbrain_jepa.masking import UnstructuredMasking
    >>> from speechbrain_jepa.vit import PatchGrid
    >>> grid = PatchGrid(frames=208)
    >>> jepa = JEPA(
    ...     Encoder(grid, dim=48, depth=1, num_heads=3),
    ...     Predictor(grid, encoder_dim=48, dim=32, depth=1, num_heads=2),
    ...     SmoothL1(),
    ... )
    >>> output = jepa(torch.randn(4, 80, 208), UnstructuredMasking(grid)(4))
    >>> output.loss.backward()
    >>> jepa.update_target(rate=0.99)
    >>> output.predictions.shape
    torch.Size([4, 39, 48])
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        loss: PatchLoss,
        target_masking: str = "audio",
        normalize_targets: bool = True,
        regularizer: Regularizer | None = None,
        target_layers: str = "last",
    ):
        super().__init__()
        for name, value, choices in (
            ("target_masking", target_masking, TARGET_DOMAINS),
            ("target_layers", target_layers, TARGET_LAYERS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
        self.context_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        # parameters, not buffers: DDP broadcasts buffers in every forward pass
        self.target_rest = nn.ParameterList(
            nn.Parameter(torch.zeros_like(parameter), requires_grad=False)
            for parameter in encoder.parameters()
        )
        self.predictor = predictor
        self.loss = loss
        self.target_masking = target_masking
        self.target_layers = target_layers
        self.normalize_targets = normalize_targets
        self.regularizer = regularizer

    def train(self, mode: bool = True) -> "JEPA":
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, spectrogram: Tensor, masks: PatchMasks) -> JEPAOutput:
        """
        Arguments
        ---------
        spectrogram : Tensor [B, bands, frames]
            Normalised log-mel of the grid's size, or of fewer time patches.
        masks : PatchMasks
            Of the same B clips and patches, M for each (those of a clip follow one another): the
            target encoder sees a clip once whatever M is, as in data2vec 2.0
            (https://arxiv.org/abs/2212.07525).

        Returns
        -------
        JEPAOutput

        Raises
        ------
        ValueError
            If the spectrogram is not of the grid's size, there are masks for other clips, or there
            are several for each where the target encoder sees the target patches only.
        """
        grid, clips = self.context_encoder.grid, len(spectrogram)
        per_clip = len(masks) // max(clips, 1)
        frames = masks.frames or grid.frames
        if spectrogram.shape[1:] != (grid.bands, frames) or per_clip * clips != len(masks):
            raise ValueError(
                f"spectrogram of shape {tuple(spectrogram.shape)} with masks for {len(masks)} "
                f"clips: expected ({len(masks)}, {grid.bands}, {frames})"
            )
        if per_clip > 1 and self.target_masking != "latent":
            raise ValueError(
                f"{per_clip} masks per clip with target_masking={self.target_masking}: they share "
                "one pass of the target encoder over all patches: use target_masking=latent"
            )
        targets = self.targets(spectrogram, masks)
        if per_clip > 1:
            spectrogram = spectrogram.repeat_interleave(per_clip, 0)
        context = self.context_encoder(
            spectrogram, masks.context_index, masks.context_valid, packing=masks.context_packing
        )
        valid = masks.loss_valid
        predictions = self.predictor(
            context,
            masks.context_index,
            masks.predicted_index,
            masks.context_valid,
            valid,
            masks.context_packing if self.predictor.cross_attention else masks.joint_packing,
            time_patches=frames // grid.patch_time,
        )
        loss, parts = self.loss(predictions, targets, valid), {}
        if self.regularizer is not None:
            terms = self.regularizer.terms(context, masks.context_valid)
            parts = {"prediction": loss.detach()}
            parts |= {name: term.detach() for name, term in terms.items()}
            loss = loss + sum(terms.values())
        return JEPAOutput(loss, predictions, targets, valid, parts)

    @torch.no_grad()
    def targets(self, spectrogram: Tensor, masks: PatchMasks) -> Tensor:
        """What the predictor should say: [B * M, Kt, D], float32, normalised per patch."""
        index = masks.target_index
        if self.target_masking == "audio":
            targets = self._encode_targets(
                spectrogram, index, masks.target_valid, packing=masks.target_packing
            )
        else:
            targets = self._encode_targets(spectrogram)
            # rows of several masks of one clip side by side: a clip's targets are picked together
            per_clip = index.reshape(len(targets), -1, 1).expand(-1, -1, targets.shape[-1])
            targets = targets.gather(1, per_clip).view(*index.shape, -1)
        if masks.predicted is not None:
            index = masks.predicted[..., None].expand(-1, -1, targets.shape[-1])
            targets = targets.gather(1, index)
        targets = targets.float()
        return _standardized(targets) if self.normalize_targets else targets

    def _encode_targets(self, *patches, **packing) -> Tensor:
        """The target encoder's last layer, or the mean of all, each normalised."""
        if self.target_layers == "last":
            return self.target_encoder(*patches, **packing)
        layers = self.target_encoder(*patches, all_layers=True, **packing)[1:]
        return _standardized(layers.float()).mean(0)

    @torch.no_grad()
    def update_target(self, rate: float, skip: Tensor | None = None) -> None:
        """target <- rate * target + (1 - rate) * context, for all parameters at once (eq. 1).

        At a rate of 0.99999 a weight 0.2 % away moves by 2e-8 of its size, which float32 rounds to
        nothing. What is rounded off is kept and added with the next update (Kahan, 1965).

        Arguments
        ---------
        rate : float
        skip : Tensor, scalar, float32, or None
            1: everything stays as it is; 0: it does not. The host need not know which.
        """
        rows = zip(
            self.target_encoder.parameters(), self.target_rest, self.context_encoder.parameters()
        )
        # .data: the kernel may write to what it takes for gradients, and autograd would believe it
        for target, rest, context in _in_pieces((part.data for part in row) for row in rows):
            old = [torch.empty_like(part) for part in target]
            torch._foreach_copy_(old, target)
            # torch's fused SGD computes buffer <- momentum * buffer + (1 - dampening) * (gradient +
            # weight_decay * parameter); parameter <- parameter - lr * buffer, in one pass:
            # rest <- rest + (1 - rate) * (context - target); target <- target + rest
            torch._fused_sgd_(
                *(target, context, rest),
                **(SGD | {"weight_decay": -1.0, "dampening": rate, "found_inf": skip}),
            )
            # old <- old - target, which is exact; rest <- rest + old
            torch._fused_sgd_(rest, target, old, **(SGD | {"dampening": 2.0}))


def _standardized(tokens: Tensor) -> Tensor:
    """Each token [..., D] to zero mean and unit variance over its features."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=TARGET_NORM_EPS)


def _in_pieces(rows):
    """Rows of tensors as lists, one a column; on a CPU `UPDATED_AT_ONCE` values at a time."""
    group, held = [], 0
    for row in map(tuple, rows):
        limit = UPDATED_AT_ONCE if row[0].is_cpu else 2**24
        is_small = row[0].numel() <= limit
        for piece in [row] if is_small else zip(*(part.view(-1).split(limit) for part in row)):
            group.append(piece)
            held += piece[0].numel()
            if held >= limit:
                yield tuple(map(list, zip(*group)))
                group, held = [], 0
    if group:
        yield tuple(map(list, zip(*group)))
