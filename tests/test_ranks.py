import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torchvision

from dist_prune.budget import budget_of
from dist_prune.config import CompressionConfig, MethodConfig
from dist_prune.flags import ConfigError, Rule, parse_rule
from dist_prune.latency import LatencyTable, Timing
from dist_prune.models import build
from dist_prune.projection import rebuild
from dist_prune.ranks import Choice, Plan, PlanError, cost, make_plan, require_reachable, undecided
from dist_prune.sites import Site, Skipped, Survey, survey
from dist_prune.spectra import Spectra, spectra_of


@pytest.fixture(scope="module")
def resnet20() -> Survey:
    return survey(build("resnet20", 10), torch.zeros(1, 3, 32, 32))


def test_uniform_half_on_stride_1_convolutions_is_the_published_recipe(resnet20: Survey) -> None:
    found = resnet20.select("@stride1")
    plan = make_plan(Rule("uniform", 0.5), found, 1)
    assert plan.ranks["conv1"] == 8
    assert plan.ranks["layer3.2.conv2"] == 32
    assert cost(found, plan).macs / found.macs == pytest.approx(0.584, abs=5e-4)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "vit_b_16"])
def test_predicted_cost_is_the_cost_of_the_rebuilt_network(arch: str) -> None:
    size = 224 if arch.startswith("vit") else 64
    model = torchvision.models.get_model(arch, num_classes=10)
    found = survey(model, torch.zeros(1, 3, size, size))
    plan = make_plan(Rule("uniform", 0.4), found, 1)
    measured = survey(rebuild(model, plan), torch.zeros(1, 3, size, size))
    assert (measured.macs, measured.params) == (cost(found, plan).macs, cost(found, plan).params)
    assert measured.macs < found.macs


def test_a_pair_that_costs_no_less_stays_dense_and_says_so(resnet20: Survey) -> None:
    plan = make_plan(Rule("uniform", 0.95), resnet20, 1)
    assert "layer1.0.conv1" not in plan.ranks
    (choice,) = (c for c in plan.choices if c.site == "layer1.0.conv1")
    assert choice.reason == "rank 15 costs no less than the dense layer"


def test_ratio_1_keeps_every_direction_whatever_it_costs(resnet20: Survey) -> None:
    plan = make_plan(Rule("uniform", 1.0), resnet20, 1)
    assert plan.ranks == {site.name: site.outputs for site in resnet20.sites}


def test_ranks_are_rounded_to_the_multiple_where_there_is_room(resnet20: Survey) -> None:
    plan = make_plan(Rule("uniform", 0.4), resnet20, 8)
    assert plan.ranks["layer1.0.conv1"] == 8
    assert plan.ranks["layer3.0.conv2"] == 24
    assert plan.ranks["layer2.0.conv2"] == 16


def test_ranks_of_grouped_convolutions_are_multiples_of_the_groups() -> None:
    found = survey(torchvision.models.resnext50_32x4d(num_classes=10), torch.zeros(1, 3, 32, 32))
    groups = {site.name: site.groups for site in found.sites}
    plan = make_plan(Rule("uniform", 0.3), found, 1)
    assert any(groups[name] == 32 for name in plan.ranks)
    assert all(rank % groups[name] == 0 for name, rank in plan.ranks.items())


def test_a_plan_survives_a_round_trip_through_its_file(resnet20: Survey, tmp_path: Path) -> None:
    plan = make_plan(Rule("uniform", 0.5), resnet20, 1)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"choices": plan.to_json()}))
    assert make_plan(parse_rule(str(file)), resnet20, 1) == plan


