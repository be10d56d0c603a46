"""The least loss within a budget: against brute force, and against a table over every cost."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dist_prune.factorization import knapsack
from dist_prune.factorization.knapsack import Options, filled, lagrangian, solve, total_cost, total_loss


def options(costs: Sequence[int], losses: Sequence[float]) -> Options:
    return Options(np.array(costs, np.int64), np.array(losses, np.float64))


def instance(rng: np.random.Generator, sites: int, most: int, largest: int) -> list[Options]:
    """Anything goes: equal costs, equal losses, losses that rise with cost, far from convex."""
    made = []
    for _ in range(sites):
        n = rng.integers(1, most + 1)
        losses = rng.integers(0, 8, n) / 4 if rng.random() < 0.3 else rng.random(n) ** 3
        if rng.random() < 0.7:
            losses = np.sort(losses)[::-1]
        made.append(options(np.sort(rng.integers(0, largest, n)), losses))
    return made


def brute_force(sites: Sequence[Options], budget: int) -> float | None:
    choices = itertools.product(*(range(len(site.costs)) for site in sites))
    losses = [total_loss(sites, c) for c in choices if total_cost(sites, c) <= budget]
    return min(losses, default=None)


def over_every_cost(sites: Sequence[Options], budget: int) -> float:
    """The textbook's table: the least loss for each cost up to the budget."""
    table = np.zeros(budget + 1)
    for site in sites:
        longer = np.full(budget + 1, np.inf)
        for cost, loss in zip(site.costs, site.losses, strict=True):
            if cost <= budget:
                np.minimum(longer[cost:], table[: budget + 1 - cost] + loss, out=longer[cost:])
        table = longer
    return table[budget]


def may_still_step(sites: Sequence[Options], choice: Sequence[int], budget: int) -> bool:
    left = budget - total_cost(sites, choice)
    return any(
        0 < cost - site.costs[now] <= left and loss <= site.losses[now]
        for site, now in zip(sites, choice, strict=True)
        for cost, loss in zip(site.costs, site.losses, strict=True)
    )


