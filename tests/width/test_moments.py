"""What is measured at consumers, against a plain computation, and over any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.channels import Consumer
from dist_prune.width.elimination import eliminate
from dist_prune.width.moments import ChannelMoments, channel_weights, collect_channel_moments, term_of
from tests.networks import seeded
from tests.ranks import run_ranks

CONSUMERS = (Consumer("2"), Consumer("6", 9))


def network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), nn.ReLU(),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(45, 4),
        )
    )  # fmt: skip


def images() -> Tensor:
    return torch.randn(14, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def collected(world: World, shares: list[list[int]]) -> dict[str, ChannelMoments]:
    own = shares[world.rank]
    return collect_channel_moments(network(), CONSUMERS, (images()[i : i + 1] for i in own), world)


@pytest.mark.parametrize(
    "shares", [[list(range(14))], [list(range(9)), list(range(9, 14))], [[3], [], [*range(3), *range(4, 14)]]]
)
def test_moments_are_those_of_all_images_on_any_number_of_ranks(shares: list[list[int]]) -> None:
    model, x = network().double(), images().double()
    with torch.no_grad():
        z = model[:2](x)
        flat = model[:6](x)
    expected = {"2": z.transpose(0, 1).flatten(1), "6": flat.view(14, 5, 9).transpose(0, 1).flatten(1)}
    for found in run_ranks(collected, len(shares), shares):
        for name, rows in expected.items():
            moments = found[name].channels
            torch.testing.assert_close(moments.mean[0], rows.mean(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(moments.covariance[0], torch.cov(rows, correction=0), rtol=1e-5, atol=1e-6)


def one_and_many(world: World) -> float:
    alone = [*range(14)] if world.is_first else []
    spread = [*range(14)][world.rank :: world.size]
    first, second = (
        collect_channel_moments(network().double(), CONSUMERS, (images().double()[i : i + 1] for i in own), world)
        for own in (alone, spread)
    )
    pairs = [
        (a, b)
        for name in first
        for a, b in (
            (first[name].channels.covariance, second[name].channels.covariance),
            (first[name].places, second[name].places),
        )
    ]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_add_over_ranks(size: int) -> None:
    assert max(run_ranks(one_and_many, size)) < 1e-9


def test_places_are_the_kernels_correlations() -> None:
    """The covariance of a patch, zero padding and all, summed over channels and scaled."""
    found = run_ranks(collected, 1, [list(range(14))])[0]["2"]
    with torch.no_grad():
        z = network().double()[:2](images().double())
    patches = F.unfold(z, 3, 1, 1, 2).transpose(0, 1).flatten(1)  # (6·9, rows)
    blocks = torch.cov(patches, correction=0).view(6, 9, 6, 9)
    expected = sum(blocks[c, :, c] for c in range(6))
    torch.testing.assert_close(found.places, expected / expected.diagonal().mean(), rtol=1e-5, atol=1e-6)


def test_predicted_loss_of_a_1x1_consumer_is_its_exact_error_in_the_metric() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    layer = nn.Conv2d(6, 3, 1).double()
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    metric = (root @ root.T)[None]
    world_moments = run_ranks(_moments_of, 1, z)[0]
    found = eliminate([term_of(layer, Consumer("0"), world_moments, metric)], ridge=0)
    kept = list(found.kept(2))
    inputs = torch.cat([z[:, kept], torch.ones(400, 1, dtype=torch.float64)], 1)
    outputs = z @ channel_weights(layer, Consumer("0"))[..., 0].T
    error = outputs - inputs @ torch.linalg.lstsq(inputs, outputs).solution
    exact = 0.5 * torch.trace(metric[0] @ (error.T @ error) / 400)
    torch.testing.assert_close(found.losses[2], exact.item(), rtol=1e-9, atol=0)


def _moments_of(world: World, z: Tensor) -> ChannelMoments:
    model = nn.Sequential(nn.Conv2d(6, 3, 1).double())
    return collect_channel_moments(model, [Consumer("0")], [z[..., None, None]], world)["0"]