def test_ranks_can_be_given_site_by_site(resnet20: Survey) -> None:
    rule = parse_rule("sites:layer3.0.conv1=5,linear=10")
    plan = make_plan(rule, resnet20, 8)
    assert plan.ranks == {"layer3.0.conv1": 5, "linear": 10}
    assert Choice("conv1", None, "not in --ranks") in plan.choices
    assert rule.text == "sites:layer3.0.conv1=5,linear=10" and not rule.needs_spectra
    for text, message in (
        ("conv9=3", "conv9 is not a site here"),
        ("conv1=17", "conv1 has rank 17; expected 1 to"),
    ):
        with pytest.raises(PlanError, match=f"--ranks sites:{text}: {message}"):
            make_plan(parse_rule(f"sites:{text}"), resnet20, 1)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"site": "conv9", "rank": 3}], "conv9 is not a site here; sites: conv1"),
        ([{"site": "conv1", "rank": 17}], "conv1 has rank 17; expected 1 to 16"),
        ([{"site": "conv1", "rank": 0}], "conv1 has rank 0; expected 1 to 16"),
        ([{"rank": 3}], "not a plan: every row needs site, rank"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(resnet20: Survey, tmp_path: Path, choices, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(choices if isinstance(choices, str) else json.dumps(choices))
    with pytest.raises(PlanError, match=message):
        make_plan(Rule("file", file=file), resnet20, 1)


def test_sites_that_a_plan_file_leaves_out_stay_dense(resnet20: Survey, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"site": "layer3.0.conv1", "rank": 5}]))
    plan = make_plan(Rule("file", file=file), resnet20, 1)
    assert plan.ranks == {"layer3.0.conv1": 5}
    assert Choice("conv1", None, "not in mine.json") in plan.choices
    assert len(plan.choices) == len(resnet20.sites)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:0", r"above 0 and at most 1, got 0"),
        ("uniform:1.2", r"above 0 and at most 1, got 1.2"),
        ("uniform:nan", r"above 0 and at most 1, got nan"),
        ("uniform:half", "'half' is not a number"),
        ("evenly:0.5", "expected uniform:RATIO, energy:RATIO, budget:macs=RATIO or sites:NAME=RANK"),
        ("energy:0", r"--ranks energy:0: a ratio must be above 0 and at most 1, got 0"),
        ("budget:macs=1.5", r"--ranks budget:macs=1.5: a ratio must be above 0 and at most 1, got 1.5"),
        ("budget:macs", "'' is not a number"),
        ("sites:", "expected sites:NAME=RANK,NAME=RANK with whole numbers"),
        ("sites:conv1=8,conv2", "expected sites:NAME=RANK,NAME=RANK with whole numbers"),
        ("sites:conv1=-8", "expected sites:NAME=RANK,NAME=RANK with whole numbers"),
        ("sites:conv1=8,conv1=9", "a site is named twice"),
        ("budget:flops=0.5", "a budget of 'flops' is not known; expected budget:macs=0.5, budget:params=0.5"),
        ("budget:0.5", "a budget of '0.5' is not known"),
    ],
)
def test_wrong_rules_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rule(text)


def test_the_plan_lists_layers_that_are_no_sites_too() -> None:
    found = survey(torchvision.models.mobilenet_v2(num_classes=4), torch.zeros(1, 3, 32, 32))
    plan = make_plan(Rule("uniform", 0.5), found, 1)
    assert len(plan.choices) == len(found.sites) + len(found.skipped)
    assert isinstance(plan, Plan) and any("depthwise" in c.reason for c in plan.choices)


# ── the worth of directions ────────────────────────────────────────────────────────────────────────────────


def site(name: str, outputs: int, inputs: int, rows: int, groups: int = 1, bias: bool = False) -> Site:
    return Site(name, "conv", groups, outputs, inputs, rows, bias=bias)


def surveyed(*sites: Site, macs: int = 0, params: int = 0, skipped: tuple[Skipped, ...] = ()) -> Survey:
    """A network of these sites, and `macs` and `params` of other things."""
    macs += sum(s.macs for s in sites)
    params += sum(s.dense_weights + s.bias * s.outputs for s in sites)
    return Survey(sites, skipped, macs, params, 10)


def spectrum(*groups: list[float]) -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.float64)


def decaying(found: Survey, seed: int = 0) -> Spectra:
    generator = torch.Generator().manual_seed(seed)

    def one(s: Site) -> torch.Tensor:
        worth = torch.rand(s.groups, s.width, generator=generator, dtype=torch.float64) ** 6
        return worth.sort(-1, descending=True).values

    return Spectra({s.name: one(s) for s in found.sites})


