"""Methods of others that are put together here do what their papers say."""

import pytest
import torch
from torch import nn

from dist_prune.distributed.world import World
from dist_prune.factorization.forms import FORMS
from dist_prune.network.models import build
from dist_prune.network.sites import survey
from tests.bench.ground import macs_of
from tests.bench.peers import (
    PAIR,
    groups_of,
    surviving,
    tucker_of,
    with_forms,
    with_tucker,
    within,
    without_channels,
)


def conv(**more: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, 3, **more)


@pytest.mark.parametrize("more", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_tucker_of_all_channels_is_the_convolution_itself(more: dict[str, int]) -> None:
    layer, x = conv(**more), torch.randn(2, 8, 11, 11)
    torch.testing.assert_close(tucker_of(layer, 1.0)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_tucker_is_as_near_as_projections_on_leading_singular_vectors_or_nearer() -> None:
    """Higher-order orthogonal iteration begins there (De Lathauwer et al. 2000)."""
    layer, half = conv(), 0.5
    first, middle, last = (part.weight.detach().double() for part in tucker_of(layer, half))
    assert (middle.shape, first.shape[0], last.shape[1]) == ((6, 4, 3, 3), 4, 6)
    found = torch.einsum("or,rqhw,qi->oihw", last[:, :, 0, 0], middle, first[:, :, 0, 0])
    weight = layer.weight.detach().double()
    outputs, inputs = (torch.linalg.svd(weight.movedim(axis, 0).flatten(1))[0] for axis in (0, 1))
    p, q = outputs[:, :6] @ outputs[:, :6].mT, inputs[:, :4] @ inputs[:, :4].mT
    projected = torch.einsum("oO,OIhw,Ii->oihw", p, weight, q)
    assert (found - weight).norm() <= (projected - weight).norm() * (1 + 1e-6)
    assert (found - weight).norm() > 0.05 * weight.norm()


def kernel_of(layer: nn.Module) -> torch.Tensor:
    """Of a chain of 3×3 convolutions without bias: what it answers to each number of a patch, (8·9, outputs)."""
    return layer(torch.eye(8 * 9, dtype=torch.float64).view(-1, 8, 3, 3)).flatten(1)


def test_forms_by_weight_err_least_in_sum_and_are_plain_svds_where_one_form_is_allowed(world: World) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Conv2d(8, 8, 3, bias=False) for _ in range(4)), nn.Flatten()).double()
    with torch.no_grad():  # two that are nearly chains of columns and rows already
        for layer, places in ((dense[2], "oqh,qcw->ochw"), (dense[3], "oqw,qch->ochw")):
            layer.weight.mul_(0.1).add_(torch.einsum(places, torch.randn(8, 4, 3), torch.randn(4, 8, 3)))
    pair, share = torch.zeros(2, 8, 10, 10, dtype=torch.float64), 0.35

    @torch.no_grad()
    def errors(*forms: str) -> list[float]:
        made = with_forms(dense, pair, share, forms, world)
        assert survey(made, pair[:1]).macs <= share * survey(dense, pair[:1]).macs
        found = []
        for before, after in zip(map(kernel_of, dense[:4]), map(kernel_of, made[:4]), strict=True):
            found.append(float((before - after).square().sum()))
            if forms == ("output",):
                rank = int(torch.linalg.matrix_rank(after, rtol=1e-8))
                assert found[-1] == pytest.approx(float(torch.linalg.svdvals(before)[rank:].square().sum()))
        return found

    every = [sum(errors(name)) for name in ("output", "input", "vertical", "horizontal")]
    assert sum(errors(*FORMS)) < 0.9 * min(every)


@pytest.mark.parametrize("share", [0.584, 0.2])
def test_as_much_is_kept_as_the_budget_allows(share: float) -> None:
    dense = build("resnet20", 10)
    made: dict[float, nn.Module] = {}

    def at(kept: float) -> nn.Module:
        return made.setdefault(kept, with_tucker(dense, kept))

    found = within(dense, PAIR, share, at)
    assert 0.95 * share < macs_of(found) / macs_of(dense) <= share
    assert all(
        macs_of(other) <= macs_of(found) or macs_of(other) > share * macs_of(dense) for other in made.values()
    )


def test_channels_that_survive_pruning_are_known_by_their_numbers() -> None:
    """Filters that are left are what they were; of a layer whose inputs are gone, too, without these."""
    dense = build("resnet20", 10)
    groups, fewer = groups_of(dense, PAIR), 0
    pruned = without_channels(dense, PAIR, groups, "magnitude", 0.4)
    for group in groups:
        left = surviving(dense, pruned, group)
        before, after = (net.get_submodule(group.producers[0]).get_parameter("weight") for net in (dense, pruned))
        assert torch.equal(before[list(left)], after) and len(set(left)) == len(left)
        fewer += group.width - len(left)
    assert fewer > 50
