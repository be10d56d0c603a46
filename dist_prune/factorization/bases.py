"""From statistics to directions: which r-dimensional subspace of a site to keep.

A basis is full and ordered: its first r directions are the best r, so ranks can be chosen, and chosen again,
without solving again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.distributed.world import World
from dist_prune.network.sites import Site, View, bias_of, weight_of
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.moments import Moments
from dist_prune.utils.decompositions import eigh


@dataclass(frozen=True)
class Basis:
    """Directions of one side of one site, best first; a leading dimension for its groups. All float64.

    `encode` (g, k, k) has a direction in each row, `decode` (g, k, k) in each column; the first r of each
    give the projection a ≈ decode·encode·(a − mean) + mean. They are inverse to each other, but need not be
    orthogonal. `mean` is (g, k). `spectrum` (g, k) is what each direction carries, in the method's own unit and
    order.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    spectrum: Tensor

    def kept(self, rank: int) -> tuple[Tensor, Tensor]:
        """Encode (g, r/g, k) and decode (g, k, r/g) of the best `rank` directions, all groups together."""
        each = rank // self.mean.shape[0]
        return self.encode[:, :each], self.decode[..., :each]


def eigenbasis(matrix: Tensor, mean: Tensor) -> Basis:
    """Orthonormal eigenvectors of a symmetric (g, k, k) matrix, largest eigenvalue first."""
    values, vectors = eigh(matrix)
    vectors = vectors.flip(-1).contiguous()
    return Basis(vectors.mT.contiguous(), vectors, mean, values.flip(-1))


def principal(moments: Moments) -> Basis:
    """PCA: eigenvectors of the covariance, largest eigenvalue first.

    For outputs y = Wx + b this is also the optimum of data-whitened SVD, argmin ‖(W − Ŵ)Σₓ^½‖ over rank r
    (Eckart-Young in the metric of Σₓ).
    """
    basis = eigenbasis(moments.covariance, moments.mean)
    return replace(basis, spectrum=basis.spectrum.clamp(min=0))


def whitened(moments: Moments, bias: Tensor) -> Basis:
    """Whitened SVD as BALF has it (González Martínez 2025): the truncated SVD of W·M^½, M = E[xxᵀ] about zero.

    Its left vectors are the eigenvectors of WMWᵀ = E[(y − b)(y − b)ᵀ]; the bias b (g, c) stays as it is.
    """
    offset = (moments.mean - bias)[..., None]
    basis = eigenbasis(moments.covariance + offset @ offset.mT, bias)
    return replace(basis, spectrum=basis.spectrum.clamp(min=0))


def by_gradient(matrix: Tensor, mean: Tensor, greedy: bool) -> Basis:
    """Eigenvectors of T + Tᵀ, T = E[Σ_p (a_p − ā)g_pᵀ] with task gradients g, (g, k, k).

    Removing the direction u changes the loss by −uᵀTu to first order. Kept first are those that matter most in
    either way, or, when `greedy`, those whose removal is predicted to raise the loss most.
    """
    basis = eigenbasis(matrix, mean)
    worth = -basis.spectrum if greedy else basis.spectrum.abs()
    worth, order = worth.sort(dim=-1, descending=True, stable=True)
    decode = basis.decode.gather(-1, order[:, None].expand_as(basis.decode))
    return Basis(decode.mT.contiguous(), decode, mean, worth)


def by_fisher(moments: Moments, metric: Tensor, damping: float) -> Basis:
    """PCA in the metric G of output gradients: eigenvectors Q of G^½ΣG^½, encode QᵀG^½, decode G^−½Q.

    Half the sum of the eigenvalues left out is the predicted KL divergence, if G is summed over positions and
    rows and gradients are independent. G is damped by `damping` times its largest eigenvalue.
    """
    return metric_basis(moments.covariance, moments.mean, metric, damping)


