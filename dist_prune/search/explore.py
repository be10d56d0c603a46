"""Search for the plan of a budget that loses least, among candidates that are tried.

Predicted losses do not add once many sites change. So the knapsack is solved again and again with another
coefficient for the losses of each site (SPDY, Frantar & Alistarh 2022, https://arxiv.org/abs/2201.13096), and each
plan is tried. Candidate 0 has equal coefficients: it is the plan without a search. The first generation is drawn
around it, each later one around the best candidate so far, some sites at a time.

A candidate is drawn by its number, and a generation has one size, so that the same candidates are tried on any
number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.planner import Planner
from dist_prune.factorization.spectra import Spectra
from dist_prune.utils import keyed_random
from dist_prune.utils.paired import is_clearly_positive, sums_of

T = TypeVar("T")
U = TypeVar("U")

GENERATION = 8  # candidates that are drawn around the same one
SPREAD = 0.3  # of the logarithms of coefficients in the first generation, one standard deviation
STEP = 0.3  # the same of a later change
CHANGED = 0.3  # share of the sites whose coefficients a later candidate changes
CHANCE = 0.05  # of taking one of several plans that are all no better than the first
TIMED = 4  # candidates that are timed as whole networks, at most, where latency is the budget

Coefficients = tuple[float, ...]  # of the losses of each site
Trial = Callable[[Plan], Tensor]  # what a plan's network loses of each image, (n,), found by one rank


@dataclass(frozen=True)
class TriedPlan:
    """A plan that was tried, the coefficients it was made with, and what it lost, the mean over the images."""

    number: int
    coefficients: Coefficients
    plan: Plan
    loss: float


@dataclass
class SearchState:
    """How far a search has come; the same on all ranks, whatever their number.

    `candidates` are those of all complete generations, by number; `losses` are of all plans that were tried, of
    each image, by `name_of`.
    """

    candidates: list[TriedPlan] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        candidates = [asdict(each) | {"plan": each.plan.to_json()} for each in self.candidates]
        return {"candidates": candidates, "losses": dict(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.losses = dict(state["losses"])
        self.candidates = [
            TriedPlan(c["number"], tuple(c["coefficients"]), Plan.from_json(c["plan"]), c["loss"])
            for c in state["candidates"]
        ]

    @property
    def ranking(self) -> list[TriedPlan]:
        """The best first; of several alike, the earliest."""
        return sorted(self.candidates, key=lambda each: (finite(each.loss), each.number))

    def is_clearly_better(self, one: TriedPlan) -> bool:
        """Whether it lost less than candidate 0 on the same images, by more than chance would have it.

        One-sided, for `CHANCE` shared out over all plans that were tried (Bonferroni).
        """
        saved = self.losses[name_of(self.candidates[0].plan)] - self.losses[name_of(one.plan)]
        others = max(1, len(self.losses) - 1)
        return is_clearly_positive(sums_of(saved), CHANCE / others)


def search(
    count: int, planner: Planner, spectra: Spectra, trial: Trial, seed: int, state: SearchState, world: World
) -> Iterator[list[TriedPlan]]:
    """Try candidates, one on each rank at a time.

    Yields after each turn, where the search can be left, what has become complete: a generation, or nothing yet.

    Args:
        count: how many there are, candidate 0 included; a plan that comes twice is tried once.
        planner: of a budget.
        spectra: that losses come from.
        trial: of a plan, on one rank; the same on all.
        seed: of the coefficients.
        state: how far the search had come before.
        world: the ranks.

    Raises:
        RankError: a trial failed on another rank.
    """
    first = world.from_first(lambda: planner.plan(spectra))
    while len(state.candidates) < count:
        done = len(state.candidates)
        drawn = _drawn(range(done, min(done + GENERATION, count)), len(planner.survey.sites), seed, state)
        plans = _shared_out(drawn, lambda each: planner.weighted(first, spectra, each), world)
        waiting = {name: plan for plan in plans if (name := name_of(plan)) not in state.losses}
        for begin in range(0, len(waiting), world.size):
            turn = list(waiting)[begin : begin + world.size]
            losses = _shared_out([waiting[name] for name in turn], trial, world)
            state.losses |= dict(zip(turn, losses, strict=True))
            yield []
        complete = [
            TriedPlan(number, each, plan, float(state.losses[name_of(plan)].mean()))
            for number, (each, plan) in enumerate(zip(drawn, plans, strict=True), start=done)
        ]
        state.candidates += complete
        yield complete


def _shared_out(items: Sequence[T], work: Callable[[T], U], world: World) -> list[U]:
    """What becomes of the items, done by all ranks in turns; the same on all."""
    found = world.gather(world.on_all(lambda: list(map(work, items[world.rank :: world.size]))))
    return [found[place % world.size][place // world.size] for place in range(len(items))]


def chosen(state: SearchState, planner: Planner, world: World) -> TriedPlan:
    """The best candidate that is clearly better than the first one and meets the budget; else the first one."""
    better = [each for each in state.ranking if state.is_clearly_better(each)][:TIMED]

    def met() -> Iterator[TriedPlan]:
        for each in better:
            if (plan := planner.meets(each.plan)) is not None:
                yield replace(each, plan=plan)

    return world.from_first(lambda: next(met(), state.candidates[0]))


def finite(loss: float) -> float:
    """A loss to compare by: one that is not finite is worse than any other."""
    return loss if math.isfinite(loss) else math.inf


def format_summary(state: SearchState, best: TriedPlan, images: int, unit: str) -> str:
    """What the search came to."""
    first, least = state.candidates[0], state.ranking[0]
    verdict = f"candidate {best.number} is taken, {best.loss:.4f}" if best.number else "the first is kept"
    return (
        f"{len(state.candidates)} candidates, {len(state.losses)} different plans, on {images:,} images that they "
        f"were not solved from: {unit} {first.loss:.4f} of the plan without search, {least.loss:.4f} the least, "
        f"by chance lower than on other images; {verdict}"
    )


def name_of(plan: Plan) -> str:
    """Plans of one name give the same network."""
    return " ".join(choice.label for choice in plan.choices)


def _drawn(numbers: Sequence[int], sites: int, seed: int, state: SearchState) -> list[Coefficients]:
    """The coefficients of one generation."""
    if state.candidates:
        parent = state.ranking[0].coefficients
        return [_around(parent, number, STEP, CHANGED, seed) for number in numbers]
    equal = (1.0,) * sites
    return [_around(equal, number, SPREAD, 1.0, seed) if number else equal for number in numbers]


def _around(parent: Coefficients, number: int, spread: float, share: float, seed: int) -> Coefficients:
    """A share of the coefficients, drawn, each times a number whose logarithm is normal."""
    index = torch.tensor([number])
    change = spread * keyed_random.normal(seed, "search", index, len(parent))[0]
    changed = keyed_random.uniform(seed, "search: sites", index, len(parent))[0] < share
    factors = torch.where(changed, change.exp(), 1)
    return tuple((torch.tensor(parent, dtype=torch.float64) * factors).tolist())
