"""Channels chosen for a budget, on networks at hand."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.flags import ConfigError
from dist_prune.config.run import CompressionConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import survey
from dist_prune.statistics.probes import kl
from dist_prune.width.allocation import WidthError
from dist_prune.width.choose import RIDGE, SMALLEST, GroupLosses, WidthChoice, choose_widths, measured
from dist_prune.width.elimination import eliminate
from dist_prune.width.groups import find_groups
from dist_prune.width.listing import format_widths
from dist_prune.width.moments import collect_channel_moments, term_of
from dist_prune.width.narrowing import narrowed
from tests.networks import NETWORKS, seeded


class Wasteful(nn.Module):
    """Of 24 hidden channels, 8 matter: 8 are dead, and 8 double the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 12, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            self.first.weight[8:16] = 0
            self.first.weight[16:], self.first.bias[16:] = self.first.weight[:8], self.first.bias[:8]
            self.norm.running_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def images(count: int = 64) -> list[Tensor]:
    return list(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(16))


def wasteful() -> nn.Module:
    torch.manual_seed(0)
    return Wasteful().eval()


def divergence(dense: nn.Module, network: nn.Module, batches: list[Tensor]) -> float:
    """KL(dense ‖ network), nats per image."""
    with torch.no_grad():
        return float(torch.cat([kl(dense(x).double(), network(x).double()) for x in batches]).mean())


def narrow(model: nn.Module, batches: list[Tensor], budget: float, world: World) -> WidthChoice:
    """Solved from all batches but the last, which is the holdout."""
    own, held = batches[:-1], batches[-1:]

    def opened() -> Iterator[Batch]:
        for start, x in zip(range(0, 1000, len(own[0])), own, strict=False):
            numbers = torch.arange(start, start + len(x))
            yield Batch(x, torch.full_like(numbers, -1), numbers)

    return choose_widths(
        model, batches[0][:2], opened, lambda network: divergence(model, network, held), budget, 1, 0, world
    )


def test_channels_that_carry_nothing_of_their_own_go_without_loss(world: World) -> None:
    model = wasteful()
    found = narrow(model, images(), 0.34, world)
    assert found.network.first.out_channels == 8
    assert found.macs == survey(found.network, images()[0][:1]).macs <= 0.34 * survey(model, images()[0][:1]).macs
    assert divergence(model, found.network, images()) < 1e-6
    assert "first 8/24" in " ".join(format_widths(found.kept, 0.34, found.loss).split())


def test_a_group_s_curve_is_scaled_by_what_held_out_images_say_of_it_alone(world: World) -> None:
    model, batch = wasteful(), images()[0]
    (group,) = (g for g in find_groups(model, batch).groups if g.name == "first")
    moments = collect_channel_moments(model, group.consumers, [batch], world)
    term = term_of(model.second, group.consumers[0], moments["second"], torch.eye(12, dtype=torch.float64)[None])
    predicted = eliminate([term], RIDGE)
    seen = []

    def holdout_kl(network: nn.Module) -> float:
        seen.append(network.first.out_channels)
        return 0.3 if len(seen) == 1 else 0.7

    found = measured(model, GroupLosses(group, predicted), moments, holdout_kl)
    assert seen == [18, 12]
    ratios = 0.3 / max(predicted.losses[18], SMALLEST), 0.7 / max(predicted.losses[12], SMALLEST)
    assert found.scale == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert found.losses[4] == pytest.approx(found.scale * predicted.losses[4])


@pytest.mark.parametrize(
    "name", ["resnet20", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mobilenet_v2", "efficientnet_b0"))]
)
def test_the_budget_is_met_by_what_loses_little(name: str, world: World) -> None:
    """Less than what is left where every group loses the same share of its channels, the last ones."""
    make, size = NETWORKS[name]
    batches = list(torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(0)).split(16))
    model = seeded(make).eval()
    found = narrow(model, batches, 0.8, world)
    dense = survey(model, batches[0][:1])
    assert found.macs == survey(found.network, batches[0][:1]).macs <= 0.8 * dense.macs
    blind = narrowed(model, [replace(k, channels=tuple(range(len(k.channels)))) for k in found.kept])
    assert divergence(model, found.network, batches) < divergence(model, blind, batches)


def test_without_a_budget_of_macs_or_out_of_reach_it_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=re.escape("--width 1 with --ranks budget:params=0.5")):
        CompressionConfig(ranks="budget:params=0.5", width=1)
    with pytest.raises(WidthError, match="the least is"):
        narrow(wasteful(), images(), 0.001, world)
