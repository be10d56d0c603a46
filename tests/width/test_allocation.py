"""Costs against networks that were really built, and widths within a budget against trying all of them."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_prune.width.allocation import WidthError, allocate
from dist_prune.width.costs import WidthCosts, width_costs
from dist_prune.width.groups import find_groups
from dist_prune.width.narrowing import KeptChannels, narrowed
from tests.networks import NETWORKS, seeded


def macs(model: nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "vit"])
def test_costs_are_those_of_the_network_that_is_built(name: str) -> None:
    make, size = NETWORKS[name]
    model, image = seeded(make), torch.randn(1, 3, size, size)
    groups = find_groups(model, image.expand(2, -1, -1, -1)).groups
    costs = width_costs(model, groups, image)
    assert costs.macs(costs.full) == costs.total == macs(model, image)
    widths = [max(1, (g.width * (3 + place % 5)) // 8) for place, g in enumerate(groups)]
    built = narrowed(model, [KeptChannels(g, tuple(range(w))) for g, w in zip(groups, widths, strict=True)])
    assert costs.macs(widths) == macs(built, image)


def chain() -> tuple[WidthCosts, list[np.ndarray]]:
    """Three groups in a chain, so that costs are products, with convex losses that differ."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    image = torch.randn(1, 5)
    costs = width_costs(model, find_groups(model, image.expand(2, -1)).groups, image)
    scales = (1.0, 0.2, 3.0)
    return costs, [s * (1 - np.arange(n + 1) / n) ** 2 for s, n in zip(scales, costs.full, strict=True)]


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5, 0.3])
def test_widths_are_nearly_the_best_within_the_budget(budget: float) -> None:
    costs, losses = chain()

    def loss(widths: tuple[int, ...]) -> float:
        return float(sum(each[w] for each, w in zip(losses, widths, strict=True)))

    found = allocate(costs, losses, budget)
    assert costs.macs(found) <= budget * costs.total
    every = [w for w in product(*(range(1, n + 1) for n in costs.full)) if costs.macs(w) <= budget * costs.total]
    assert loss(found) <= 1.1 * min(map(loss, every)) + 0.01


def test_widths_are_multiples_or_full() -> None:
    costs, losses = chain()
    found = allocate(costs, losses, 0.7, round_to=4)
    assert all(w % 4 == 0 or w == full for w, full in zip(found, costs.full, strict=True))
    assert costs.macs(found) <= 0.7 * costs.total


def test_a_budget_out_of_reach_names_the_least() -> None:
    costs, losses = chain()
    least = costs.macs((1, 1, 1)) / costs.total
    with pytest.raises(WidthError, match=f"0.01 of the multiply-adds is out of reach.*the least is {least:.3f}"):
        allocate(costs, losses, 0.01)