@pytest.mark.parametrize("seed", range(300))
def test_it_is_what_brute_force_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = instance(rng, sites=int(rng.integers(1, 6)), most=5, largest=int(rng.choice([4, 30, 10**12])))
    cheapest, dearest = (sum(int(f(s.costs)) for s in sites) for f in (np.min, np.max))
    budget = int(rng.integers(cheapest, dearest + 2))
    best = brute_force(sites, budget)
    choice = solve(sites, budget)
    assert best is not None
    assert total_cost(sites, choice) <= budget
    assert total_loss(sites, choice) == pytest.approx(best, abs=1e-12)
    assert not may_still_step(sites, choice, budget)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_a_table_over_every_cost_finds(seed: int) -> None:
    sites = instance(np.random.default_rng(seed), sites=15, most=40, largest=200)
    for budget in (400, 900, 1500):
        assert total_loss(sites, solve(sites, budget)) == pytest.approx(over_every_cost(sites, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_relaxation_fits_and_bounds_the_answer_from_both_sides(seed: int) -> None:
    sites = instance(np.random.default_rng(seed), sites=15, most=40, largest=200)
    for budget in (400, 900, 1500):
        relaxed, best = lagrangian(sites, budget), total_loss(sites, solve(sites, budget))
        bound = sum(float((s.losses + relaxed.price * s.costs).min()) for s in sites) - relaxed.price * budget
        assert total_cost(sites, relaxed.choice) <= budget
        assert bound - 1e-12 <= best <= total_loss(sites, relaxed.choice) + 1e-12


def test_the_price_is_where_the_bound_is_highest() -> None:
    sites = instance(np.random.default_rng(3), sites=15, most=40, largest=200)
    price = lagrangian(sites, 900).price

    def bound(p: float) -> float:
        return sum(float((s.losses + p * s.costs).min()) for s in sites) - p * 900

    assert price > 0
    assert all(bound(price) >= bound(price * factor) - 1e-12 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_a_choice_that_costs_exactly_the_budget_fits() -> None:
    sites = [options([0, 5], [1.0, 0.0]), options([0, 5], [3.0, 0.0])]
    assert lagrangian(sites, 5).choice == (0, 1)
    assert lagrangian(sites, 4).choice == (0, 0)


def test_where_every_loss_can_be_none_the_price_is_none() -> None:
    sites = [options([1, 5], [1.0, 0.0]), options([2, 3], [2.0, 0.0])]
    assert lagrangian(sites, 8).price == 0
    assert solve(sites, 8) == (1, 1)


def test_it_sees_what_no_price_can_reach() -> None:
    """The option (4, 6.5) lies above the line from (0, 10) to (10, 0): no price chooses it."""
    sites = [options([0, 4, 10], [10.0, 6.5, 0.0])] * 2
    assert total_loss(sites, lagrangian(sites, 9).choice) == 20
    assert solve(sites, 9) == (1, 1)


def test_what_is_left_is_spent_even_where_nothing_measured_is_gained() -> None:
    sites = [options([1, 2, 3], [1.0, 0.0, 0.0]), options([1, 9], [0.5, 0.0])]
    assert filled(sites, (0, 0), 4) == (2, 0)
    assert filled(sites, (0, 0), 12) == (2, 1)


def test_what_is_left_goes_where_it_saves_most_for_its_cost() -> None:
    sites = [options([1, 3], [1.0, 0.0]), options([1, 2], [1.0, 0.4]), options([1, 4], [2.0, 1.0])]
    assert filled(sites, (0, 0, 0), 5) == (0, 1, 0)
    assert filled(sites, (0, 0, 0), 6) == (1, 1, 0)


def test_a_step_never_leads_to_a_larger_loss() -> None:
    sites = [options([1, 2, 3, 4], [1.0, 3.0, 2.0, 0.5])]
    assert filled(sites, (0,), 3) == (0,)
    assert filled(sites, (0,), 4) == (3,)


def test_a_budget_below_the_cheapest_options_is_an_error() -> None:
    sites = [options([3, 9], [1.0, 0.0]), options([4, 5], [1.0, 0.0])]
    with pytest.raises(ValueError, match="cheapest options cost 7, the budget is 6"):
        solve(sites, 6)


def network(rng: np.random.Generator, sites: int, ranks: int) -> list[Options]:
    """As spectra are: losses fall off exponentially, costs are large and of many sizes."""
    made = []
    for _ in range(sites):
        worth = np.sort(np.exp(-rng.uniform(2, 12) * rng.random(ranks)))[::-1] * rng.uniform(0.01, 3)
        unit = int(rng.integers(10**4, 10**7))
        costs = np.append(unit * np.arange(1, ranks), int(unit * ranks * 0.97) + unit)
        made.append(options(costs, np.cumsum(worth[::-1])[::-1] - worth.min()))
    return made


def test_networks_of_many_wide_layers_look_at_few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a choice takes moments: a state is one front entry with one option, microseconds each."""
    looked_at: list[int] = []
    extended = knapsack._extended

    def counting(front: knapsack._Front, core: knapsack._Core) -> Any:
        looked_at.append(len(front.costs) * len(core.options))
        assert sum(looked_at) < 2_000_000, "550,000 when it was written; without bounds, a thousand times"
        return extended(front, core)

    monkeypatch.setattr(knapsack, "_extended", counting)
    rng = np.random.default_rng(0)
    for sites in (network(rng, 16, 2000), network(rng, 54, 500), network(rng, 150, 300)):
        dense = sum(int(site.costs[-1]) for site in sites)
        for share in (0.3, 0.5, 0.8):
            looked_at.clear()
            choice = solve(sites, int(share * dense))
            assert not may_still_step(sites, choice, int(share * dense))
            assert looked_at


def test_of_states_of_about_one_cost_the_best_is_kept() -> None:
    costs, losses = np.array([10, 11, 12, 30, 31, 49]), np.array([9.0, 8, 7, 6, 5, 4])
    front = knapsack._Front(costs, losses, np.arange(6), np.arange(6))
    kept = knapsack._thinned(front, 4)
    assert kept.costs.tolist() == [12, 31, 49]
    assert kept.parents.tolist() == [2, 4, 5]


def test_fronts_cut_short_still_give_a_good_choice_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = instance(np.random.default_rng(1), sites=15, most=40, largest=200)
    exact = [total_loss(sites, solve(sites, budget)) for budget in (400, 900)]
    monkeypatch.setattr(knapsack, "LIMITS", (3,))
    for budget, best in zip((400, 900), exact, strict=True):
        choice = solve(sites, budget)
        assert total_cost(sites, choice) <= budget
        assert best - 1e-12 <= total_loss(sites, choice) <= total_loss(sites, lagrangian(sites, budget).choice)