def test_the_tail_is_half_the_sum_left_out_for_a_metric_and_a_share_otherwise() -> None:
    values = {"a": spectrum([8, 4, 2, 2])}
    assert Spectra(values, "KL", halved=True).tails("a").tolist() == [8, 4, 2, 1, 0]
    assert Spectra(values).tails("a").tolist() == [1, 0.5, 0.25, 0.125, 0]


def test_every_group_keeps_as_many_directions() -> None:
    assert Spectra({"a": spectrum([8, 4, 1], [2, 1, 0])}).tails("a").tolist() == [1, 6 / 16, 1 / 16, 0]


def test_harm_and_nothing_at_all_count_as_nothing() -> None:
    spectra = Spectra({"a": spectrum([3, 1, -7]), "b": spectrum([0, 0, 0])})
    assert spectra.tails("a").tolist() == [1, 0.25, 0, 0]
    assert spectra.tails("b").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("method", "unit", "halved"),
    [
        (MethodConfig("fisher"), "KL", True),
        (MethodConfig("fisher", loss="kl-reverse"), "KL", True),
        (MethodConfig("fisher", loss="mse"), "½·squared change", True),
        (MethodConfig("pca"), "relative loss", False),
        (MethodConfig("hessian-local"), "relative loss", False),
    ],
)
def test_only_the_fisher_metric_gives_an_absolute_unit(method: MethodConfig, unit: str, halved: bool) -> None:
    assert spectra_of({}, method) == Spectra({}, unit, halved)


def test_random_directions_say_nothing() -> None:
    assert spectra_of({}, MethodConfig("random")) is None


@pytest.mark.parametrize("method", ["random", "random-init"])
@pytest.mark.parametrize("ranks", ["energy:0.9", "budget:macs=0.5"])
def test_rules_that_need_the_worth_of_directions_refuse_methods_without(method, ranks: str) -> None:
    with pytest.raises(ConfigError, match=f"--ranks {ranks}: --method {method} does not say .* use uniform:RATIO"):
        CompressionConfig(MethodConfig(method), ranks)


def test_a_rule_reads_as_it_was_written() -> None:
    for text in ("uniform:0.5", "energy:0.99", "budget:latency=0.75"):
        assert parse_rule(text).text == text


def test_predicted_losses_go_with_every_plan_and_through_its_file(tmp_path: Path) -> None:
    found = surveyed(site("a", 4, 40, 1), site("b", 4, 40, 1), skipped=(Skipped("c", "odd"),))
    spectra = Spectra({"a": spectrum([6, 2, 1, 1]), "b": spectrum([1, 1, 1, 1])})
    file = tmp_path / "plan.json"
    file.write_text(json.dumps([{"site": "a", "rank": 2}]))
    plan = make_plan(parse_rule(str(file)), found, 1, spectra=spectra)
    assert [c.loss for c in plan.choices] == [pytest.approx(0.2), 0, None]
    assert plan.loss == pytest.approx(0.2)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert make_plan(Rule("uniform", 0.5), found, 1, spectra=spectra).loss == pytest.approx(0.7)
    assert make_plan(Rule("uniform", 0.5), found, 1).loss is None


# ── energy ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 3), (0.95, 4), (0.999, 5)]
)
def test_energy_is_the_smallest_rank_that_keeps_the_share(share: float, rank: int) -> None:
    found = surveyed(site("a", 6, 100, 1))
    spectra = Spectra({"a": spectrum([50, 25, 15, 5, 5, 0])})
    assert make_plan(Rule("energy", share), found, 1, spectra=spectra).ranks == {"a": rank}


def test_energy_rounds_up_to_the_multiple() -> None:
    found = surveyed(site("a", 8, 100, 1))
    spectra = Spectra({"a": spectrum([4, 3, 1, 1, 1, 0, 0, 0])})
    assert make_plan(Rule("energy", 0.8), found, 2, spectra=spectra).ranks == {"a": 4}


