"""In which order channels can be removed, and what is lost at every width: greedy elimination with exact updates.

A consumer computes W z + b of channels z with covariance C. When the channels R go and S stay, the best that
the consumer can do is to predict z_R from z_S linearly, W_S + W_R C_RS C_SS⁻¹; its output's error then has the
covariance W_R (C_RR − C_RS C_SS⁻¹ C_SR) W_Rᵀ, and costs ½ tr(G ·) in the metric G. Channels are removed one by
one, each time the one whose removal costs least, with all remaining weights updated: the rise is exactly ½ M_jj
/ H_jj, with H = C_SS⁻¹ and M = WᵀGW of the weights as they are by then (optimal brain surgeon: Hassibi & Stork,
NIPS 1992; by whole channels as in OSSCAR: Meng et al., ICML 2024). Both H and M lose a term of rank one and two
with each channel, so that one inverse of C gives the losses at every width. Several consumers add their rises.

A convolution's patches are taken as C ⊗ C_s, channels × places in the kernel: then the same holds for whole
channels with M_ij = tr(W_iᵀ G W_j C_s), and nothing grows with the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_prune.factorization.knapsack import Floats

PANEL = 64  # removals between two updates of whole matrices: the rest is done on their columns alone


@dataclass(frozen=True)
class Term:
    """One consumer: `covariance` of its channels and `gram`, M of the module, both (c, c), float64."""

    covariance: Tensor
    gram: Tensor


@dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they go, and `losses` (c + 1,): entry w is what is lost at width w.

    In nats per image where the metric is a Fisher metric summed over positions. At width 0 consumers are given
    nothing but a mean.
    """

    order: tuple[int, ...]
    losses: Floats

    def kept(self, width: int) -> tuple[int, ...]:
        """The channels that stay, ascending."""
        return tuple(sorted(self.order[len(self.order) - width :]))


def eliminate(terms: Sequence[Term], ridge: float) -> Elimination:
    """The greedy order.

    Args:
        terms: of all consumers of a group.
        ridge: added to the covariance's diagonal, as a share of its mean.
    """
    parts = [_TermPart(term, ridge) for term in terms]
    left = torch.arange(len(terms[0].gram), device=terms[0].gram.device)
    order: list[int] = []
    rises: list[float] = []
    while len(left):
        steps = min(PANEL, len(left))
        taken = _panel(parts, steps)
        order += left[taken.places].tolist()
        rises += taken.rises.tolist()
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[taken.places] = False
        left = left[stays]
        for part in parts:
            part.shrink(stays)
    losses = np.append(np.cumsum(np.maximum(rises, 0.0))[::-1], 0.0) / 2
    return Elimination(tuple(order), np.asarray(losses, np.float64))


@dataclass(frozen=True)
class _Taken:
    """Removed in one panel: places among the channels left before it, and the rise with each."""

    places: Tensor
    rises: Tensor


def _panel(parts: Sequence[_TermPart], steps: int) -> _Taken:
    """Remove `steps` channels; whole matrices are left as they were, but for what the parts put aside."""
    gone = torch.zeros_like(parts[0].inverse_diagonal)
    places, rises = [], []
    for part in parts:
        part.open(steps)
    for step in range(steps):
        scores = sum((p.gram_diagonal / p.inverse_diagonal for p in parts), start=gone)
        place = scores.argmin()
        places.append(place)
        rises.append(scores[place])
        gone[place] = torch.inf
        for part in parts:
            part.remove(place, step)
    return _Taken(torch.stack(places), torch.stack(rises))


class _TermPart:
    """H and M of one consumer, each a matrix less the panel's terms: H − PPᵀ and M − ABᵀ − BAᵀ, P = B√diag."""

    def __init__(self, term: Term, ridge: float) -> None:
        covariance = term.covariance.clone()
        mean = covariance.diagonal().mean()
        covariance.diagonal().add_(torch.where(mean > 0, ridge * mean, 1))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        self.gram = term.gram
        self.inverse_diagonal, self.gram_diagonal = self.inverse.diagonal().clone(), self.gram.diagonal().clone()

    def open(self, steps: int) -> None:
        """Begin a panel."""
        empty = self.gram.new_zeros(steps, len(self.gram))
        self.roots, self.left, self.right = empty, empty.clone(), empty.clone()

    def remove(self, place: Tensor, step: int) -> None:
        """Put aside what the removal of a channel takes from H and M."""
        roots, left, right = self.roots[:step], self.left[:step], self.right[:step]
        inverse = self.inverse[place] - roots[:, place] @ roots
        gram = self.gram[place] - left[:, place] @ right - right[:, place] @ left
        pivot = inverse[place]
        other = gram / pivot - (gram[place] / (2 * pivot.square())) * inverse
        self.roots[step] = inverse / pivot.sqrt()
        self.left[step], self.right[step] = other, inverse
        self.inverse_diagonal -= self.roots[step].square()
        self.gram_diagonal -= 2 * other * inverse
        self.inverse_diagonal[place] = 1  # it is gone, and its score infinite

    def shrink(self, stays: Tensor) -> None:
        """End a panel: keep the rows and columns of the channels that are left."""
        roots, left, right = self.roots[:, stays], self.left[:, stays], self.right[:, stays]
        self.inverse = self.inverse[stays][:, stays].addmm_(roots.T, roots, alpha=-1)
        self.gram = self.gram[stays][:, stays].addmm_(left.T, right, alpha=-1).addmm_(right.T, left, alpha=-1)
        self.inverse_diagonal, self.gram_diagonal = self.inverse.diagonal().clone(), self.gram.diagonal().clone()


@dataclass(frozen=True)
class Prediction:
    """All channels from those kept: z ≈ weights z_S + offset, (c, kept) and (c,)."""

    weights: Tensor
    offset: Tensor


def predict(mean: Tensor, covariance: Tensor, kept: Sequence[int], ridge: float) -> Prediction:
    """The linear prediction of least squares, C_·S (C_SS + λI)⁻¹; exact for the channels kept themselves.

    Args:
        mean: of the channels, (c,).
        covariance: of the channels, (c, c).
        kept: those that stay, ascending.
        ridge: as in `eliminate`.
    """
    index = torch.as_tensor(kept, device=covariance.device)
    inner = covariance[index][:, index]
    scale = covariance.diagonal().mean()
    inner.diagonal().add_(torch.where(scale > 0, ridge * scale, 1))
    weights = torch.cholesky_solve(covariance[index], torch.linalg.cholesky(inner)).T.contiguous()
    weights[index] = torch.eye(len(index), dtype=weights.dtype, device=weights.device)
    return Prediction(weights, mean - weights @ mean[index])
