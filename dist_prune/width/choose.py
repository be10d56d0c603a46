"""Which channels of a network go, for a budget: eliminated group by group, weighed by what each really costs.

The Fisher metric predicts the shape of a group's losses well and their size badly, by a factor that differs
from group to group (2 to 160 on EfficientNet-Lite0). So each group is also narrowed by itself, to three
quarters and to a half, and its curve is scaled by what the images held out say: the mean of the two ratios, of
their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.knapsack import Floats
from dist_prune.network.sites import View, describe, evaluating
from dist_prune.statistics.curvature import STEPS, NoGradientError, Objective, collect_curvature
from dist_prune.width.allocation import allocate
from dist_prune.width.costs import WidthCosts, width_costs
from dist_prune.width.elimination import Elimination, Prediction, eliminate, predict
from dist_prune.width.groups import Consumer, Group, find_groups
from dist_prune.width.moments import ChannelMoments, collect_channel_moments, term_of
from dist_prune.width.narrowing import KeptChannels, narrowed

TRIED = (0.75, 0.5)  # shares of each group's channels, at which it is measured
SMALLEST = 1e-9  # nats: a smaller loss is none
RIDGE = 1e-3  # of the channels' mean variance


@dataclass(frozen=True)
class GroupLosses:
    """One group: in which order its channels go, and its measured size over its predicted one."""

    group: Group
    elimination: Elimination
    scale: float = 1.0

    @property
    def losses(self) -> Floats:
        """At each width, (c + 1,), nats per image."""
        scaled: Floats = self.elimination.losses * self.scale
        return scaled

    def kept(self, width: int) -> KeptChannels:
        """The channels that stay at a width."""
        return KeptChannels(self.group, self.elimination.kept(width))


@dataclass(frozen=True)
class WidthChoice:
    """The groups that become narrower, what that is predicted to lose, and the network without them."""

    kept: tuple[KeptChannels, ...]
    loss: float
    macs: int
    network: nn.Module


def choose_widths(
    model: nn.Module,
    images: Tensor,
    batches: Callable[[], Iterable[Batch]],
    holdout_kl: Callable[[nn.Module], float],
    budget: float,
    round_to: int,
    seed: int,
    world: World,
) -> WidthChoice:
    """Take channels out of the network until it fits the budget; the given network stays as it is.

    Args:
        model: the dense network, on the world's device, in evaluation mode.
        images: (2, …), any that it takes.
        batches: opens this rank's images to solve from, labels unused.
        holdout_kl: KL of a network to the dense one on images held out, nats per image, over all ranks.
        budget: a fraction of the dense network's multiply-adds.
        round_to: widths are multiples of this, or full.
        seed: of labels drawn.
        world: the ranks, which all end with the same network.

    Raises:
        WidthError: out of reach.
        StatisticsError: NaN or infinity, or no images.
    """
    groups, costs = require_reachable_widths(model, images, budget, round_to)
    consumers = [consumer for group in groups for consumer in group.consumers]
    moments = collect_channel_moments(model, consumers, (b.images for b in batches()), world)
    metrics = _metrics(model, consumers, batches, seed, world)
    found = [_eliminated(model, group, moments, metrics, world) for group in groups]
    scaled = [measured(model, each, moments, holdout_kl) for each in found]
    widths = world.from_first(lambda: allocate(costs, [each.losses for each in scaled], budget, round_to))
    kept = tuple(each.kept(w) for each, w in zip(scaled, widths, strict=True) if w < each.group.width)
    network = narrowed(model, kept, predictions(kept, moments))
    world.broadcast_(*network.state_dict().values())
    loss = math.fsum(float(each.losses[w]) for each, w in zip(scaled, widths, strict=True))
    return WidthChoice(kept, loss, costs.macs(widths), network)


def require_reachable_widths(
    model: nn.Module, images: Tensor, budget: float, round_to: int
) -> tuple[list[Group], WidthCosts]:
    """The groups that can become narrower, and what each width costs; arguments as in `choose_widths`.

    Raises:
        WidthError: not even the smallest widths meet the budget.
    """
    groups = that_run(model, find_groups(model, images).groups, images)
    costs = width_costs(model, groups, images[:1])
    allocate(costs, [_none(g) for g in groups], budget, round_to)
    return groups, costs


def that_run(model: nn.Module, groups: Sequence[Group], images: Tensor) -> list[Group]:
    """The groups without which the network still runs: some code has a number of channels written into it."""
    return [group for group in groups if _runs(model, group, images)]


def _runs(model: nn.Module, group: Group, images: Tensor) -> bool:
    half = KeptChannels(group, tuple(range(max(1, group.width // 2))))
    try:
        with evaluating(model):
            narrowed(model, [half], shared=True)(images)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return True


def _none(group: Group) -> Floats:
    losses: Floats = torch.zeros(group.width + 1, dtype=torch.float64).numpy()
    return losses


def _metrics(
    model: nn.Module,
    consumers: Sequence[Consumer],
    batches: Callable[[], Iterable[Batch]],
    seed: int,
    world: World,
) -> Mapping[str, Tensor]:
    """Of the consumers' outputs; where no gradient reaches one, all its outputs count alike."""
    views = [View(describe(c.name, model.get_submodule(c.name), 1)) for c in consumers]
    try:
        return collect_curvature(model, views, batches(), world, STEPS["fisher"], Objective("kl", 1, seed))
    except NoGradientError:
        return {v.site.name: torch.eye(v.width, dtype=torch.float64, device=world.device)[None] for v in views}


def _eliminated(
    model: nn.Module,
    group: Group,
    moments: Mapping[str, ChannelMoments],
    metrics: Mapping[str, Tensor],
    world: World,
) -> GroupLosses:
    def solve() -> Elimination:
        terms = [
            term_of(model.get_submodule(c.name), c, moments[c.name], metrics[c.name]) for c in group.consumers
        ]
        return eliminate(terms, RIDGE)

    return GroupLosses(group, world.from_first(solve))


def measured(
    model: nn.Module,
    each: GroupLosses,
    moments: Mapping[str, ChannelMoments],
    holdout_kl: Callable[[nn.Module], float],
) -> GroupLosses:
    """Scaled by what the images held out say of the group alone."""
    ratios = []
    for share in TRIED:
        width = max(1, round(share * each.group.width))
        kept = [each.kept(width)]
        real = holdout_kl(narrowed(model, kept, predictions(kept, moments), shared=True))
        expected = float(each.elimination.losses[width])
        ratios.append(math.log(max(real, SMALLEST) / max(expected, SMALLEST)))
    return replace(each, scale=math.exp(math.fsum(ratios) / len(ratios)))


def predictions(kept: Iterable[KeptChannels], moments: Mapping[str, ChannelMoments]) -> dict[str, Prediction]:
    """Of all consumers of these groups."""
    found = {}
    for each in kept:
        for consumer in each.group.consumers:
            own = moments[consumer.name].channels
            found[consumer.name] = predict(own.mean[0], own.covariance[0], each.channels, RIDGE)
    return found
