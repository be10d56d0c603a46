"""The search itself, with trials that are arithmetic: which candidates there are, who tries them, which wins."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_prune.config.flags import parse_rule
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Plan, cost
from dist_prune.factorization.planner import Planner
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.models import build
from dist_prune.network.sites import Survey, survey
from dist_prune.search import explore
from dist_prune.search.explore import SearchState, TriedPlan, chosen, search
from tests.ranks import RanksFailed, run_ranks

COUNT = 30


def planner() -> Planner:
    found = survey(build("resnet20", 10), torch.zeros(1, 3, 32, 32))
    return Planner(parse_rule("budget:macs=0.4"), found, 1, "output", 1)


def spectra(found: Survey) -> Spectra:
    generator = torch.Generator().manual_seed(0)

    def values(width: int) -> torch.Tensor:
        decay = torch.arange(width, dtype=torch.float64).mul(-4 / width).exp()
        return decay[None] * torch.rand(1, generator=generator, dtype=torch.float64)

    return Spectra({site.name: values(site.outputs) for site in found.sites}, "KL", halved=True)


def truth(plan: Plan) -> float:
    """The real loss of a plan: of every third site eight times the predicted one."""
    return math.fsum((8 if place % 3 == 0 else 1) * (c.loss or 0.0) for place, c in enumerate(plan.choices))


def lost(plan: Plan) -> Tensor:
    """Of a hundred images, which differ."""
    return truth(plan) * torch.linspace(0.5, 1.5, 100, dtype=torch.float64)


def searched(world: World, count: int = COUNT, seed: int = 0) -> tuple[SearchState, list[str], list[int]]:
    """The state at the end, the plans that this rank tried, and how many candidates each turn made complete."""
    plans, state, tried = planner(), SearchState(), list[str]()

    def trial(plan: Plan) -> Tensor:
        tried.append(explore.name_of(plan))
        return lost(plan)

    turns = [len(done) for done in search(count, plans, spectra(plans.survey), trial, seed, state, world)]
    return state, tried, turns


def test_any_number_of_ranks_tries_the_same_candidates_each_on_one_rank(world: World) -> None:
    alone, tried, turns = searched(world)
    assert [each.number for each in alone.candidates] == list(range(COUNT))
    assert len(set(tried)) == len(tried) == len(alone.losses)
    assert len(turns) == len(tried) + math.ceil(COUNT / explore.GENERATION)
    for size in (2, 3):
        found = run_ranks(searched, size)
        for state, _, _ in found:
            assert state.candidates == alone.candidates and all(
                torch.equal(state.losses[name], found) for name, found in alone.losses.items()
            )
        shared = [plan for _, own, _ in found for plan in own]
        assert sorted(shared) == sorted(tried), "every plan is tried by one rank, once"
        assert max(len(own) for _, own, _ in found) < len(tried)


def test_candidates_meet_the_budget_and_the_first_is_the_plan_without_a_search(world: World) -> None:
    state, _, _ = searched(world)
    plans = planner()
    assert state.candidates[0].plan == plans.plan(spectra(plans.survey))
    for each in state.candidates:
        assert cost(plans.survey, each.plan).macs <= 0.4 * plans.survey.macs
    assert len(state.losses) > COUNT / 2


def test_a_better_plan_is_found_than_predictions_give(world: World) -> None:
    """With the true losses in the knapsack one would find the best plan: at least a third of the way is gone."""
    state, _, _ = searched(world, 64)
    plans = planner()
    first, best = state.candidates[0], state.ranking[0]
    right = [8.0 if place % 3 == 0 else 1.0 for place in range(len(plans.survey.sites))]
    least = truth(plans.weighted(first.plan, spectra(plans.survey), right))
    assert least < best.loss < first.loss
    assert first.loss - best.loss > (first.loss - least) / 3
    assert best.loss == pytest.approx(truth(best.plan))
    assert chosen(state, plans, world) == best


def test_later_generations_are_drawn_around_the_best_so_far(world: World) -> None:
    state, _, _ = searched(world)
    for begin in range(explore.GENERATION, COUNT, explore.GENERATION):
        before = SearchState(state.candidates[:begin]).ranking[0].coefficients
        for each in state.candidates[begin : begin + explore.GENERATION]:
            kept = np.equal(each.coefficients, before)
            assert kept.any() and not kept.all(), "some sites change, some do not"


def test_another_seed_draws_other_candidates(world: World) -> None:
    one, other = (searched(world, 8, seed)[0].candidates for seed in (0, 1))
    assert one[0] == other[0]
    assert all(a.coefficients != b.coefficients for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.parametrize("turns", [1, 8, 9, 13])
def test_a_search_that_was_left_after_any_turn_ends_the_same(world: World, turns: int) -> None:
    whole, _, _ = searched(world)
    plans, state, tried = planner(), SearchState(), list[str]()

    def trial(plan: Plan) -> Tensor:
        tried.append(explore.name_of(plan))
        return lost(plan)

    way = search(COUNT, plans, spectra(plans.survey), trial, 0, state, world)
    for _ in range(turns):
        next(way)
    again = SearchState()
    again.load_state_dict(state.state_dict())
    list(search(COUNT, plans, spectra(plans.survey), trial, 0, again, world))
    assert again.candidates == whole.candidates
    assert len(tried) == len(whole.losses), "nothing is tried twice"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_never_taken(world: World, broken: float) -> None:
    plans, state = planner(), SearchState()
    first = plans.plan(spectra(plans.survey))

    def trial(plan: Plan) -> Tensor:
        return torch.full((9,), 1.0 if plan == first else broken)

    list(search(12, plans, spectra(plans.survey), trial, 0, state, world))
    assert chosen(state, plans, world).number == 0


def failing(world: World) -> None:
    plans = planner()

    def trial(plan: Plan) -> Tensor:
        if world.rank == 1:
            raise ValueError("this plan cannot be built")
        return lost(plan)

    list(search(8, plans, spectra(plans.survey), trial, 0, SearchState(), world))


def test_a_trial_that_fails_on_one_rank_ends_all() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(failing, 2)
    assert len(failed.value.reports) == 2
    assert all("this plan cannot be built" in report for report in failed.value.reports.values())


# ── where time is the budget ───────────────────────────────────────────────────────────────────────────────


def state_of(*losses: float, spread: float = 0.0) -> SearchState:
    """Candidates of these mean losses of 25 images; what each saves differs between images by `spread`."""
    plans, noise = planner(), torch.linspace(-1, 1, 25, dtype=torch.float64)
    first = plans.plan(spectra(plans.survey))
    listed = [Plan(first.choices[number:]) for number in range(len(losses))]
    named = {
        explore.name_of(p): n + spread * k * noise for k, (p, n) in enumerate(zip(listed, losses, strict=True))
    }
    return SearchState([TriedPlan(n, (), p, losses[n]) for n, p in enumerate(listed)], named)


def test_the_best_candidate_that_is_fast_enough_as_a_network_is_taken(world: World) -> None:
    """By the times of the layers all are; as whole networks the best is slower than asked."""
    times = iter([0.45, 0.39])
    timed = replace(planner(), time_of=lambda _: next(times))
    taken = chosen(state_of(0.3, 0.2, 0.1), timed, world)
    assert (taken.number, taken.plan.time) == (1, 0.39)


def test_where_no_candidate_is_fast_enough_the_first_stays(world: World) -> None:
    assert chosen(state_of(0.3, 0.2, 0.1), replace(planner(), time_of=lambda _: 0.5), world).number == 0
    assert chosen(state_of(0.1, 0.2, 0.3), replace(planner(), time_of=lambda _: 0.5), world).number == 0


# ── chance ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("others", "saved", "number"), [(1, 1.6, 0), (1, 1.7, 1), (10, 1.7, 0), (10, 2.5, 0), (10, 2.6, 1)]
)
def test_a_candidate_must_be_better_than_the_best_of_several_by_chance(
    world: World, others: int, saved: float, number: int
) -> None:
    """By 1.64 standard errors of what it saves on 25 images where it is alone, by 2.58 where it is one of ten."""
    noise = torch.linspace(-1, 1, 25, dtype=torch.float64)
    error = float(noise.std()) / 25**0.5
    state = state_of(1.0, 1.0 - saved * error, *[1.0] * (others - 1), spread=1.0)
    assert chosen(state, planner(), world).number == number
