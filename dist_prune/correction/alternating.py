"""Chains of layers of any form, solved by alternating least squares: min tr(G (P − Ŵ) S (P − Ŵ)ᵀ).

P is what a dense layer would be, S = C_xx + λI the shifted covariance of its patches, G a metric of outputs. The
first layer of a chain sees some axes of a patch and leaves the others to the second: with the patch as (m, q), m
what the first layer sees, Ŵ = A·(R ⊗ I_q), R (r, m) its kernel and A (C, r, q) all that follows.

- Given R, A is least squares on R's outputs. Where a third layer follows (`tucker`), A has a rank of its own, and
  is the best of that rank in the metric (reduced-rank regression).
- Given A, R solves Σ_q Aᵀ G (A(R) − P) S = 0, by conjugate gradients from where it is. With S ≈ S_m ⊗ S_q the
  matrix of that system is (Σ_qq′ S_q A_qᵀ G A_q′) ⊗ S_m: the preconditioner.

Neither step can make the loss larger. No inverse is formed, and nothing is larger than S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_prune.factorization.bases import metric_basis

ROUNDS = 2  # of both steps
STEPS = 5  # of conjugate gradients in each
ROUNDING = 1e-12  # of a matrix's mean eigenvalue: added before it is factored


@dataclass(frozen=True)
class Target:
    """What a chain is to come near to: P (g, C, d), S (g, d, d) and a positive definite metric G (g, C, C)."""

    weight: Tensor
    covariance: Tensor
    metric: Tensor

    def loss(self, weight: Tensor) -> Tensor:
        """tr(G (P − Ŵ) S (P − Ŵ)ᵀ) of each group, (g,)."""
        lost = self.weight - weight
        return (self.metric @ lost @ self.covariance * lost).sum((-2, -1))


def alternate(
    target: Target,
    first: Tensor,
    kernel: tuple[int, int],
    middle: int | None = None,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> list[Tensor]:
    """The kernels of a chain, first to last, (g, outputs, inputs, kh or 1, kw or 1).

    Args:
        target: what to come near to.
        first: the first layer's kernel to begin with, (g, r, c, kh or 1, kw or 1): its size says what it sees.
        kernel: height and width of the dense layer's.
        middle: channels per group between the second and a third, 1×1 layer; None if there is no third.
        rounds: how often both are solved; 0: the first sees what it saw.
        steps: of conjugate gradients in each round.
    """
    problem = _Problem.of(target, first, kernel, middle)
    inner = problem.uncorrelated(first.flatten(2))
    second = problem.second(inner)
    for _ in range(rounds):
        inner = problem.uncorrelated(problem.first(inner, problem.joined(second), steps))
        second = problem.second(inner)
    left = [n // own for n, own in zip(kernel, first.shape[-2:], strict=True)]
    outer, *last = second
    return [
        inner.reshape(*inner.shape[:2], *first.shape[2:]),
        outer.reshape(*outer.shape[:2], inner.shape[1], *left),
        *(matrix[..., None, None] for matrix in last),
    ]


def lifted(first: Tensor, kernel: tuple[int, int]) -> Tensor:
    """R ⊗ I_q as a matrix (g, r·q, d) on patches: all that a second layer sees of them through the first."""
    channels, tall, wide = first.shape[2:]
    order = patch_order(channels, kernel, (tall, wide)).to(first.device)
    inner = first.flatten(2)
    places = torch.eye(len(order) // inner.shape[2], dtype=first.dtype, device=first.device)
    spread = torch.einsum("grm,pq->grpmq", inner, places).flatten(3).flatten(1, 2)
    return torch.empty_like(spread).index_copy(2, order, spread)


def patch_order(channels: int, kernel: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """Of patches (c, kh, kw), the order (m, q): channels, the axes seen, the others."""
    (height, width), (tall, wide) = kernel, seen
    grid = torch.arange(channels * height * width).reshape(channels, tall, height // tall, wide, width // wide)
    return grid.permute(0, 1, 3, 2, 4).flatten()


@dataclass(frozen=True)
class _Problem:
    """One site, its patches as (m, q); matrices as in the module.

    Attributes:
        target: patches in that order.
        crossed: P S, (g, C, m·q).
        seen: S_m, (g, m, m).
        left: S_q, (g, q, q).
        middle: as in `alternate`.
    """

    target: Target
    crossed: Tensor
    seen: Tensor
    left: Tensor
    middle: int | None

    @staticmethod
    def of(target: Target, first: Tensor, kernel: tuple[int, int], middle: int | None) -> _Problem:
        """See `alternate`."""
        channels, tall, wide = first.shape[2:]
        order = patch_order(channels, kernel, (tall, wide)).to(first.device)
        weight, covariance = target.weight, target.covariance
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            weight, covariance = weight[..., order], covariance[:, order][..., order]
        sees = channels * tall * wide
        blocks = covariance.reshape(len(weight), sees, -1, sees, len(order) // sees)
        seen = torch.einsum("gmqnq->gmn", blocks) / blocks.shape[2]
        left = torch.einsum("gmqmp->gqp", blocks)
        left = left / seen.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return _Problem(Target(weight, covariance, target.metric), weight @ covariance, seen, left, middle)

    @property
    def places(self) -> int:
        """Of the axes that the first layer leaves to the second."""
        return self.left.shape[-1]

    def uncorrelated(self, inner: Tensor) -> Tensor:
        """The same R up to a basis of its rows: uncorrelated, of variance 1; dependent rows are replaced."""
        root = torch.linalg.cholesky(_lifted(self.seen))
        directions, _ = torch.linalg.qr((inner @ root).mT)
        found: Tensor = torch.linalg.solve_triangular(root, directions.mT, upper=False, left=False)
        return found

    def second(self, inner: Tensor) -> list[Tensor]:
        """Given R: A as (g, C, r·q), or the core (g, r₂, r·q) and the last layer (g, C, r₂)."""
        lifted = self._seen_by(inner, self._covariance_with(inner))
        crossed = self._seen_by(inner, self.crossed)
        solved = _solve(_lifted(lifted), crossed.mT).mT
        if self.middle is None:
            return [solved]
        predicted = solved @ crossed.mT
        basis = metric_basis((predicted + predicted.mT) / 2, predicted[..., 0], self.target.metric)
        encode, decode = basis.kept(self.middle * len(predicted))
        return [encode @ solved, decode]

    def joined(self, second: list[Tensor]) -> Tensor:
        """A, (g, C, r·q)."""
        return second[0] if len(second) == 1 else second[1] @ second[0]

    def first(self, inner: Tensor, outer: Tensor, steps: int) -> Tensor:
        """Given A: R, by preconditioned conjugate gradients from `inner`, each group on its own."""
        weighted = outer.mT @ self.target.metric
        inside = weighted @ outer
        precondition = self._preconditioner(inside)
        residual = self._traced(weighted, self.crossed) - self._applied(inside, inner)
        direction = torch.zeros_like(inner)
        before = residual.new_ones(len(inner), 1, 1)
        for _ in range(steps):
            step = precondition(residual)
            size = _dot(residual, step)
            direction = step + size / before * direction
            image = self._applied(inside, direction)
            length = size / _dot(direction, image).clamp(min=torch.finfo(size.dtype).tiny)
            inner, residual = inner + length * direction, residual - length * image
            before = size.clamp(min=torch.finfo(size.dtype).tiny)
        return inner

    def _applied(self, inside: Tensor, inner: Tensor) -> Tensor:
        """Aᵀ G A(R) S, (g, r, m)."""
        return self._traced(inside, self._covariance_with(inner))

    def _covariance_with(self, inner: Tensor) -> Tensor:
        """(R ⊗ I_q) S, (g, r·q, m·q)."""
        groups, rank, sees = inner.shape
        product = inner @ self.target.covariance.reshape(groups, sees, -1)
        return product.reshape(groups, rank * self.places, -1)

    def _seen_by(self, inner: Tensor, values: Tensor) -> Tensor:
        """Values times (R ⊗ I_q)ᵀ: (g, n, m·q) → (g, n, r·q)."""
        columns = values.reshape(*values.shape[:2], -1, self.places)
        return torch.einsum("gnmq,grm->gnrq", columns, inner).flatten(2)

    def _traced(self, left: Tensor, right: Tensor) -> Tensor:
        """Of left·right, (g, r·q, n)·(g, n, m·q), the sum of the blocks of equal q, (g, r, m)."""
        rows = left.reshape(len(left), -1, self.places, left.shape[-1])
        columns = right.reshape(*right.shape[:2], -1, self.places)
        return torch.einsum("grqn,gnmq->grm", rows, columns)

    def _preconditioner(self, inside: Tensor) -> Callable[[Tensor], Tensor]:
        """A function: residual → N⁻¹ residual S_m⁻¹."""
        rank, places = inside.shape[1] // self.places, self.places
        blocks = inside.reshape(len(inside), rank, places, rank, places)
        ranks = torch.linalg.cholesky(_lifted(torch.einsum("grqsp,gqp->grs", blocks, self.left)))
        sees = torch.linalg.cholesky(_lifted(self.seen))

        def precondition(residual: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(residual, ranks).mT, sees).mT

        return precondition


def _lifted(matrix: Tensor) -> Tensor:
    """A symmetric matrix, its eigenvalues lifted by rounding; the identity in the place of zero."""
    symmetric = (matrix + matrix.mT) / 2
    mean = symmetric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    symmetric.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, ROUNDING * mean, 1))
    return symmetric


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
