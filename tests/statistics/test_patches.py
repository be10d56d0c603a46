"""Block traces of the covariance of patches, against the covariance itself."""

import pytest
import torch
from torch import nn

from dist_prune.distributed.world import World
from dist_prune.network.sites import describe, evaluating, input_rows
from dist_prune.statistics.patches import PatchAccumulator, PatchMoments, accumulating_patches, sum_patches
from tests.ranks import run_ranks

LAYERS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "rows and columns differ": {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
    "strides that leave rows out": {"kernel_size": 2, "stride": 3},
    "side by side": {"kernel_size": 3, "stride": 3, "padding": 1, "groups": 2},
    "apart in one axis": {"kernel_size": (2, 3), "stride": (2, 1)},
    "apart, dilated": {"kernel_size": (2, 3), "dilation": (2, 1), "stride": (3, 4), "groups": 2},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 4, "stride": 2},
    "one axis": {"kernel_size": (1, 7), "padding": (0, 3)},
}


def images(count: int = 9) -> torch.Tensor:
    return 3 + torch.randn(count, 4, 11, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block_traces(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean patch, C_c and C_s, from the covariance of all patches."""
    site = describe("conv", conv)
    places = site.kernel[0] * site.kernel[1]
    rows = input_rows(site, conv, x).flatten(1).unflatten(0, (site.groups, -1))
    whole = torch.stack([torch.cov(group, correction=0) for group in rows])
    blocks = whole.reshape(site.groups, -1, places, site.inputs // places, places)
    return (
        rows.mean(-1),
        torch.einsum("gasbs->gab", blocks) / places,
        torch.einsum("gasat->gst", blocks),
    )


def require_equal(found: PatchMoments, conv: nn.Conv2d, x: torch.Tensor) -> None:
    mean, channels, places = block_traces(conv, x)
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.channels, channels, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.places, places, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_block_traces_are_those_of_the_covariance_of_patches(kind: str) -> None:
    conv = nn.Conv2d(4, 8, **LAYERS[kind], dtype=torch.float64)
    accumulator, x = PatchAccumulator(describe("conv", conv), torch.device("cpu")), images()
    for batch in (x[:2], x[:0], x[2:]):
        accumulator.add(conv, batch)
    require_equal(accumulator.moments(), conv, x)
    resumed = PatchAccumulator(describe("conv", conv), torch.device("cpu"))
    resumed.load_state_dict(accumulator.state_dict())
    require_equal(resumed.moments(), conv, x)


def test_float32_far_from_zero_keeps_its_digits() -> None:
    conv, x = nn.Conv2d(4, 8, 3), 1000 + images().float()
    accumulator = PatchAccumulator(describe("conv", conv), torch.device("cpu"))
    accumulator.add(conv, x)
    _, channels, places = block_traces(conv.double(), x.double())
    torch.testing.assert_close(accumulator.moments().channels, channels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(accumulator.moments().places, places, rtol=1e-4, atol=1e-3)


def network() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, groups=2)
    return nn.Sequential(*convolutions, nn.Conv2d(4, 4, 1)).double().eval()


def collect_share(world: World) -> dict[str, PatchMoments]:
    """An uneven share: the last rank of three has no images."""
    model, x = network(), images()
    cuts = {1: [0, 9], 2: [0, 7, 9], 3: [0, 7, 9, 9]}[world.size]
    sites = [describe(name, model.get_submodule(name)) for name in ("0", "2", "3")]
    with accumulating_patches(model, sites, world.device) as accumulators, evaluating(model):
        for batch in x[cuts[world.rank] : cuts[world.rank + 1]].split(3):
            model(batch) if len(batch) else None
    return sum_patches({name: a.moments() for name, a in accumulators.items()}, world)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_uneven_ranks_gives_the_same(size: int) -> None:
    model, x = network(), images()
    for found in run_ranks(collect_share, size):
        assert list(found) == ["0", "2"]  # a 1×1 kernel has one place only
        require_equal(found["0"], model[0], x)
        require_equal(found["2"], model[2], model[:2](x).detach())
