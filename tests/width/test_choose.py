"""Channels chosen for a budget, on networks at hand."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from dist_prune import compress
from dist_prune.config.flags import ConfigError
from dist_prune.distributed.world import World
from dist_prune.network.sites import survey
from dist_prune.width.allocation import WidthError
from dist_prune.width.choose import RIDGE, SMALLEST, GroupLosses, measured
from dist_prune.width.elimination import eliminate
from dist_prune.width.groups import find_groups
from dist_prune.width.moments import collect_channel_moments, term_of
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


def test_channels_that_carry_nothing_of_their_own_go_without_loss() -> None:
    found = compress(wasteful(), images(), "budget:macs=0.34", width=1, correct="none")
    assert found.model.first.out_channels == 8
    assert found.compressed.macs <= 0.34 * found.dense.macs
    assert found.kl_projected < 1e-6
    assert found.compressed.macs == survey(found.model, images()[0][:1]).macs
    assert found.compressed.params == sum(p.numel() for p in found.model.parameters())
    assert "first 8/24" in " ".join(str(found).split())


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
def test_the_budget_is_met_and_correction_helps(name: str) -> None:
    make, size = NETWORKS[name]
    batches = list(torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(0)).split(16))
    found = compress(seeded(make), batches, "budget:macs=0.7", width=0.5)
    assert found.compressed.macs <= 0.7 * found.dense.macs
    assert found.compressed.macs == survey(found.model, batches[0][:1]).macs
    assert found.kl <= found.kl_projected


def test_without_a_budget_of_macs_or_out_of_reach_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("--width 1 with --ranks budget:params=0.5")):
        compress(wasteful(), images(), "budget:params=0.5", width=1)
    with pytest.raises(WidthError, match="the least is"):
        compress(wasteful(), images(), "budget:macs=0.001", width=1)
