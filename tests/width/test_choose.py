"""Channels chosen for a budget, on networks at hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_prune import compress, load_compressed
from dist_prune.config.compression import CompressionConfig, MethodConfig
from dist_prune.config.flags import ConfigError
from dist_prune.distributed.world import World
from dist_prune.network.channels import Consumer, Group
from dist_prune.network.sites import survey
from dist_prune.statistics.probes import kl
from dist_prune.width.allocation import WidthError
from dist_prune.width.choose import RIDGE, GroupLosses, measured, predictions, removable_groups
from dist_prune.width.elimination import Elimination, eliminate
from dist_prune.width.groups import find_groups
from dist_prune.width.moments import collect_channel_moments, term_of
from dist_prune.width.narrowing import narrowed
from tests.networks import NETWORKS, seeded
from tests.width.test_groups import Block

FAMILIES = {"gated": (Block, 16), **NETWORKS}
SLOW = list(NETWORKS)


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
    model = wasteful()
    found = compress(model, images(), "budget:macs=0.34", width="on", correct="none")
    assert found.model.first.out_channels == 8
    assert found.compressed.macs == survey(found.model, images()[0][:1]).macs <= 0.34 * found.dense.macs
    assert found.kl_projected < 1e-5
    assert "first 8/24" in " ".join(str(found).split())
    again = found.replan("budget:macs=0.6")
    assert not again.kept and again.kl_projected < 1e-6, "lower ranks are enough, and lose nothing"


def test_layers_may_be_called_by_keyword() -> None:
    class ByKeyword(Wasteful):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(input=self.first(input=x)).relu()
            return self.head(input=self.second(input=hidden).relu().mean((2, 3)))

    found = [compress(seeded(m), images(), "budget:macs=0.34", width="on") for m in (Wasteful, ByKeyword)]
    assert found[0].kept and found[0].compressed == found[1].compressed
    assert found[1].kl == pytest.approx(found[0].kl, rel=1e-3, abs=1e-9)


def test_parameters_can_be_the_budget() -> None:
    found = compress(wasteful(), images(), "budget:params=0.4", width="on", correct="none")
    assert found.kept and found.compressed.params <= 0.4 * found.dense.params
    assert found.compressed.params == sum(p.numel() for p in found.model.parameters())


def test_channels_alone() -> None:
    found = compress(wasteful(), images(), "budget:macs=0.5", width="on", forms="dense", correct="none")
    assert found.kept and not found.plan.factored
    assert 0.45 * found.dense.macs < found.compressed.macs <= 0.5 * found.dense.macs
    with pytest.raises(ConfigError, match="nothing is compressed"):
        compress(wasteful(), images(), "budget:macs=0.5", forms="dense", width="off")


def test_only_chosen_layers_lose_channels() -> None:
    model = wasteful()
    found = removable_groups(model, survey(model, images()[0][:1]).select("second,head").sites, images()[0][:2])
    assert [group.name for group in found.groups] == ["second"]
    assert {each.producers: each.reason for each in found.staying}[("first",)] == "first stays as it is"


def test_a_group_s_curve_is_scaled_by_what_held_out_images_say_of_it_alone(world: World) -> None:
    model, batch = wasteful(), images()[0]
    (group,) = (g for g in find_groups(model, batch).groups if g.name == "first")
    moments = collect_channel_moments(model, group.consumers, [batch], world)
    term = term_of(model.second, group.consumers[0], moments["second"], torch.eye(12, dtype=torch.float64)[None])
    predicted = eliminate([term], RIDGE)
    real = {6: 0.9, 12: 0.7, 18: 0.3}

    def holdout_kl(network: nn.Module) -> float:
        return real[network.first.out_channels]

    found = measured(model, GroupLosses(group, predicted), moments, holdout_kl)
    assert all(found.losses[width] == pytest.approx(loss, rel=1e-6) for width, loss in real.items())
    assert (found.losses[:-1] >= found.losses[1:]).all() and found.losses[-1] == 0
    assert 0.7 <= found.losses[9] <= 0.9 <= found.losses[3]


def test_between_measured_widths_a_smooth_curve_keeps_its_shape() -> None:
    curve = np.array([8.0, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625, 0])
    group = Group(8, ("a",), (), (Consumer("b"),))
    found = GroupLosses(group, Elimination(tuple(range(8)), curve), {2: 4.0, 6: 1.0})
    assert found.losses[[0, 2, 4, 6, 7, 8]] == pytest.approx([32, 8, 1, 0.125, 0.0625, 0])


def test_channels_that_too_few_images_can_tell_apart_are_not_free(world: World) -> None:
    """12 images, 48 channels in front of the classifier: nothing of their own rows is lost, much of others'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, 6)).eval()
    x = torch.randn(96, 3, 8, 8)
    found = compress(model, [x[:24]], "budget:params=0.9", width="on", correct="none")
    channels = found._collected.channels
    assert channels is not None
    (weighed,) = channels.groups
    kept = [weighed.kept(24)]
    network = narrowed(model, kept, predictions(kept, channels.moments))
    with torch.no_grad():
        real = float(kl(model(x[24:]).double(), network(x[24:]).double()).mean())
    assert weighed.losses[24] > 0.3 * real > 100 * weighed.elimination.losses[24]


@pytest.mark.parametrize("name", ["gated", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_the_budget_is_met_and_what_is_saved_or_exported_is_the_same(name: str, tmp_path: Path) -> None:
    make, size = FAMILIES[name]
    x = torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = seeded(make)
    found = compress(model, x.split(16), 0.5, width="on", calibrate_images=24)
    assert found.compressed.macs == survey(found.model, x[:1]).macs <= 0.5 * found.dense.macs
    found.save(tmp_path / "saved")
    again = load_compressed(tmp_path / "saved", seeded(make))
    with torch.no_grad():
        assert torch.equal(again(x[:4]), found.model(x[:4]))
        exported = torch.export.export(found.model, (x[:4],)).module()
        torch.testing.assert_close(exported(x[:4]), found.model(x[:4]))


def test_without_a_budget_of_macs_or_out_of_reach_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("width on with ranks uniform:0.5")):
        compress(wasteful(), images(), "uniform:0.5", width="on")
    with pytest.raises(ConfigError, match=re.escape("--width on with --method pca")):
        CompressionConfig(MethodConfig(method="pca"), "budget:macs=0.5", width="on")
    with pytest.raises(WidthError, match="the least is"):
        compress(wasteful(), images(), "budget:macs=0.001", width="on")
