"""The way from dense to a plan in small steps."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from dist_prune.config.flags import Rule, parse_rule
from dist_prune.factorization.plan import Choice, Plan, cost, make_plan
from dist_prune.factorization.schedule import rounds, shrunk_sites, still_factored
from dist_prune.network.sites import Survey, survey


@pytest.mark.parametrize("step", [0.98, 0.9, 0.5, 0.01])
@pytest.mark.parametrize(
    "rule", [Rule("uniform", 0.5), Rule("uniform", 0.2), parse_rule("sites:layer1.0.conv1=3")]
)
@pytest.mark.parametrize("round_to", [1, 8])
def test_every_round_is_cheaper_and_the_last_is_the_target(
    resnet20: Survey, step: float, rule: Rule, round_to: int
) -> None:
    target = make_plan(rule, resnet20, round_to)
    plans = rounds(target, resnet20, step, round_to, "output")
    assert plans[-1] == target
    costs = [resnet20.macs, *(cost(resnet20, plan).macs for plan in plans)]
    assert all(after < before for before, after in pairwise(costs))
    for before, after in pairwise(plans):
        assert set(before.ranks) <= set(after.ranks)
        assert all(after.ranks[name] <= rank for name, rank in before.ranks.items())
        assert [c.site for c in before.choices] == [c.site for c in target.choices]


def test_a_site_keeps_a_power_of_the_step(resnet20: Survey) -> None:
    plans = rounds(make_plan(Rule("uniform", 0.25), resnet20, 1), resnet20, 0.8, 1, "output")
    name, channels = "layer3.0.conv2", 64
    expected = [round(channels * 0.8**k) for k in range(1, 7)]  # 51, 41, 33, 26, 21, 17
    assert [plan.ranks.get(name) for plan in plans] == [*expected, 16]


def test_a_site_stays_dense_until_a_pair_costs_less(resnet20: Survey) -> None:
    first = rounds(make_plan(Rule("uniform", 0.25), resnet20, 1), resnet20, 0.95, 1, "output")[0]
    (choice,) = (c for c in first.choices if c.site == "layer3.0.conv2")
    assert (choice.rank, choice.reason) == (None, "not shrunk so far that a pair costs less")
    assert 61 * (576 + 64) >= 64 * 576, "what 0.95 of the channels would cost"


def test_a_target_that_is_dense_is_reached_at_once(resnet20: Survey) -> None:
    target = Plan(tuple(Choice(site.name, None, "left") for site in resnet20.sites))
    assert rounds(target, resnet20, 0.98, 1, "output") == [target]


def test_ranks_of_groups_stay_multiples_of_them() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=4), nn.Flatten(), nn.Linear(32, 4))
    found = survey(model, torch.zeros(1, 8, 3, 3))
    plans = rounds(Plan((Choice("0", 8), Choice("2", None, "left"))), found, 0.9, 1, "output")
    assert all(plan.ranks["0"] % 4 == 0 for plan in plans if plan.ranks) and plans[-1].ranks == {"0": 8}


def test_only_sites_whose_rank_changes_are_projected_again(resnet20: Survey) -> None:
    before = Plan((Choice("conv1", 8), Choice("layer1.0.conv1", 9)))
    after = Plan((Choice("conv1", 8), Choice("layer1.0.conv1", 7), Choice("linear", 3)))
    assert [site.name for site in shrunk_sites(after, before, resnet20)] == ["layer1.0.conv1", "linear"]
    assert [site.name for site in shrunk_sites(before, None, resnet20)] == ["conv1", "layer1.0.conv1"]


def test_a_pair_is_never_put_back_to_dense(resnet20: Survey) -> None:
    before = Plan((Choice("layer1.0.conv1", 5),))
    (choice,) = still_factored(Plan((Choice("layer1.0.conv1", None, "?"),)), before, resnet20, 1, "output").choices
    assert choice.rank == 14  # 15 · (144 + 16) > 16 · 144 > 14 · (144 + 16)
    (dense,) = still_factored(Plan((Choice("linear", None, "?"),)), before, resnet20, 1, "output").choices
    assert dense.rank is None
