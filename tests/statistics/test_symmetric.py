"""Sums of symmetric products: half of them is saved, and what is loaded has the same bits."""

import pytest
import torch
from torch import nn

from dist_prune.data.loader import Batch
from dist_prune.network.sites import View, survey
from dist_prune.statistics.curvature import STEPS, Objective, _Sum
from dist_prune.statistics.patches import PatchAccumulator
from dist_prune.statistics.symmetric import load_lower_panels_, lower_panels, mirror_, panels

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 5, 16, 17, 100, 512])
def test_panels_cover_the_matrix_once_and_come_back(width: int) -> None:
    assert [i for p in panels(width) for i in range(p.start, p.stop)] == [*range(width)]
    half = torch.randn(2, width, width, dtype=torch.float64)
    whole = half + half.mT
    state = lower_panels("sum", whole)
    found = torch.full_like(whole, torch.nan)
    load_lower_panels_(found, "sum", state)
    assert torch.equal(found, whole)
    assert width < 100 or sum(t.numel() for t in state.values()) < 0.54 * whole.numel()


def test_what_is_right_of_the_diagonal_is_never_read() -> None:
    half = torch.randn(1, 40, 40)
    whole = half + half.mT
    damaged = whole.clone()
    damaged[:, torch.ones(40, 40).triu(1).bool()] = torch.nan
    mirror_(damaged)
    assert torch.equal(damaged, whole)


@pytest.mark.parametrize("method", STEPS)
def test_curvature_is_summed_with_equal_bits_on_both_sides(method: str) -> None:
    """Of every kind of product, symmetric by itself or not; so no bit is lost with the half that is not saved."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 5))
    view = View(survey(model, torch.zeros(1, 3, 8, 8)).sites[0])
    x, objective = torch.randn(4, 3, 8, 8), Objective("kl")
    each, again = (_Sum(model[0], view, STEPS[method], None, CPU) for _ in range(2))
    model[0].register_forward_hook(each.forward, with_kwargs=True)
    each.begin(4)
    (loss,) = objective(model(x), Batch(x, torch.zeros(4).long(), torch.arange(4)))
    loss.backward()
    state, whole = each.state_dict(), each.total.matrix()
    assert whole.any() and torch.equal(whole, whole.mT)
    assert sum(t.numel() for t in state.values()) < 0.55 * whole.numel()
    again.load_state_dict(state)
    assert torch.equal(again.total.matrix(), whole)


def test_patches_resumed_between_two_batches_end_with_the_same_bits() -> None:
    """Here the products of channels are rounded differently on both sides; the saved one counts in both runs."""
    conv = nn.Conv2d(96, 8, 3, padding=1)
    site = survey(nn.Sequential(conv), torch.zeros(1, 96, 9, 9)).sites[0]
    whole, left, again = (PatchAccumulator(site, CPU) for _ in range(3))
    first, second = torch.randn(2, 3, 96, 9, 9)
    for accumulator in (whole, left):
        accumulator.add(conv, first)
    again.load_state_dict(left.state_dict())
    for accumulator in (whole, again):
        accumulator.add(conv, second)
    found, expected = vars(again.moments()), vars(whole.moments())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    saved = sum(t.numel() for name, t in left.state_dict().items() if name.startswith("channels/"))
    assert saved < 0.55 * left.channels.total.numel()
