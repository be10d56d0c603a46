"""One option of each site, so that the losses sum to the least and the costs stay within a budget.

This is the multiple-choice knapsack problem. It is solved as Kellerer, Pferschy & Pisinger do (Knapsack Problems,
2004, chapter 11): the Lagrangian relaxation gives a price of cost, a first choice and a lower bound; options that
the bound excludes are dropped; dynamic programming over the Pareto front of (cost, loss) decides among the rest.
Costs are integers, so nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LIMITS = (1000, 20_000)  # states on a front: first for a good upper bound, then for the answer
SLACK = 1e-12  # of float64 sums of losses, relative


@dataclass(frozen=True, eq=False)
class Options:
    """What can be done with one site: (n,) costs, ascending, and the loss of each; n ≥ 1."""

    costs: Ints
    losses: Floats


@dataclass(frozen=True)
class Relaxed:
    """The best choice at a price: no choice has a smaller Σ loss + price·Σ cost. One index into each site."""

    choice: tuple[int, ...]
    price: float


def total_cost(sites: Sequence[Options], choice: Sequence[int]) -> int:
    """Cost of a choice."""
    return sum(int(site.costs[i]) for site, i in zip(sites, choice, strict=True))


def total_loss(sites: Sequence[Options], choice: Sequence[int]) -> float:
    """Loss of a choice."""
    return float(sum(site.losses[i] for site, i in zip(sites, choice, strict=True)))


def lagrangian(sites: Sequence[Options], budget: int) -> Relaxed:
    """Bisect the price of cost until its best choice fits; each price is the secant of the two choices around.

    So the last price is exactly the one that maximises the lower bound, after a few steps. Only choices on the
    convex hull are found: `solve` is never worse.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    over_budget = tuple(int(site.losses.argmin()) for site in sites)
    fits = tuple(int(np.lexsort((site.losses, site.costs))[0]) for site in sites)
    if total_cost(sites, fits) > budget:
        raise ValueError(f"the cheapest options cost {total_cost(sites, fits)}, the budget is {budget}")
    if total_cost(sites, over_budget) <= budget:
        return Relaxed(over_budget, 0.0)
    while True:
        price = _secant(sites, over_budget, fits)
        middle = tuple(int((site.losses + price * site.costs).argmin()) for site in sites)
        value, known = (_value(sites, choice, price) for choice in (middle, fits))
        if middle in (over_budget, fits) or value >= known - SLACK * abs(known):
            return Relaxed(fits, price)
        over_budget, fits = (over_budget, middle) if total_cost(sites, middle) <= budget else (middle, fits)


def _secant(sites: Sequence[Options], over_budget: Sequence[int], fits: Sequence[int]) -> float:
    saved = total_cost(sites, over_budget) - total_cost(sites, fits)
    return max(0.0, total_loss(sites, fits) - total_loss(sites, over_budget)) / saved


def _value(sites: Sequence[Options], choice: Sequence[int], price: float) -> float:
    return total_loss(sites, choice) + price * total_cost(sites, choice)


