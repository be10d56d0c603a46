"""Costs against networks that were really built, and widths within a budget against trying all of them."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from dist_prune.factorization.forms import FORMS
from dist_prune.network.channels import KeptChannels
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.sites import survey
from dist_prune.width.allocation import WidthError, allocate
from dist_prune.width.costs import DENSE, Forms, LayerCosts, WidthCosts, forms_of, width_costs
from dist_prune.width.groups import find_groups
from dist_prune.width.narrowing import narrowed
from tests.networks import NETWORKS, seeded


def macs(model: nn.Module, image: torch.Tensor) -> int:
    with MultiplyAdds() as counter, torch.no_grad():
        model(image)
    return counter.total


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "vit"])
def test_costs_are_those_of_the_network_that_is_built(name: str) -> None:
    make, size = NETWORKS[name]
    model, image = seeded(make), torch.randn(1, 3, size, size)
    groups = find_groups(model, image.expand(2, -1, -1, -1)).groups
    costs = width_costs(model, groups, image)
    assert costs.at(costs.full) == costs.total == macs(model, image)
    widths = [max(1, (g.width * (3 + place % 5)) // 8) for place, g in enumerate(groups)]
    built = narrowed(model, [KeptChannels(g, tuple(range(w))) for g, w in zip(groups, widths, strict=True)])
    assert costs.at(widths) == macs(built, image)
    params = width_costs(model, groups, image, "params")
    assert params.total == sum(p.numel() for p in model.parameters())
    assert params.at(widths) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("option", [("output", (3,)), ("input", (4,)), ("vertical", (5,)), ("tucker", (2, 3))])
def test_forms_cost_what_the_chain_costs_at_every_width(of: str, option: tuple[str, tuple[int, ...]]) -> None:
    """At widths between layers, against `Form`'s own count for the narrower layer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 6, 1), nn.Flatten())
    image = torch.randn(2, 3, 9, 9)
    sites = {site.name: site for site in survey(model, image[:1]).sites}
    groups = find_groups(model, image).groups
    forms = {"1": forms_of(sites["1"], [option], np.zeros(1), of)}
    costs = width_costs(model, groups, image[:1], of, forms)
    (layer,) = (each for each in costs.layers if each.forms is not None)
    form, (name, ranks) = FORMS[option[0]], option
    for widths in ((8, 12), (5, 12), (8, 7), (3, 4)):
        narrow = replace(sites["1"], inputs=widths[0] * 9, outputs=widths[1])
        expected = form.macs(narrow, ranks) if of == "macs" else form.params(narrow, ranks) + widths[1]
        assert layer.cost(widths, 0) == expected, name


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
    assert costs.at(found) <= budget * costs.total
    every = [w for w in product(*(range(1, n + 1) for n in costs.full)) if costs.at(w) <= budget * costs.total]
    assert loss(found) <= 1.1 * min(map(loss, every)) + 0.01


def test_what_forms_save_is_not_taken_from_widths() -> None:
    """Both in one budget: against all widths with the best forms that are left for each."""
    costs, losses = chain()
    free, lossy = (
        replace(costs, layers=tuple(replace(layer, forms=with_rank_one(layer, loss)) for layer in costs.layers))
        for loss in (0.0, 10.0)
    )
    assert allocate(free, losses, 0.7) == costs.full, "rank 1 everywhere loses nothing: no channel goes"
    assert allocate(lossy, losses, 0.7) == allocate(costs, losses, 0.7), "forms that lose much are not used"


def with_rank_one(layer: LayerCosts, loss: float) -> Forms:
    """One form, of rank 1, where it is cheaper."""
    one = np.full(1, layer.unit, np.int64)
    return Forms(np.full(1, loss), one, one, np.zeros(1, np.int64))


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.4])
def test_widths_and_forms_together_are_nearly_the_best(budget: float) -> None:
    costs, losses = chain()
    costs = replace(
        costs,
        layers=tuple(
            replace(layer, forms=with_rank_one(layer, loss))
            for layer, loss in zip(costs.layers, (0.1, 0.5, 0.2, 0.05), strict=True)
        ),
    )
    limit = budget * costs.total

    def best(widths: tuple[int, ...]) -> float:
        options = product((DENSE, 0), repeat=len(costs.layers))
        chosen = [
            sum(float(layer.forms.losses[0]) for layer, o in zip(costs.layers, each, strict=True) if o == 0)
            for each in options
            if costs.at(widths, each) <= limit
        ]
        return min(chosen, default=math.inf) + sum(float(loss[w]) for loss, w in zip(losses, widths, strict=True))

    every = [best(widths) for widths in product(*(range(1, n + 1) for n in costs.full))]
    assert best(allocate(costs, losses, budget)) <= 1.1 * min(every) + 0.05


def test_widths_are_multiples_or_full() -> None:
    costs, losses = chain()
    found = allocate(costs, losses, 0.7, round_to=4)
    assert all(w % 4 == 0 or w == full for w, full in zip(found, costs.full, strict=True))
    assert costs.at(found) <= 0.7 * costs.total


def test_a_budget_out_of_reach_names_the_least() -> None:
    costs, losses = chain()
    least = costs.at((1, 1, 1)) / costs.total
    with pytest.raises(WidthError, match=f"a budget of 0.01 is out of reach, the least is {least:.3f}"):
        allocate(costs, losses, 0.01)
