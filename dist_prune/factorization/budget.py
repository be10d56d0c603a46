"""The options of each site under a budget, and their costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_prune.config.flags import Rule
from dist_prune.factorization.knapsack import Floats, Ints, Options
from dist_prune.factorization.latency import LatencyTable, format_time
from dist_prune.network.sites import Site, Survey, View

NAMED = 5  # layers that an error names


# ── the ranks a site allows ────────────────────────────────────────────────────────────────────────────────


def step_of(view: View, round_to: int) -> int:
    """What the site's ranks are multiples of: its groups, and `round_to` if it has room."""
    step = math.lcm(view.site.groups, round_to)
    return step if step <= view.full_rank else view.site.groups


def rounded(view: View, rank: float, round_to: int) -> int:
    """The nearest rank the site allows."""
    step = step_of(view, round_to)
    return int(min(max(round(rank / step), 1) * step, view.full_rank))


def multiples(view: View, round_to: int) -> Ints:
    """All ranks the site allows, ascending."""
    step = step_of(view, round_to)
    return np.arange(step, view.full_rank + 1, step, dtype=np.int64)


def cheaper_ranks(view: View, round_to: int) -> Ints:
    """Those whose pair has fewer weights, hence multiply-adds, than the dense layer."""
    ranks = multiples(view, round_to)
    return ranks[ranks * view.site.factored_weights(1) < view.site.dense_weights]


# ── their costs ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Menu:
    """One site: factored to `ranks` at `costs` below `dense`, ascending; maybe to none, then `why_dense`."""

    site: Site
    ranks: Ints
    costs: Ints
    dense: int
    why_dense: str

    @property
    def least(self) -> int:
        """The cost that cannot be undercut."""
        return int(self.costs.min(initial=self.dense))

    def options(self, tails: Floats) -> Options:
        """Cheapest first, the dense layer last; `tails` as in `Spectra.tails`."""
        losses = np.append(tails[self.ranks // self.site.groups], 0.0)
        return Options(np.append(self.costs, self.dense), losses)


@dataclass(frozen=True, eq=False)
class Budget:
    """A rule applied to a network: what its sites allow, and the cost of the whole dense network.

    Costs are multiply-adds of one image, parameters, or nanoseconds of one batch.
    """

    rule: Rule
    menus: tuple[Menu, ...]
    total: int

    @property
    def for_sites(self) -> int:
        """What the sites may cost together: all else costs what it did."""
        return math.floor(self.rule.amount * self.total) - self.total + sum(menu.dense for menu in self.menus)

    @property
    def is_reachable(self) -> bool:
        """Whether the smallest ranks meet it."""
        return sum(menu.least for menu in self.menus) <= self.for_sites

    @property
    def least(self) -> float:
        """The smallest budget that can be met, a fraction of the dense network, rounded up to 4 digits."""
        saved = sum(menu.dense - menu.least for menu in self.menus)
        return math.ceil(1e4 * (self.total - saved) / self.total) / 1e4

    def in_the_way(self) -> str:
        """Which layers take how much when every rank is at its smallest, as fractions of the dense network."""
        small = [(m.least / self.total, m.site.name) for m in self.menus if len(m.ranks)]
        dense = [(m.dense / self.total, f"{m.site.name}: {m.why_dense}") for m in self.menus if not len(m.ranks)]
        rest = 1 - sum(m.dense for m in self.menus) / self.total
        parts = [f"sites at their smallest rank take {_shares(small)}"] if small else []
        parts += [f"sites that can only stay dense {_shares(dense)}"] if dense else []
        return ", ".join([*parts, f"everything else {rest:.4f}"])


def _shares(parts: Sequence[tuple[float, str]]) -> str:
    """Their sum, and the largest by name."""
    largest = sorted(parts, key=lambda part: -part[0])[:NAMED]
    named = ", ".join(f"{name} {share:.4f}" for share, name in largest)
    more = ", …" if len(parts) > NAMED else ""
    return f"{sum(share for share, _ in parts):.4f} ({named}{more})"


def budget_of(
    rule: Rule, survey: Survey, round_to: int, side: str = "output", latency: LatencyTable | None = None
) -> Budget:
    """What the rule, a `budget`, means for the network; arguments as for `ranks.make_plan`."""
    if rule.of == "latency":
        assert latency is not None, "a budget of latency needs the table"
        total = latency.whole
    else:
        total = survey.macs if rule.of == "macs" else survey.params
    menus = tuple(_menu(rule.of, View(site, side), round_to, latency) for site in survey.sites)
    return Budget(rule, menus, total)


def _menu(of: str, view: View, round_to: int, latency: LatencyTable | None) -> Menu:
    site, ranks = view.site, cheaper_ranks(view, round_to)
    reason = f"no rank, a multiple of {step_of(view, round_to)}, costs less than the dense layer"
    if latency is not None and of == "latency":
        costs, dense = latency.pair(site.name, ranks), latency.dense(site.name)
        if len(ranks):
            reason = f"no measured rank is faster than the dense layer ({format_time(dense)})"
    elif of == "macs":
        costs, dense = ranks * site.factored_macs(1), site.macs
    else:
        costs, dense = ranks * site.factored_weights(1) + (0 if site.bias else site.outputs), site.dense_weights
    order = np.argsort(costs, kind="stable")
    order = order[costs[order] < dense]
    return Menu(site, ranks[order], costs[order], dense, reason)