def solve(sites: Sequence[Options], budget: int) -> tuple[int, ...]:
    """The choice of least loss within the budget, one index into each site.

    Exact unless a front outgrows the last of `LIMITS`. Then the loss is at most that of the best choice for a
    budget smaller by (number of sites)/limit of the range of costs that the bound left open. What remains of the
    budget is spent in any case, so that no site can be given its next option.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    relaxed = lagrangian(sites, budget)
    best = filled(sites, relaxed.choice, budget)
    for limit in LIMITS:
        found, exact = _search(sites, budget, relaxed.price, best, limit)
        best = filled(sites, min(found, best, key=lambda choice: total_loss(sites, choice)), budget)
        if exact:
            break
    return best


def filled(sites: Sequence[Options], choice: Sequence[int], budget: int) -> tuple[int, ...]:
    """Spend what is left, always on the step that saves most loss per cost, until no step fits.

    A step goes to a site's next costlier option whose loss is no larger.
    """
    now = list(choice)
    left = budget - total_cost(sites, now)
    while True:
        steps = [step for i, site in enumerate(sites) if (step := _next_step(site, now[i], i))]
        steps = [step for step in steps if step[1] <= left]
        if not steps:
            return tuple(now)
        _, cost, place, option = max(steps)
        now[place], left = option, left - cost


def _next_step(site: Options, now: int, place: int) -> tuple[float, int, int, int] | None:
    """Saved loss per cost, cost, site, option."""
    better = (site.costs > site.costs[now]) & (site.losses <= site.losses[now])
    option = int(better.argmax())
    if not better[option]:
        return None
    cost = int(site.costs[option] - site.costs[now])
    return float(site.losses[now] - site.losses[option]) / cost, cost, place, option


# ── dynamic programming over Pareto fronts ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Core:
    """The options of one site that a choice better than the known one can contain."""

    place: int
    options: Ints
    costs: Ints
    losses: Floats


@dataclass(frozen=True, eq=False)
class _Front:
    """Undominated sums over the sites so far, cheapest first, and how each came about."""

    costs: Ints
    losses: Floats
    parents: Ints
    options: Ints


def _search(
    sites: Sequence[Options], budget: int, price: float, known: Sequence[int], limit: int
) -> tuple[tuple[int, ...], bool]:
    """The best choice, and whether no front was cut down to `limit` states.

    With L the lower bound at `price` and ρ ≥ 0 an option's distance from its site's best at that price, every
    choice has loss L + Σρ + price·(budget − cost): those above the known loss are never followed.
    """
    bases = [float((site.losses + price * site.costs).min()) for site in sites]
    loss = total_loss(sites, known)
    gap = loss - sum(bases) + price * budget
    gap += SLACK * (abs(loss) + sum(map(abs, bases)) + price * budget)
    cores = sorted((_core(i, site, price, gap) for i, site in enumerate(sites)), key=lambda c: len(c.options))
    least = budget - gap / price if price else -np.inf
    cheapest, dearest = _rests([c.costs.min() for c in cores]), _rests([c.costs.max() for c in cores])
    fronts = [_Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))]
    base, exact = 0.0, True
    for core, low, high in zip(cores, cheapest, dearest, strict=True):
        base += bases[core.place]
        costs, losses, states = _extended(fronts[-1], core)
        open_ = (costs + low <= budget) & (costs + high >= least) & (losses + price * costs - base <= gap)
        front = _undominated(costs, losses, states, open_, core.options)
        exact &= len(front.costs) <= limit
        fronts.append(_thinned(front, limit))
        if not len(fronts[-1].costs):  # nothing is better than what is known
            return tuple(known), exact
    return _traced(fronts, cores), exact


def _core(place: int, site: Options, price: float, gap: float) -> _Core:
    values = site.losses + price * site.costs
    chosen = np.flatnonzero(values - values.min() <= gap)
    return _Core(place, chosen, site.costs[chosen], site.losses[chosen])


def _rests(values: Sequence[np.int64]) -> list[int]:
    """Of each place, the sum of the values after it."""
    sums = np.cumsum([0, *values[::-1]])[:-1]
    return [int(s) for s in sums[::-1]]


def _extended(front: _Front, core: _Core) -> tuple[Ints, Floats, Ints]:
    """Every state with every option: costs, losses, and state·(number of options) + option."""
    costs = (front.costs[:, None] + core.costs).ravel()
    losses = (front.losses[:, None] + core.losses).ravel()
    return costs, losses, np.arange(len(costs), dtype=np.int64)


def _undominated(costs: Ints, losses: Floats, states: Ints, open_: NDArray[np.bool_], options: Ints) -> _Front:
    """Of the open states, those cheaper than all of smaller or equal loss."""
    costs, losses, states = costs[open_], losses[open_], states[open_]
    order = np.lexsort((losses, costs))
    costs, losses, states = costs[order], losses[order], states[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses]))[:-1]
    better = losses < before
    parents, chosen = np.divmod(states[better], len(options))
    return _Front(costs[better], losses[better], parents, options[chosen])


def _thinned(front: _Front, limit: int) -> _Front:
    """At most `limit` states: of each of as many equal ranges of cost the one of least loss."""
    if len(front.costs) <= limit:
        return front
    width = (front.costs[-1] - front.costs[0]) // limit + 1
    ranges = (front.costs - front.costs[0]) // width
    last = np.append(ranges[1:] != ranges[:-1], True)
    return _Front(front.costs[last], front.losses[last], front.parents[last], front.options[last])


def _traced(fronts: Sequence[_Front], cores: Sequence[_Core]) -> tuple[int, ...]:
    """Follow the state of least loss back through the fronts."""
    choice = [0] * len(cores)
    state = int(fronts[-1].losses.argmin())
    for front, core in zip(fronts[:0:-1], cores[::-1], strict=True):
        choice[core.place] = int(front.options[state])
        state = int(front.parents[state])
    return tuple(choice)
