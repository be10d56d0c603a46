"""Spectra: what each direction of a site is worth, and so the loss of leaving directions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dist_prune.config.compression import BLIND, MethodConfig
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.knapsack import Floats
from dist_prune.factorization.nested import Nested
from dist_prune.network.sites import Site

UNITS = {"kl": "KL", "mse": "½·squared change"}  # of losses of a network's outputs, by `--loss`


@dataclass(frozen=True)
class Spectra:
    """What each direction of each site is worth: site → (g, k), best first.

    `unit` names what is predicted. Where `halved`, the loss of leaving directions out is half the sum of theirs:
    with the Fisher metric G = E[Σ_p g gᵀ] of one image and Σ the covariance of a row, a site's error e changes
    the output by KL ≈ ½ E[Σ_p (g_pᵀe_p)²] = ½ tr(G Σ_e) = ½ Σ_{i>r} λ_i nats per image. The sum over positions
    is in G, so no number of rows enters. Otherwise it is their share of the site's sum, so that sites compare.

    `values` is of the form `output`; `nested` has those of other forms, site → form → (g, q), in the same unit.
    `exact` has losses that hold, where they were measured: site → form → (k + 1,), see `losses`.
    """

    values: Mapping[str, Tensor]
    unit: str = "relative loss"
    halved: bool = False
    nested: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    exact: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)

    def tails(self, site: str, form: str = "output") -> Floats:
        """The loss of keeping 0, 1, …, k directions of each group, (k + 1,), descending to 0.

        Directions predicted to do harm (negative) count as zero.
        """
        own = _tails(self.values[site])
        scale = 0.5 if self.halved else 1 / max(own[0], np.finfo(np.float64).tiny)
        return scale * (own if form == "output" else _tails(self.nested[site][form]))

    def losses(self, site: str, form: str) -> Floats:
        """As `tails`, exact where that was measured."""
        exact = self.exact.get(site, {}).get(form)
        return self.tails(site, form) if exact is None else exact

    def of_options(self, site: Site, options: Sequence[tuple[str, tuple[int, ...]]]) -> Floats:
        """The loss of each option, a form with its ranks; NaN where nothing is known of a form.

        With `tucker` goes what each of its two projections loses by itself, and, where it was measured, what the
        two lose together; without, they are taken as independent.
        """
        known = {"output", *self.nested.get(site.name, {})}
        curves = {form: self.losses(site.name, form) for form in known}
        cross = self.exact.get(site.name, {}).get("cross")

        def lost(form: str, rank: int) -> float:
            curve = curves[form]
            return float(curve[min(rank // site.groups, len(curve) - 1)])

        def lost_together(first: int, second: int) -> float:
            parts = lost("input", first), lost("output", second)
            both = 0.0 if cross is None else float(cross[first // site.groups, second // site.groups])
            return max(*parts, sum(parts) + both)

        found = []
        for form, ranks in options:
            if form == "tucker":
                found.append(lost_together(*ranks) if "input" in known else np.nan)
            else:
                found.append(lost(form, ranks[0]) if form in known else np.nan)
        return np.array(found, np.float64)


def _tails(values: Tensor) -> Floats:
    worth = values.double().clamp(min=0).sum(0).cpu().numpy()
    return np.append(np.cumsum(worth[::-1])[::-1], 0.0)


def unit_of(method: MethodConfig) -> str:
    """What the method's spectra predict; empty if they say nothing."""
    if method.method in BLIND:
        return ""
    if method.method != "fisher":
        return "relative loss"
    return UNITS["kl" if method.loss.startswith("kl") else method.loss]


def spectra_of(
    bases: Mapping[str, Basis], method: MethodConfig, nested: Mapping[str, Mapping[str, Nested]] | None = None
) -> Spectra | None:
    """The spectra of solved bases, in the unit that the method gives them; None if they say nothing."""
    unit = unit_of(method)
    values = {name: basis.spectrum for name, basis in bases.items()}
    others = {site: {form: n.spectrum for form, n in forms.items()} for site, forms in (nested or {}).items()}
    return Spectra(values, unit, method.method == "fisher", others) if unit else None
