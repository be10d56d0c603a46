"""Which channels of a network go, for a budget: eliminated group by group, weighed by what each really costs.

The Fisher metric predicts the shape of a group's losses well and their size badly, by a factor that differs
from group to group (2 to 160 on EfficientNet-Lite0), and that grows as channels go. So each group is also narrowed
by itself, to three quarters, a half and a quarter, and its curve is scaled by what the images held out say, in
between by what the logarithms of the ratios interpolate to. That is the loss itself, of images not solved from: a
layer with more channels than there were images is not free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.budget import options_of, repair_counts
from dist_prune.factorization.knapsack import Floats, Ints
from dist_prune.factorization.planner import Planner
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.channels import Group, KeptChannels
from dist_prune.network.sites import Site, View, describe, evaluating
from dist_prune.statistics.curvature import STEPS, NoGradientError, Objective, collect_curvature
from dist_prune.width.allocation import allocate
from dist_prune.width.costs import WidthCosts, forms_of, width_costs
from dist_prune.width.elimination import Elimination, Prediction, eliminate, predict
from dist_prune.width.groups import Groups, Staying, find_groups
from dist_prune.width.heads import elimination_of, turned
from dist_prune.width.moments import ChannelMoments, collect_channel_moments, term_of
from dist_prune.width.narrowing import narrowed

TRIED = (0.25, 0.5, 0.75)  # shares of each group's channels, at which it is measured
SMALLEST, LARGEST = 1e-9, 1e3  # nats: a smaller loss is none, a larger one all
RIDGE = 1e-3  # of the channels' mean variance
MOST_RANKS = 96  # of a form that are looked at while widths are chosen


@dataclass(frozen=True)
class GroupLosses:
    """One group: in which order its channels go, and, at some widths, its measured loss over its predicted one."""

    group: Group
    elimination: Elimination
    ratios: Mapping[int, float] = field(default_factory=dict)

    @property
    def losses(self) -> Floats:
        """At each width, (c + 1,), nats per image; never rising with the width, and as measured where it was."""
        predicted = self.elimination.losses
        if not self.ratios:
            return predicted
        places, known = np.arange(len(predicted)), np.array(sorted(self.ratios))
        floored = predicted.clip(min=SMALLEST)
        ratios = np.array([self.ratios[width] for width in known])
        real = np.maximum.accumulate((floored[known] * ratios)[::-1])[::-1]
        scaled = floored * np.exp(np.interp(places, known, np.log(ratios)))
        most = np.append(np.inf, real)[np.searchsorted(known, places, "right")]  # between two that were measured
        least = np.append(real, 0.0)[np.searchsorted(known, places)]
        scaled = np.append(scaled.clip(least, most)[:-1], 0.0)
        return np.maximum.accumulate(scaled[::-1])[::-1]

    def kept(self, width: int) -> KeptChannels:
        """The channels that stay at a width."""
        return KeptChannels(self.group, self.elimination.kept(width), float(self.losses[width]))


@dataclass(frozen=True)
class Channels:
    """The channels that can be removed and what that loses: all that does not depend on a budget.

    `model` is the dense network they are removed from, with the heads of attention turned, see `heads`.
    """

    groups: tuple[GroupLosses, ...]
    moments: Mapping[str, ChannelMoments]
    model: nn.Module


def removable_groups(model: nn.Module, sites: Iterable[Site], images: Tensor) -> Groups:
    """The groups between chosen layers without which the network still runs; all others stay.

    Some code has a number of channels written into it.

    Args:
        model: the dense network.
        sites: the layers that may change.
        images: (2, …), any that it takes.
    """
    chosen = {site.name for site in sites}
    found, groups, staying = find_groups(model, images), [], list[Staying]()
    for group in found.groups:
        fixed = {*group.producers, *(c.name for c in group.solved)} - chosen
        if fixed:
            staying.append(Staying(group.producers, f"{min(fixed)} stays as it is", group.part))
        elif not _runs(model, group, images):
            reason = "the network does not run without some of them"
            staying.append(Staying(group.producers, reason, group.part))
        else:
            groups.append(group)
    return Groups(tuple(groups), (*found.staying, *staying), found.unknown)


def weigh_channels(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Batch]],
    holdout_kl: Callable[[nn.Module], float],
    metrics: Mapping[str, Tensor],
    objective: Objective,
    world: World,
) -> Channels:
    """In which order channels go, and what is lost at every width.

    Args:
        model: the dense network, on the world's device, in evaluation mode.
        groups: of it.
        batches: opens this rank's images to solve from, labels unused.
        holdout_kl: KL of a network to the dense one on images held out, nats per image, over all ranks.
        metrics: Fisher metrics of layers' outputs, (1, c, c), as far as they are known.
        objective: whose gradients give the others.
        world: the ranks, which all get the same.

    Raises:
        StatisticsError: NaN or infinity, or no images.
    """
    known = {**metrics, **output_metrics(model, groups, batches, objective, world, metrics)}
    network, moments = turned_with_moments(model, groups, batches, known, world)
    found = [_eliminated(network, group, moments, known, world) for group in groups]
    return Channels(tuple(measured(network, each, moments, holdout_kl) for each in found), moments, network)


def turned_with_moments(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Batch]],
    metrics: Mapping[str, Tensor],
    world: World,
) -> tuple[nn.Module, dict[str, ChannelMoments]]:
    """The network with the heads of these groups turned, and the moments of what their consumers take.

    Args:
        model: the dense network.
        groups: of it.
        batches: opens this rank's images.
        metrics: of outputs, see `output_metrics`.
        world: the ranks.
    """
    consumers = [consumer for group in groups for consumer in group.consumers]
    moments = collect_channel_moments(model, consumers, (b.images for b in batches()), world)
    return turned(model, groups, moments, metrics, world)


def choose_widths(
    channels: Channels, costs: WidthCosts, budget: float, round_to: int, world: World
) -> tuple[KeptChannels, ...]:
    """What stays of the groups that become narrower for a budget, equal on all ranks.

    Args:
        channels: of the dense network, which is on the world's device.
        costs: of it, at every width of these groups.
        budget: a fraction of the dense network's cost.
        round_to: widths are multiples of this, or full.
        world: the ranks.

    Raises:
        WidthError: out of reach.
    """
    groups = channels.groups
    widths = world.from_first(lambda: allocate(costs, [each.losses for each in groups], budget, round_to))
    return tuple(each.kept(w) for each, w in zip(groups, widths, strict=True) if w < each.group.width)


def without(channels: Channels, kept: Sequence[KeptChannels], world: World) -> nn.Module:
    """The network with these alone left of its groups, equal on all ranks; layers that took the others make up."""
    network = narrowed(channels.model, kept, predictions(kept, channels.moments))
    world.broadcast_(*network.state_dict().values())
    return network


def costs_within(
    model: nn.Module, groups: Sequence[Group], plans: Planner, spectra: Spectra | None, image: Tensor
) -> WidthCosts:
    """What widths cost under a budget, where layers are in the forms that go with it.

    Args:
        model: the dense network.
        groups: of it.
        plans: the budget and its forms.
        spectra: losses of the forms; None: nothing loses anything.
        image: (1, …), any that it takes.
    """
    sites, forms = plans.survey.sites, {}
    for site, count in zip(sites, repair_counts(len(sites), plans.repair), strict=True):
        options = [
            (name, ranks)
            for name, columns in options_of(View(site, plans.side), plans.round_to, plans.forms).items()
            for ranks in zip(*(_few(column).tolist() for column in columns), strict=True)
        ]
        losses = spectra.of_options(site, options) if spectra is not None else np.zeros(len(options))
        known = np.isfinite(losses)
        named = [option for option, is_known in zip(options, known, strict=True) if is_known]
        if named:
            forms[site.name] = forms_of(site, named, count * losses[known], plans.rule.of)
    return width_costs(model, groups, image, plans.rule.of, forms)


def _few(column: Ints) -> Ints:
    """Of many ranks, some at equal steps."""
    return column[:: -(-len(column) // MOST_RANKS)] if len(column) > MOST_RANKS else column


def require_reachable_widths(model: nn.Module, groups: Sequence[Group], plans: Planner, image: Tensor) -> None:
    """Refuse a budget before any work is done for it; arguments as `costs_within`.

    Raises:
        WidthError: not even the smallest widths and ranks meet it.
    """
    costs = costs_within(model, groups, plans, None, image)
    allocate(costs, [np.zeros(group.width + 1) for group in groups], plans.rule.amount, plans.round_to)


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


def output_metrics(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Batch]],
    objective: Objective,
    world: World,
    known: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Of the outputs of consumers that are not known; where no gradient reaches one, all its outputs count alike.

    Args:
        model: the dense network.
        groups: of it.
        batches: opens this rank's images.
        objective: whose gradients count.
        world: the ranks.
        known: of other layers.
    """
    consumers = [c for group in groups for c in group.solved if c.name not in known]
    if not consumers:
        return {}
    views = [View(describe(c.name, model.get_submodule(c.name), 1)) for c in consumers]
    try:
        return collect_curvature(model, views, batches(), world, STEPS["fisher"], objective)
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
        if group.part:
            return elimination_of(model, group, moments, metrics)
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
    ratios = {}
    for share in TRIED:
        width = max(1, round(share * each.group.width))
        kept = [each.kept(width)]
        real = holdout_kl(narrowed(model, kept, predictions(kept, moments), shared=True))
        real = min(max(real, SMALLEST), LARGEST) if math.isfinite(real) else LARGEST
        ratios[width] = real / max(float(each.elimination.losses[width]), SMALLEST)
    return replace(each, ratios=ratios)


def predictions(kept: Iterable[KeptChannels], moments: Mapping[str, ChannelMoments]) -> dict[str, Prediction]:
    """Of all consumers of these groups."""
    found = {}
    for each in kept:
        for consumer in each.group.solved:
            own, left = moments[consumer.name].channels, consumer.channels(each.group.width, each.channels)
            found[consumer.name] = predict(own.mean[0], own.covariance[0], left.tolist(), RIDGE)
    return found