def test_energy_may_need_all_directions_where_the_multiple_does_not_divide_them() -> None:
    found = surveyed(site("a", 6, 100, 1))
    spectra = Spectra({"a": spectrum([2, 2, 2, 2, 2, 2])})
    assert make_plan(Rule("energy", 0.9), found, 4, spectra=spectra).choices[0].rank is None
    assert make_plan(Rule("energy", 0.9), surveyed(site("a", 6, 400, 1)), 5, spectra=spectra).ranks == {}
    assert make_plan(Rule("energy", 0.8), surveyed(site("a", 6, 400, 1)), 5, spectra=spectra).ranks == {"a": 5}


def test_energy_of_groups_is_of_all_of_them() -> None:
    found = surveyed(site("a", 6, 100, 1, groups=2))
    spectra = Spectra({"a": spectrum([8, 4, 1], [2, 1, 0])})
    assert make_plan(Rule("energy", 10 / 16), found, 1, spectra=spectra).ranks == {"a": 2}
    assert make_plan(Rule("energy", 11 / 16), found, 1, spectra=spectra).ranks == {"a": 4}


def test_energy_never_factors_what_costs_no_less() -> None:
    found = surveyed(site("a", 6, 6, 1))
    flat = Spectra({"a": spectrum([1, 1, 1, 1, 1, 1])})
    (choice,) = make_plan(Rule("energy", 0.5), found, 1, spectra=flat).choices
    assert (choice.rank, choice.reason) == (None, "rank 3 costs no less than the dense layer")


# ── budgets ────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = surveyed(
    site("a", 5, 9, 100), site("b", 4, 30, 9, bias=True), site("c", 6, 12, 30, groups=2), macs=700, params=30
)


def every_plan(found: Survey, spectra: Spectra) -> list[tuple[float, Plan]]:
    """All plans that factor only where it is cheaper, and the loss of each by the definition."""
    plans = []
    allowed = [
        [None, *(r for r in range(s.groups, s.outputs, s.groups) if s.factored_macs(r) < s.macs)]
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
                more = rank + round_to if s.factored_macs(rank + round_to) < s.macs else None
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
    for choice in plan.choices:
        if choice.rank is not None:
            group = choice.rank // {s.name: s.groups for s in SMALL.sites}[choice.site]
            assert choice.loss == pytest.approx(float(spectra.tails(choice.site)[group]))


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


def test_before_there_are_spectra_nothing_is_decided(resnet20: Survey) -> None:
    assert {c.reason for c in undecided(resnet20).choices} == {"its rank follows from the statistics"}
    with pytest.raises(PlanError, match=r"--ranks energy:0.9: what directions are worth is not known here"):
        make_plan(Rule("energy", 0.9), resnet20, 1)


# ── budgets of time ────────────────────────────────────────────────────────────────────────────────────────

TIMES = LatencyTable(
    whole=1_000_000,
    sites={
        "a": Timing(300_000, (1, 3), (100_000, 200_000)),
        "b": Timing(410_000, (1, 2), (430_000, 410_000)),
        "c": Timing(200_000, (2, 4), (90_000, 230_000)),
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
    assert TIMES.predicted(plan.ranks) == 740_000
    plan = make_plan(Rule("budget", 0.85, of="latency"), SMALL, 1, spectra=spectra, latency=TIMES)
    assert plan.ranks == {"a": 2}
    assert TIMES.predicted(plan.ranks) == 850_000


def test_what_is_not_faster_stays_dense_and_says_so() -> None:
    plan = make_plan(Rule("budget", 0.8, of="latency"), SMALL, 1, spectra=decaying(SMALL), latency=TIMES)
    assert plan.choices[1] == Choice("b", None, "no measured rank is faster than the dense layer (0.41 ms)", 0)


def test_a_time_out_of_reach() -> None:
    with pytest.raises(PlanError, match=r"the least is 0.69 of the dense network's latency"):
        require_reachable(Rule("budget", 0.68, of="latency"), SMALL, 1, latency=TIMES)
    require_reachable(Rule("budget", 0.69, of="latency"), SMALL, 1, latency=TIMES)
