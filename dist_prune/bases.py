"""From statistics to directions: which r-dimensional subspace of a site to keep.

A basis is full (r = C) and ordered: its first r directions are the best r, so ranks can be chosen, and chosen
again, without solving again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_prune.moments import Moments
from dist_prune.sites import Site
from dist_prune.world import World


@dataclass(frozen=True)
class Basis:
    """Directions of one site, best first; a leading dimension for its groups. All float64.

    `encode` (g, k, k) has a direction in each row, `decode` (g, k, k) in each column; the first r of each
    give the projection y ≈ decode·encode·(y − mean) + mean. `mean` is (g, k). `spectrum` (g, k) is what each
    direction carries, descending, in the method's own unit.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor
    spectrum: Tensor

    def kept(self, rank: int) -> tuple[Tensor, Tensor]:
        """Encode (g, r/g, k) and decode (g, k, r/g) of the best `rank` directions, all groups together."""
        each = rank // self.mean.shape[0]
        return self.encode[:, :each], self.decode[..., :each]


def principal(moments: Moments) -> Basis:
    """PCA: eigenvectors of the covariance, largest eigenvalue first.

    For outputs y = Wx + b this is also the optimum of data-whitened SVD, argmin ‖(W − Ŵ)Σₓ^½‖ over rank r
    (Eckart-Young in the metric of Σₓ).
    """
    values, vectors = torch.linalg.eigh(moments.covariance)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    return Basis(vectors.mT.contiguous(), vectors.contiguous(), moments.mean, values)


def solve(sites: Iterable[Site], moments: Mapping[str, Moments], world: World) -> dict[str, Basis]:
    """Solve every site on rank 0 and give the answer to all, so that all hold the same bits."""
    bases = {
        site.name: principal(moments[site.name]) if world.is_first else _blank(moments[site.name])
        for site in sites
    }
    world.broadcast_(*(t for b in bases.values() for t in (b.encode, b.decode, b.mean, b.spectrum)))
    return bases


def _blank(moments: Moments) -> Basis:
    """Room for a basis solved elsewhere."""
    square, vector = torch.empty_like(moments.outer), torch.empty_like(moments.total)
    return Basis(square, square.clone(), vector, vector.clone())
