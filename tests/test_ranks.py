import json
from pathlib import Path

import pytest
import torch
import torchvision

from dist_prune.config import ConfigError, Rule, parse_rule
from dist_prune.models import build
from dist_prune.projection import rebuild
from dist_prune.ranks import Choice, Plan, PlanError, cost, make_plan
from dist_prune.sites import Survey, survey


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
        ("evenly:0.5", "expected uniform:RATIO"),
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
