import json
from pathlib import Path

import pytest
import torch
import torchvision

from dist_prune.config.compression import CompressionConfig, MethodConfig
from dist_prune.config.flags import ConfigError, Rule, parse_rule
from dist_prune.factorization.plan import Choice, Plan, PlanError, cost, make_plan, undecided
from dist_prune.factorization.project import rebuild
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.sites import Skipped, Survey, survey
from tests.surveys import site, spectrum, surveyed


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
        ("conv1=17", "conv1 has output rank 17; expected 1 to"),
    ):
        with pytest.raises(PlanError, match=f"--ranks sites:{text}: {message}"):
            make_plan(parse_rule(f"sites:{text}"), resnet20, 1)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"site": "conv9", "rank": 3}], r"conv9 is not a site here; did you mean conv1\?"),
        ([{"site": "conv1", "rank": 17}], "conv1 has output rank 17; expected 1 to 16"),
        ([{"site": "conv1", "rank": 0}], "conv1 has output rank 0; expected 1 to 16"),
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
    assert any("depthwise" in c.reason for c in plan.choices)


@pytest.mark.parametrize("method", ["random", "random-init"])
@pytest.mark.parametrize("ranks", ["energy:0.9", "budget:macs=0.5"])
def test_rules_that_need_the_worth_of_directions_refuse_methods_without(method, ranks: str) -> None:
    with pytest.raises(ConfigError, match=f"--ranks {ranks}: --method {method} gives no spectrum"):
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


def test_before_there_are_spectra_nothing_is_decided(resnet20: Survey) -> None:
    assert {c.reason for c in undecided(resnet20).choices} == {"its rank follows from the statistics"}
    with pytest.raises(PlanError, match=r"--ranks energy:0.9: there is no spectrum here"):
        make_plan(Rule("energy", 0.9), resnet20, 1)


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
