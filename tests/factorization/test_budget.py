import itertools
import math
from dataclasses import replace

import pytest
import torch
import torchvision

from dist_prune.config.flags import Rule
from dist_prune.factorization.budget import budget_of
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.latency import LatencyTable, Timing
from dist_prune.factorization.plan import Choice, Plan, PlanError, cost, make_plan, require_reachable
from dist_prune.factorization.planner import Planner
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.sites import Skipped, Survey, survey
from tests.surveys import decaying, site, spectrum, surveyed

SMALL = surveyed(
    site("a", 5, 9, 100), site("b", 4, 30, 9, bias=True), site("c", 6, 12, 30, groups=2), macs=700, params=30
)

OUTPUT = FORMS["output"]


def every_plan(found: Survey, spectra: Spectra) -> list[tuple[float, Plan]]:
    """All plans that factor only where it is cheaper, and the loss of each by the definition."""
    plans = []
    allowed = [
        [None, *(r for r in range(s.groups, s.outputs, s.groups) if OUTPUT.macs(s, (r,)) < s.macs)]
        for s in found.sites
    ]
    for ranks in itertools.product(*allowed):
        loss = 0.0
        for s, rank in zip(found.sites, ranks, strict=True):
            values = spectra.values[s.name]
            if rank is not None:
                loss += (values[:, rank // s.groups :].sum() / values.sum()).item()
        plans.append((loss, Plan(tuple(Choice(s.name, r) for s, r in zip(found.sites, ranks, strict=True)))))
    return plans


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_met_with_the_least_loss_of_all_plans(of: str, seed: int) -> None:
    spectra, total = decaying(SMALL, seed), getattr(SMALL, of)
    plans = every_plan(SMALL, spectra)
    for share in (0.5, 0.6, 0.7, 0.85, 0.95):
        plan = make_plan(Rule("budget", share, of=of), SMALL, 1, spectra=spectra)
        best = min(loss for loss, p in plans if getattr(cost(SMALL, p), of) <= share * total)
        assert plan.loss == pytest.approx(best, abs=1e-12)
        assert getattr(cost(SMALL, plan), of) <= share * total


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_no_site_could_be_given_one_more_step(resnet20: Survey, of: str, round_to: int) -> None:
    total, spectra = getattr(resnet20, of), decaying(resnet20)
    for share in (0.4, 0.6, 0.8):
        plan = make_plan(Rule("budget", share, of=of), resnet20, round_to, spectra=spectra)
        left = share * total - getattr(cost(resnet20, plan), of)
        assert left >= 0
        assert all(rank % round_to == 0 for rank in plan.ranks.values())
        for s in resnet20.sites:
            rank = plan.ranks.get(s.name)
            if rank is not None:
                more = rank + round_to if OUTPUT.macs(s, (rank + round_to,)) < s.macs else None
                choices = [Choice(c.site, more if c.site == s.name else c.rank) for c in plan.choices]
                after = getattr(cost(resnet20, Plan(tuple(choices))), of)
                assert after > share * total, f"{s.name} could have had {more}"


def test_with_repair_of_two_equal_sites_the_later_one_keeps_more() -> None:
    found = surveyed(site("early", 16, 64, 1), site("late", 16, 64, 1))
    spectra = Spectra({name: torch.tensor([[0.5**k for k in range(16)]]) for name in ("early", "late")})
    rule = Rule("budget", 0.6, of="macs")

    def ranks(repair: float) -> tuple[int, int]:
        plan = make_plan(rule, found, 1, spectra=spectra, repair=repair)
        return plan.ranks["early"], plan.ranks["late"]

    alike, tilted = ranks(0.0), ranks(2 * math.log(2))
    assert abs(alike[0] - alike[1]) <= 1
    # The early site's losses count half as much, one step of this spectrum.
    assert 0 <= tilted[1] - tilted[0] - 1 <= 1


def test_repair_changes_what_losses_count_not_what_is_predicted() -> None:
    spectra = decaying(SMALL)
    plan = make_plan(Rule("budget", 0.6, of="macs"), SMALL, 1, spectra=spectra, repair=2.0)
    losses = {choice.site: choice.loss for choice in plan.choices if choice.rank is not None}
    assert losses
    groups = {s.name: s.groups for s in SMALL.sites}
    for name, loss in losses.items():
        worth, kept = spectra.values[name], plan.ranks[name] // groups[name]
        assert loss == pytest.approx(float(worth[:, kept:].sum() / worth.sum()))


def test_a_budget_of_everything_keeps_everything(resnet20: Survey) -> None:
    plan = make_plan(Rule("budget", 1.0, of="macs"), resnet20, 1, spectra=decaying(resnet20))
    assert plan.ranks == {}
    assert plan.choices[0].reason == "within the budget nothing need be left out"
    assert plan.loss == 0


def test_ranks_within_a_budget_keep_to_groups() -> None:
    found = survey(torchvision.models.resnext50_32x4d(num_classes=10), torch.zeros(1, 3, 32, 32))
    groups = {s.name: s.groups for s in found.sites}
    plan = make_plan(Rule("budget", 0.7, of="macs"), found, 8, spectra=decaying(found))
    assert any(groups[name] == 32 for name in plan.ranks)
    assert all(rank % math.lcm(groups[name], 8) == 0 for name, rank in plan.ranks.items())


def test_a_budget_out_of_reach_names_what_can_be_reached_and_what_is_in_the_way() -> None:
    """a: rank 1 costs 100·14 of 4500; b cannot be factored; 1000 are of no site."""
    found = surveyed(site("a", 5, 9, 100), site("b", 1, 10, 50), macs=1000, skipped=(Skipped("fc", "shares"),))
    assert found.macs == 6000
    message = (
        r"--ranks budget:macs=0.3: out of reach, the least is 0.4834 of the dense network's macs: sites at their "
        r"smallest rank take 0.2333 \(a 0.2333\), sites that can only stay dense 0.0833 \(b: no rank, a multiple "
        r"of 1, costs less than the dense layer 0.0833\), everything else 0.1667, among it fc \(shares\)"
    )
    with pytest.raises(PlanError, match=message):
        require_reachable(Rule("budget", 0.3, of="macs"), found, 1)
    with pytest.raises(PlanError, match=message):
        make_plan(Rule("budget", 0.3, of="macs"), found, 1, spectra=decaying(found))


def test_a_fraction_of_a_unit_is_over_the_budget() -> None:
    found = surveyed(site("a", 2, 9, 1))
    require_reachable(Rule("budget", 11 / 18, of="macs"), found, 1)
    with pytest.raises(PlanError, match=r"the least is 0\.6112"):
        require_reachable(Rule("budget", 10.5 / 18, of="macs"), found, 1)


@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_least_that_is_told_can_be_reached(resnet20: Survey, of: str) -> None:
    least = budget_of(Rule("budget", 0.5, of=of), resnet20, 8).least
    require_reachable(Rule("budget", least, of=of), resnet20, 8)
    with pytest.raises(PlanError):
        require_reachable(Rule("budget", least - 0.0002, of=of), resnet20, 8)


# ── budgets of time ────────────────────────────────────────────────────────────────────────────────────────

TIMES = LatencyTable(
    whole=1_000_000,
    sites={
        "a": {"output": Timing(300_000, ((1,), (3,)), (100_000, 200_000))},
        "b": {"output": Timing(410_000, ((1,), (2,)), (430_000, 410_000))},
        "c": {"output": Timing(200_000, ((2,), (4,)), (90_000, 230_000))},
    },
)


def test_a_budget_of_time_spends_measured_time() -> None:
    """Rank 2 of a is half way between its measured ranks: 150 µs; rank 4 of c is slower than c itself."""
    spectra = Spectra(
        {"a": spectrum([5, 3, 1, 1, 0]), "b": spectrum([1, 0, 0, 0]), "c": spectrum([3, 1, 1], [3, 1, 1])}
    )
    rule = Rule("budget", 0.75, of="latency")
    plan = make_plan(rule, SMALL, 1, spectra=spectra, latency=TIMES)
    assert plan.ranks == {"a": 2, "c": 2}
    assert TIMES.predicted({name: ("output", (rank,)) for name, rank in plan.ranks.items()}) == 740_000
    plan = make_plan(Rule("budget", 0.85, of="latency"), SMALL, 1, spectra=spectra, latency=TIMES)
    assert plan.ranks == {"a": 2}
    assert TIMES.predicted({name: ("output", (rank,)) for name, rank in plan.ranks.items()}) == 850_000


def test_what_is_not_faster_stays_dense_and_says_so() -> None:
    plan = make_plan(Rule("budget", 0.8, of="latency"), SMALL, 1, spectra=decaying(SMALL), latency=TIMES)
    assert plan.choices[1] == Choice("b", None, "no measured rank is faster than the dense layer (0.41 ms)", 0)


def test_a_time_out_of_reach() -> None:
    with pytest.raises(PlanError, match=r"the least is 0.69 of the dense network's latency"):
        require_reachable(Rule("budget", 0.68, of="latency"), SMALL, 1, latency=TIMES)
    require_reachable(Rule("budget", 0.69, of="latency"), SMALL, 1, latency=TIMES)


# ── … of the network as a whole ────────────────────────────────────────────────────────────────────────────


SPECTRA = Spectra(
    {"a": spectrum([5, 3, 1, 1, 0]), "b": spectrum([1, 0, 0, 0]), "c": spectrum([3, 1, 1], [3, 1, 1])}
)


def slower_by(factor: float, tried: list[float], share: float) -> Plan:
    """What is planned for a share of the time where networks take `factor` of what their layers say."""

    def time_of(plan: Plan) -> float:
        chosen = {name: (choice.form, choice.ranks) for name, choice in plan.factored.items()}
        tried.append(factor * TIMES.predicted(chosen) / TIMES.whole)
        return tried[-1]

    return Planner(Rule("budget", share, of="latency"), SMALL, 1, "output", 8, TIMES, time_of=time_of).plan(
        SPECTRA
    )


def test_a_network_that_is_slower_than_its_layers_said_is_planned_again_for_less_time() -> None:
    tried = list[float]()
    plan = slower_by(1.1, tried, 0.85)
    assert tried == pytest.approx([1.1 * 0.85, 1.1 * 0.74])
    assert (plan.ranks, plan.time) == ({"a": 2, "c": 2}, pytest.approx(1.1 * 0.74))


def test_a_network_that_is_as_fast_as_asked_is_timed_once() -> None:
    tried = list[float]()
    assert slower_by(1.0, tried, 0.85).ranks == {"a": 2}
    assert tried == pytest.approx([0.85])


@pytest.mark.parametrize("reading", [1.3, 2.0])  # the second asks for what is out of reach
def test_one_reading_that_was_far_too_long_does_not_make_the_network_much_smaller(
    reading: float,
) -> None:
    readings, tried = iter([reading]), list[Plan]()

    def time_of(plan: Plan) -> float:
        tried.append(plan)
        chosen = {name: (choice.form, choice.ranks) for name, choice in plan.factored.items()}
        return next(readings, 1.0) * TIMES.predicted(chosen) / TIMES.whole

    planner = Planner(Rule("budget", 0.9, of="latency"), SMALL, 1, "output", 8, TIMES, time_of=time_of)
    assert planner.plan(SPECTRA).time == pytest.approx(0.85)  # 0.69 is where the first reading led
    assert len(tried) == len(set(map(repr, tried))) <= 6


def test_where_no_network_is_as_fast_as_asked_the_fastest_is_taken_and_said_to_be() -> None:
    plan = slower_by(1.5, [], 0.75)
    assert plan.time is not None and plan.time > 0.75
    planned = Planner(Rule("budget", 0.75, of="latency"), SMALL, 1, "output", 8, TIMES)
    assert "no plan that was tried is faster; asked 0.75" in planned.format_table(plan, {})
    assert "no plan that was tried" not in planned.format_table(replace(plan, time=0.74), {})
