"""The options of each site under a budget, and their costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_prune.config.flags import Rule
from dist_prune.factorization.forms import FORMS, Form, Ranks, rank_grid
from dist_prune.factorization.knapsack import Ints, Options
from dist_prune.factorization.latency import LatencyTable, format_time
from dist_prune.factorization.spectra import Spectra
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
    cheaper: Ints = ranks[FORMS["output"].params(view.site, [ranks]) < view.site.dense_weights]
    return cheaper


# ── their costs ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Menu:
    """One site: its `options`, forms with ranks, at `costs` below `dense`; there may be none, then `why_dense`."""

    site: Site
    options: tuple[tuple[str, Ranks], ...]
    costs: Ints
    dense: int
    why_dense: str = ""

    @property
    def least(self) -> int:
        """The cost that cannot be undercut."""
        return int(self.costs.min(initial=self.dense))

    def pruned(self, factor: float, spectra: Spectra) -> tuple[Menu, Options]:
        """The options that no other beats in both cost and loss, and these, the dense layer last.

        Args:
            factor: that losses are counted with.
            spectra: that losses come from.
        """
        losses = factor * spectra.of_options(self.site, self.options)
        order = np.lexsort((losses, self.costs))
        before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))[:-1]
        kept = order[losses[order] < before] if len({form for form, _ in self.options}) > 1 else order
        menu = Menu(self.site, tuple(self.options[i] for i in kept), self.costs[kept], self.dense, self.why_dense)
        return menu, Options(np.append(menu.costs, self.dense), np.append(losses[kept], 0.0))


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
        small = [(m.least / self.total, m.site.name) for m in self.menus if m.options]
        dense = [(m.dense / self.total, f"{m.site.name}: {m.why_dense}") for m in self.menus if not m.options]
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
    rule: Rule,
    survey: Survey,
    round_to: int,
    side: str = "output",
    latency: LatencyTable | None = None,
    forms: Sequence[Form] = (FORMS["output"],),
) -> Budget:
    """What the rule, a `budget`, means for the network; arguments as for `ranks.make_plan`."""
    if rule.of == "latency":
        assert latency is not None, "a budget of latency needs the table"
        total = latency.whole
    else:
        total = survey.macs if rule.of == "macs" else survey.params
    menus = tuple(_menu(rule.of, View(site, side), round_to, latency, forms) for site in survey.sites)
    return Budget(rule, menus, total)


def options_of(view: View, round_to: int, forms: Sequence[Form]) -> dict[str, list[Ints]]:
    """The ranks at which each form has fewer weights than the dense layer, an array for each rank of the form."""
    site, found = view.site, dict[str, list[Ints]]()
    for form in forms:
        if form.why_not(site) or (form.name != "output" and view.side == "input"):
            continue
        if form.name == "output":
            found[form.name] = [multiples(view, round_to)]
            continue
        full = form.full_ranks(site)
        steps = [step if (step := math.lcm(site.groups, round_to)) <= most else site.groups for most in full]
        if len(full) == 1:
            found[form.name] = [np.arange(steps[0], full[0] + 1, steps[0], dtype=np.int64)]
        else:
            grids = np.meshgrid(*(rank_grid(most, step) for most, step in zip(full, steps, strict=True)))
            found[form.name] = [grid.ravel() for grid in grids]
    return {name: columns for name, every in found.items() if len((columns := _cheaper(site, name, every))[0])}


def _cheaper(site: Site, name: str, columns: list[Ints]) -> list[Ints]:
    fewer = FORMS[name].params(site, columns) < site.dense_weights
    return [column[fewer] for column in columns]


def _menu(of: str, view: View, round_to: int, latency: LatencyTable | None, forms: Sequence[Form]) -> Menu:
    """All options that cost less than the dense layer, by cost."""
    site = view.site
    reason = f"no rank, a multiple of {step_of(view, round_to)}, costs less than the dense layer"
    dense = latency.dense(site.name) if latency is not None else site.macs if of == "macs" else site.dense_weights
    names, ranks, costs = list[str](), list[Ranks](), list[Ints]()
    for name, columns in options_of(view, round_to, forms).items():
        form = FORMS[name]
        if latency is not None and of == "latency":
            cost = latency.option(site.name, name, columns)
        elif of == "macs":
            cost = np.asarray(form.macs(site, columns), np.int64)
        else:
            cost = np.asarray(form.params(site, columns), np.int64) + (0 if site.bias else site.outputs)
        names += [name] * len(cost)
        ranks += zip(*(column.tolist() for column in columns), strict=True)
        costs.append(cost)
    if latency is not None and ranks:
        reason = f"no measured rank is faster than the dense layer ({format_time(dense)})"
    together = np.concatenate(costs) if costs else np.zeros(0, np.int64)
    order = np.argsort(together, kind="stable")
    order = order[together[order] < dense]
    options = tuple((names[i], ranks[i]) for i in order)
    return Menu(site, options, together[order], dense, "" if options else reason)


def repair_counts(sites: int, repair: float) -> list[float]:
    """How much the loss of each of so many sites counts, in execution order.

    A site that is solved again repairs part of what those before it lost, above all what reaches it on a shortcut:
    a loss counts exp(−repair · the share of sites still to come).
    """
    return [math.exp(-repair * (sites - place) / sites) for place in range(sites)]