def metric_basis(covariance: Tensor, mean: Tensor, metric: Tensor, damping: float = 0.0) -> Basis:
    """PCA of a covariance (g, k, k) in a metric (g, k, k), whose negative and vanishing eigenvalues are lifted.

    The metric's scale goes into the spectrum alone, or one of 1e-300 would give directions that float32 cannot
    hold. Where it is zero, as for a layer that the loss does not depend on, that is plain PCA, and no direction is
    worth anything. To the metric is added `damping` times its largest eigenvalue.
    """
    values, vectors = eigh(metric)
    largest = values[:, -1:].clamp(min=0)
    relative = torch.where(largest > 0, values / torch.where(largest > 0, largest, 1), 1)
    root = ((relative + damping) / (1 + damping)).clamp(min=1e-12).sqrt()[:, None]
    # In the metric's own axes, where its root is diagonal: two products less.
    turned = vectors * root
    basis = eigenbasis(turned.mT @ covariance @ turned, mean)
    worth = basis.spectrum.clamp(min=0) * (1 + damping) * largest
    return Basis(basis.encode @ turned.mT, (vectors / root) @ basis.decode, mean, worth)


def by_weight(weight: Tensor, bias: Tensor, side: str) -> Basis:
    """Singular vectors of the weight (g, c, d) itself; the mean is such that the bias stays as it is."""
    if side == "output":
        return eigenbasis(weight @ weight.mT, bias)
    return eigenbasis(weight.mT @ weight, weight.new_zeros(weight.shape[0], weight.shape[2]))


def at_random(like: Basis, seed: int) -> Basis:
    """Orthonormal directions, uniform (QR of a normal matrix), about the same mean."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(like.encode.shape, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(normal)[0].to(like.encode.device)
    return Basis(directions.mT.contiguous(), directions, like.mean, torch.ones_like(like.spectrum))


def solve(
    model: nn.Module,
    sites: Iterable[Site],
    statistics: Statistics,
    method: MethodConfig,
    seed: int,
    world: World,
) -> dict[str, Basis]:
    """Solve every site on one rank and give the answer to all, so that all hold the same bits.

    All ranks hold the same statistics; which of them solves a site changes no bit.

    Returns:
        site name → full basis, on the world's device.
    """
    views = [View(site, method.side) for site in sites]
    owners = spread([view.site.groups * view.width**3 for view in views], world.size)
    bases: dict[str, Basis] = {}
    for view, owner in zip(views, owners, strict=True):
        name = view.site.name
        if owner == world.rank:
            bases[name] = _solve_one(model.get_submodule(name), view.site, statistics, method, seed)
        else:
            bases[name] = _blank(view, world.device)
    for rank in sorted(set(owners)):
        own = [bases[view.site.name] for view, owner in zip(views, owners, strict=True) if owner == rank]
        world.broadcast_(*(t for b in own for t in (b.encode, b.decode, b.mean, b.spectrum)), source=rank)
    return bases


def spread(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that owns each piece of work: the longest first, each to the rank with the least load."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for place in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners


def _solve_one(module: nn.Module, site: Site, statistics: Statistics, method: MethodConfig, seed: int) -> Basis:
    if method.method in ("weight-svd", "random"):
        basis = by_weight(weight_of(module, site).double(), bias_of(module, site).double(), method.side)
        return basis if method.method == "weight-svd" else at_random(basis, seed + zlib.crc32(site.name.encode()))
    moments = statistics.moments[site.name]
    if method.method == "pca":
        return principal(moments)
    if method.method == "whitened-svd":
        return whitened(moments, bias_of(module, site).double())
    matrix = statistics.curvature[site.name]
    if method.method == "gradient":
        return by_gradient(matrix, moments.mean, method.greedy)
    if method.method == "fisher":
        return by_fisher(moments, matrix, method.damping)
    return eigenbasis(matrix, moments.mean)


def _blank(view: View, device: torch.device) -> Basis:
    """Room for a basis solved elsewhere."""
    vector = torch.empty(view.site.groups, view.width, dtype=torch.float64, device=device)
    square = vector.new_empty(*vector.shape, view.width)
    return Basis(square, torch.empty_like(square), vector, torch.empty_like(vector))
