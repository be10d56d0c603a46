"""Spectra: what each direction of a site is worth, and so the loss of leaving directions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dist_prune.config.run import BLIND, MethodConfig
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.knapsack import Floats


@dataclass(frozen=True)
class Spectra:
    """What each direction of each site is worth: site → (g, k), best first.

    `unit` names what is predicted. Where `halved`, the loss of leaving directions out is half the sum of theirs:
    with the Fisher metric G = E[Σ_p g gᵀ] of one image and Σ the covariance of a row, a site's error e changes
    the output by KL ≈ ½ E[Σ_p (g_pᵀe_p)²] = ½ tr(G Σ_e) = ½ Σ_{i>r} λ_i nats per image. The sum over positions
    is in G, so no number of rows enters. Otherwise it is their share of the site's sum, so that sites compare.
    """

    values: Mapping[str, Tensor]
    unit: str = "relative loss"
    halved: bool = False

    def tails(self, site: str) -> Floats:
        """The loss of keeping 0, 1, …, k directions of each group, (k + 1,), descending to 0.

        Directions predicted to do harm (negative) count as zero.
        """
        worth = self.values[site].double().clamp(min=0).sum(0).cpu().numpy()
        tails = np.append(np.cumsum(worth[::-1])[::-1], 0.0)
        scale = 0.5 if self.halved else 1 / max(tails[0], np.finfo(np.float64).tiny)
        return np.asarray(tails * scale, np.float64)


def unit_of(method: MethodConfig) -> str:
    """What the method's spectra predict; empty if they say nothing."""
    if method.method in BLIND:
        return ""
    if method.method != "fisher":
        return "relative loss"
    return "KL" if method.loss.startswith("kl") else "½·squared change"


def spectra_of(bases: Mapping[str, Basis], method: MethodConfig) -> Spectra | None:
    """The spectra of solved bases, in the unit that the method gives them; None if they say nothing."""
    unit = unit_of(method)
    values = {name: basis.spectrum for name, basis in bases.items()}
    return Spectra(values, unit, method.method == "fisher") if unit else None
