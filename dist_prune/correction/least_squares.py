"""The equations of one site that is solved again against the dense network.

When a site's turn comes, everything before it is compressed and corrected. With x̂ its input there and t what
it should give, the best linear map is least squares; kept near the dense weight by a ridge,

    P = (C_tx + λW)(C_xx + λI)⁻¹,   C_xx = Cov(x̂),  C_tx = Cov(t, x̂),

and its best rank-r version in a metric G projects the predicted outputs on the leading eigenvectors U of
G^½ P(C_xx + λI)Pᵀ G^½ (reduced-rank regression, Izenman 1975): decode G^−½U_r, encode U_rᵀG^½P, bias t̄ − P_r x̄.

Where the output is added to a shortcut that is compressed too, t = y + (s − ŝ)/γ: the site repairs what the
shortcut lost, γ being the slope of the batch norm in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_prune.factorization.bases import metric_basis
from dist_prune.factorization.project import Factors
from dist_prune.statistics.moments import Moments


@dataclass(frozen=True)
class NormalEquations:
    """The normal equations of one site: means (g, d), (g, c), covariances (g, d, d), (g, c, d), rows seen."""

    mean_x: Tensor
    mean_t: Tensor
    xx: Tensor
    tx: Tensor
    rows: int

    @property
    def variance(self) -> Tensor:
        """Of all inputs together, (g,)."""
        return self.xx.diagonal(dim1=-2, dim2=-1).sum(-1)

    def solved(self, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """See `least_squares`; `shift` is λ, (g, 1, 1)."""
        right = self.tx + shift * weight
        solved = _solve(_shifted(self.xx, shift), right.mT).mT
        return solved, _symmetric(right @ solved.mT)

    def shifted(self, shift: Tensor) -> Tensor:
        """C_xx + λI, (g, d, d)."""
        return _shifted(self.xx, shift)

    def through(self, inner: Tensor) -> NormalEquations:
        """The equations of a layer that is given inner·x̂."""
        xx, tx = inner @ self.xx @ inner.mT, self.tx @ inner.mT
        return NormalEquations((inner @ self.mean_x[..., None])[..., 0], self.mean_t, xx, tx, self.rows)

    def uncentred(self) -> NormalEquations:
        """Moments about zero: what a layer without bias is solved from."""
        xx = self.xx + self.mean_x[..., :, None] * self.mean_x[..., None, :]
        tx = self.tx + self.mean_t[..., :, None] * self.mean_x[..., None, :]
        return replace(self, xx=xx, tx=tx)


@dataclass(frozen=True)
class DualNormalEquations:
    """The same where there are fewer rows than inputs: centred rows over √n, (g, d, n) and (g, c, n).

    They are solved in n dimensions instead of d: (xxᵀ + λI)⁻¹x = x(xᵀx + λI)⁻¹.
    """

    mean_x: Tensor
    mean_t: Tensor
    x: Tensor
    t: Tensor
    rows: int

    @property
    def variance(self) -> Tensor:
        """Of all inputs together, (g,)."""
        return self.x.square().sum((-2, -1))

    def solved(self, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """See `least_squares`; `shift` is λ, (g, 1, 1)."""
        lost = self.t - weight @ self.x
        solved = weight + _solve(_shifted(self.x.mT @ self.x, shift), lost.mT).mT @ self.x.mT
        return solved, _symmetric(self.t @ (solved @ self.x).mT + shift * weight @ solved.mT)

    def shifted(self, shift: Tensor) -> Tensor:
        """C_xx + λI, (g, d, d)."""
        return _shifted(self.x @ self.x.mT, shift)

    def through(self, inner: Tensor) -> NormalEquations:
        """The equations of a layer that is given inner·x̂."""
        x = inner @ self.x
        return NormalEquations(
            (inner @ self.mean_x[..., None])[..., 0], self.mean_t, x @ x.mT, self.t @ x.mT, self.rows
        )

    def uncentred(self) -> DualNormalEquations:
        """Moments about zero: what a layer without bias is solved from."""
        x = self.x + self.mean_x[..., None] / math.sqrt(self.rows)
        t = self.t + self.mean_t[..., None] / math.sqrt(self.rows)
        return replace(self, x=x, t=t)


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., 0])
    return shifted


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def normal_equations(joint: Moments, inputs: int) -> NormalEquations:
    """From the moments of rows (x̂, t), (g, d + c), with d = `inputs`."""
    mean, covariance = joint.mean, joint.covariance
    return NormalEquations(
        mean[:, :inputs],
        mean[:, inputs:],
        covariance[:, :inputs, :inputs],
        covariance[:, inputs:, :inputs],
        int(joint.count),
    )


def dual_normal_equations(rows: Tensor, groups: int, inputs: int) -> DualNormalEquations:
    """From the rows (x̂, t) themselves, (g·(d + c), images, positions), with d = `inputs`."""
    rows = rows.double().reshape(groups, rows.shape[0] // groups, -1)
    count, mean = rows.shape[-1], rows.mean(-1)
    rows = (rows - mean[..., None]) / math.sqrt(count)
    return DualNormalEquations(mean[:, :inputs], mean[:, inputs:], rows[:, :inputs], rows[:, inputs:], count)


def least_squares(
    normal: NormalEquations | DualNormalEquations, weight: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """P, and the covariance of what it predicts, P(C_xx + λI)Pᵀ.

    Args:
        normal: of the site.
        weight: (g, c, d), which P is kept near to.
        ridge: λ as a share of the mean eigenvalue of C_xx; the floor under which eigenvalues are not trusted.
            Where x̂ does not vary beyond rounding, P is the weight.

    Returns:
        (g, c, d) and (g, c, c).
    """
    return normal.solved(weight, shift_of(normal, ridge))


def shift_of(normal: NormalEquations | DualNormalEquations, ridge: float) -> Tensor:
    """λ of each group, (g, 1, 1); see `least_squares`."""
    size = normal.mean_x.shape[-1]
    rounding = 1e-12 * normal.mean_x.square().sum(-1)[:, None, None]
    shift = torch.maximum(ridge * normal.variance[:, None, None], rounding) / size
    return torch.where(shift > 0, shift, 1)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky; by elimination, which takes twice as long, where rounding has left a matrix indefinite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    found: Tensor = torch.linalg.solve(matrix, right) if failed.any() else torch.cholesky_solve(right, lower)
    return found


def reduced_rank(
    normal: NormalEquations | DualNormalEquations, weight: Tensor, rank: int, ridge: float, metric: Tensor
) -> Factors:
    """The rank-`rank` map that predicts t best in the metric (g, c, c); ranks beyond the outputs' are zero."""
    solved, predicted = least_squares(normal, weight, ridge)
    encode, decode = metric_basis(predicted, normal.mean_t, metric).kept(rank)
    beyond = rank // len(weight) - encode.shape[1]
    inner, decode = F.pad(encode @ solved, (0, 0, 0, beyond)), F.pad(decode, (0, beyond))
    return Factors(decode, inner, bias(normal, decode @ inner))


def refit(normal: NormalEquations | DualNormalEquations, inner: Tensor, outer: Tensor, ridge: float) -> Factors:
    """Keep the first layer; solve the second, and the bias, by least squares on its outputs."""
    solved, _ = least_squares(normal.through(inner), outer, ridge)
    return Factors(solved, inner, bias(normal, solved @ inner))


def bias(normal: NormalEquations | DualNormalEquations, weight: Tensor) -> Tensor:
    """t̄ − weight·x̄, (g, c): with it the errors have mean zero."""
    return normal.mean_t - (weight @ normal.mean_x[..., None])[..., 0]
