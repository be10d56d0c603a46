"""Batch norm re-estimated: the statistics that hold in the end, on any number of ranks, kept where it helps."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.images import ImageSpec
from dist_prune.correction.batchnorm import Reestimation, format_summary, reestimate
from dist_prune.correction.calibration import HELD, Calibration
from dist_prune.data.loader import normalise
from dist_prune.distributed.world import World
from dist_prune.network.models import CifarResNet
from tests.networks import seeded
from tests.ranks import run_ranks

SPEC = ImageSpec(0, 8)
PLENTY = 1 << 30


def pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def calibration(rank: int = 0, size: int = 1, count: int = 40) -> Calibration:
    """Uneven shares in batches of five."""
    cuts = {1: [0, count], 2: [0, 27, count], 3: [0, 9, 20, count]}[size]
    mine = torch.arange(cuts[rank], cuts[rank + 1])
    return Calibration(pixels(count)[mine], mine, partial(normalise, spec=SPEC), 5)


class Deciding(CifarResNet):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() < 1e6 else -x)


def networks(kind: type[nn.Module] = CifarResNet) -> tuple[nn.Module, nn.Module]:
    """A network, and one with statistics far off."""
    dense = seeded(lambda: kind(20, 5))
    reestimate_as_reference(dense)
    shifted = copy.deepcopy(dense)
    with torch.no_grad():
        for norm in norms(shifted).values():
            norm.running_mean += 0.5 * norm.running_var.sqrt()
            norm.running_var *= 1.5
    return dense, shifted


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


@torch.no_grad()
def reaching(model: nn.Module) -> dict[str, Tensor]:
    """What reaches each batch norm in one forward pass over the images to solve from, (channels, rows)."""
    found: dict[str, Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(
            lambda _m, x, name=name: found.update({name: x[0].double().transpose(0, 1).flatten(1)})
        )
        for name, norm in norms(model).items()
    ]
    solving = torch.arange(40) % HELD != 0
    model(normalise(pixels(40)[solving], SPEC))
    for hook in hooks:
        hook.remove()
    return found


def reestimate_as_reference(model: nn.Module) -> None:
    """Layer after layer, a whole forward pass for each."""
    for name, norm in norms(model).items():
        rows = reaching(model)[name]
        norm.running_mean.copy_(rows.mean(1))
        norm.running_var.copy_(rows.var(1))


@pytest.mark.parametrize("kind", [CifarResNet, Deciding])
@pytest.mark.parametrize("memory", [0, PLENTY])
def test_in_the_end_every_layer_has_the_statistics_of_what_reaches_it(
    kind: type[nn.Module], memory: int, world: World
) -> None:
    dense, shifted = networks(kind)
    result = reestimate(dense, shifted, calibration(), memory, world)
    assert result.kept and result.layers == len(norms(dense)) == 19
    for name, rows in reaching(shifted).items():
        norm = norms(shifted)[name]
        torch.testing.assert_close(norm.running_mean.double(), rows.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), rows.var(1), rtol=1e-4, atol=1e-6)
    for name, tensor in dense.state_dict().items():  # which had them before it was shifted
        torch.testing.assert_close(shifted.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_does_not_help_is_not_kept(world: World) -> None:
    dense = seeded(lambda: CifarResNet(20, 5))
    other = copy.deepcopy(dense)
    result = reestimate(dense, other, calibration(), PLENTY, world)
    assert result.before == 0 < result.after and not result.kept
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert format_summary(result).endswith("rejected: the statistics stay as they were")


def share(world: World) -> tuple[Reestimation, dict[str, Tensor]]:
    dense, shifted = networks()
    return reestimate(dense, shifted, calibration(world.rank, world.size), PLENTY, world), shifted.state_dict()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_uneven_ranks_gives_the_same(size: int, world: World) -> None:
    alone, expected = share(world)
    results = run_ranks(share, size)
    for result, state in results:
        assert (result.layers, result.kept) == (alone.layers, alone.kept)
        assert (result.before, result.after) == pytest.approx((alone.before, alone.after), rel=1e-4, abs=1e-7)
        for name, tensor in expected.items():
            assert torch.equal(state[name], results[0][1][name])
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_network_without_batch_norm_stays_as_it_is(world: World) -> None:
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    result = reestimate(dense, copy.deepcopy(dense), calibration(), PLENTY, world)
    assert (result.layers, result.kept) == (0, False)
