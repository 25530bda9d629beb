"""What keeps the context encoder's tokens from losing rank, beside the prediction loss.

A regulariser is called with the context encoder's patch tokens [B, K, D] and the validity [B, K] of
ragged rows, and gives a scalar to add to the loss. Every valid token of the batch is one row of its
statistics, which are float32, also under autocast. Under several processes they are those of the
global batch; with gradient accumulation, those of one micro-batch over all processes, which should
therefore hold several times D tokens.
"""

from functools import reduce

import torch
import torch.distributed
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCE_EPS = 1e-4  # under the square root, whose slope at zero is infinite


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, through which gradients flow back to all of them.

    Each process then holds the gradient of all processes' (equal) losses together, which DDP's mean
    over processes turns into that of one.
    """
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if is_alone or not torch.is_grad_enabled():  # in validation each has batches of its own
        return tensor
    return torch.distributed.nn.functional.all_reduce(tensor, group=torch.distributed.group.WORLD)


class Regularizer(nn.Module):
    """A sum of named terms; subclasses name them in `names` and define `terms`."""

    names: tuple[str, ...] = ()

    def terms(self, tokens: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Each term, weighted, as a float32 scalar: what the monitors show."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Arguments
        ---------
        tokens : Tensor [B, K, D]
        valid : Tensor [B, K], bool, or None
            False marks padding, which counts for nothing.

        Returns
        -------
        Tensor, scalar, float32
        """
        return reduce(torch.add, self.terms(tokens, valid).values())

    @staticmethod
    def rows(tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n, D], float32, zero where padding; which rows count [n, 1]; how many."""
        rows = tokens.float().flatten(0, 1)
        if valid is None:
            counted = rows.new_ones(len(rows), 1)
        else:
            counted = valid.flatten()[:, None].to(rows.dtype)
            rows = rows.masked_fill(counted == 0, 0.0)
        return rows, counted, sum_over_processes(counted.sum())


class VarianceCovariance(Regularizer):
    """The variance and covariance terms of VICReg (arXiv 2105.04906, eq. 1-4) on patch tokens.

    weight * (mean over d of max(0, deviation - sqrt(C_dd + 1e-4))
              + covariance_weight * sum over d != e of C_de^2 / D)

    with C the covariance of the tokens, unbiased. C-JEPA (arXiv 2410.19560) has the same terms on
    the mean of a clip's patches; here every patch is a row.

    Arguments
    ---------
    weight : float
        Of both terms. Default 0.2.
    deviation : float
        Standard deviation that every dimension is held to at least. Default 1.
    covariance_weight : float
        Of the covariance term within the sum. Default 0.04: VICReg's 1 over 25.

    Raises
    ------
    ValueError
        If a weight is negative or the deviation not positive.

    Example
    -------
    >>> tokens = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])  # C = [[2, 2], [2, 2]]
    >>> VarianceCovariance(weight=1.0).terms(tokens)  # (2² + 2²) / 2 * 0.04
    {'variance': tensor(0.), 'covariance': tensor(0.1600)}
    """

    names = ("variance", "covariance")

    def __init__(
        self, weight: float = 0.2, deviation: float = 1.0, covariance_weight: float = 0.04
    ):
        super().__init__()
        if weight < 0 or covariance_weight < 0:
            raise ValueError(
                f"weight={weight}, covariance_weight={covariance_weight}: must be 0 or more"
            )
        if deviation <= 0:
            raise ValueError(f"deviation={deviation}: must be positive")
        self.weight = weight
        self.deviation = deviation
        self.covariance_weight = covariance_weight

    def terms(self, tokens: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            rows, counted, count = self.rows(tokens, valid)
            mean = sum_over_processes(rows.sum(0)) / count
            centred = (rows - mean) * counted
            covariance = sum_over_processes(centred.T @ centred) / (count - 1).clamp(min=1)
            spread = torch.sqrt(covariance.diagonal() + VARIANCE_EPS)
            shared = (covariance.square().sum() - covariance.diagonal().square().sum()) / len(mean)
            return {
                "variance": self.weight * F.relu(self.deviation - spread).mean(),
                "covariance": self.weight * self.covariance_weight * shared,
            }


class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544, section 4).

    Tokens are projected onto random unit directions, drawn anew at every step, and the empirical
    characteristic function of each projection is compared with a standard normal distribution's:

    weight * mean over directions of the integral over t of
        |mean over tokens of exp(i t x) - exp(-t²/2)|² exp(-t²/2)

    by the trapezoidal rule from -`limit` to `limit` (Epps and Pulley's statistic). LeJEPA
    multiplies it with the number of rows; this does not, so that the weight does not depend on the
    batch. Its weight of 0.05 is 0.05 times the valid tokens of a batch here.

    Arguments
    ---------
    weight : float
        Default 0.1: with 1 the quickstart ends under the untrained encoder (docs/collapse.md).
    directions : int
        Default 32: under 3 % of the quickstart's step.
    knots : int
        Points of the integral from 0 to `limit`. Default 9.
    limit : float
        Default 5: the weight exp(-t²/2) leaves nothing beyond.

    Raises
    ------
    ValueError
        If the weight is negative, or there is no direction, or fewer than two knots.

    Example
    -------
    >>> _ = torch.manual_seed(0)
    >>> normal = torch.randn(64, 32, 24)
    >>> bool(SIGReg(weight=1.0)(normal) < 0.01 < 0.1 < SIGReg(weight=1.0)(0.3 * normal))
    True
    """

    names = ("gaussianity",)

    def __init__(
        self, weight: float = 0.1, directions: int = 32, knots: int = 9, limit: float = 5.0
    ):
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight={weight}: must be 0 or more")
        if directions < 1 or knots < 2 or limit <= 0:
            raise ValueError(
                f"directions={directions}, knots={knots}, limit={limit}: at least one direction, "
                "two knots and a positive limit are needed"
            )
        self.weight = weight
        self.directions = directions
        self.knots = knots
        self.limit = limit
        # the step's number draws its directions: the same on every process, and after a resume. On
        # the host, which would wait for a buffer to be read on a GPU
        self.step = 0

    def get_extra_state(self) -> Tensor:
        """Steps drawn for, as part of the state dict."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def terms(self, tokens: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            rows, counted, count = self.rows(tokens, valid)
            projected = rows @ self._draw_directions(rows.shape[1], rows.device)
            knots = torch.linspace(0, self.limit, self.knots, device=rows.device)
            normal = torch.exp(-knots.square() / 2)
            angles = projected[..., None] * knots
            parts = torch.stack([angles.cos(), angles.sin()])
            real, imaginary = sum_over_processes((parts * counted[..., None]).sum(1)) / count
            distance = ((real - normal).square() + imaginary.square()) * normal
            # even in t: twice the half from 0
            statistic = 2 * torch.trapezoid(distance, knots).mean()
            return {"gaussianity": self.weight * statistic}

    @torch.compiler.disable  # compiled, the step's number would be a constant of the graph
    def _draw_directions(self, dim: int, device: torch.device) -> Tensor:
        """Unit vectors [D, directions]: new ones at each training step, the last ones otherwise."""
        generator = torch.Generator(device).manual_seed(self.step)
        if self.training and torch.is_grad_enabled():
            self.step += 1
        drawn = torch.randn(dim, self.directions, generator=generator, device=device)
        return F.normalize(drawn, dim=0)
