"""From what was collected of a network to a plan, and to all that is needed to follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from dist_prune.config.flags import ConfigError
from dist_prune.distributed.world import World
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Plan, listed, with_losses
from dist_prune.factorization.planner import Planner
from dist_prune.factorization.spectra import spectra_of, unit_of
from dist_prune.network.attention import opened_in
from dist_prune.network.channels import Group, KeptChannels
from dist_prune.network.padding import note_on
from dist_prune.run.collected import Collected, Directions, collect_again
from dist_prune.search.explore import SearchState, chosen, search
from dist_prune.search.trial import Ground, gather_images, trial_on
from dist_prune.statistics.curvature import Objective
from dist_prune.utils.caller import bar
from dist_prune.width.choose import (
    Channels,
    choose_widths,
    costs_within,
    output_metrics,
    turned_with_moments,
    without,
)
from dist_prune.width.listing import format_widths, note_on_staying
from dist_prune.width.narrowing import require_channels


@dataclass(frozen=True)
class Planned:
    """A plan that is ready to be followed.

    Attributes:
        collected: of the network that is to be matched.
        source: of that whose layers are factored: the same one, or what is left without some channels.
        dense: that network, or where heads of its attention lost dimensions, the same with these turned.
        plans: the rule.
        directions: of `source`.
        plan: the plan.
    """

    collected: Collected
    source: Collected
    dense: nn.Module
    plans: Planner
    directions: Directions
    plan: Plan

    @property
    def table(self) -> str:
        """What happens to each layer, and the totals; first which channels go."""
        plan, unit = self.plan, unit_of(self.source.run.compression.basis)
        text = self.plans.format_table(replace(plan, kept=()), {}, unit)
        staying = note_on_staying(self.collected.possible, self.collected.attention)
        text = "\n".join(filter(None, (note_on(self.collected.padding), staying, text)))
        if not plan.kept:
            return text
        lost = sum(each.loss or 0.0 for each in plan.kept)
        return f"{format_widths(plan.kept, self.source.everything.macs / self.plans.before.macs, lost)}\n{text}"


def planned(collected: Collected, ranks: str | Plan, world: World) -> Planned:
    """The plan that a rule leads to, or a given plan made to fit.

    Args:
        collected: of the network.
        ranks: a rule as `--ranks` has it, or a plan, which may have been edited.
        world: the ranks, which all get the same.

    Raises:
        ConfigError, PlanError, WidthError: it does not go with this network, or with what was collected.
    """
    collected.require_unchanged(world)
    plans = collected.planner(ranks, world)
    if plans.needs_patches and not collected.patches:
        raise ConfigError(
            f"--ranks {plans.rule.text}: needs other forms than the statistics were collected for; begin with a "
            f"budget"
        )
    kept, dense, source = _narrow(collected, ranks, plans, world)
    if kept:
        plans = plans.within(source.found)
    if isinstance(ranks, Plan):
        given = listed(ranks.choices, source.found, plans.side, "the plan", "not in the plan")
        found = directions(source, plans, world)
        plan = given if found[1] is None else with_losses(given, source.found, found[1])
    else:
        plans.check()
        found = directions(source, plans, world)
        plan = _chosen(collected, dense, source, kept, plans, found, world)
    plan = replace(plan, kept=kept, attention=opened_in(source.model))
    return Planned(collected, source, dense, plans, found, plan)


def _chosen(
    collected: Collected,
    dense: nn.Module,
    source: Collected,
    kept: Sequence[KeptChannels],
    plans: Planner,
    found: Directions,
    world: World,
) -> Plan:
    """The plan of least predicted loss; with a search, the best of those that were tried."""
    (nested, spectra), run, count = found, collected.run, collected.run.compression.search
    if not count or spectra is None:
        return world.from_first(lambda: plans.plan(spectra))
    ground = Ground(
        dense=dense,
        source=source.model,
        survey=source.everything,
        bases=source.bases,
        nested=nested,
        side=plans.side,
        kept=kept,
        loss=collected.measure,
    )
    settings = run.correction.within(world.free_memory())
    trial = trial_on(ground, gather_images(collected.images, world), settings, run.seed)
    state = SearchState()
    with bar(count, "search", "candidate", collected.progress, world.is_first) as step:
        for complete in search(count, plans, spectra, trial, run.seed, state, world):
            for _ in complete:
                step()
    return chosen(state, plans, world).plan


def _narrow(
    collected: Collected, ranks: str | Plan, plans: Planner, world: World
) -> tuple[tuple[KeptChannels, ...], nn.Module, Collected]:
    """The channels that stay, the network that the others are removed from, and what is collected without them."""
    if isinstance(ranks, Plan):
        kept = ranks.kept
        require_channels(collected.model, kept)
    elif collected.channels is not None and plans.rule.is_counted:
        _, spectra = directions(collected, plans, world)
        costs = costs_within(
            collected.model, [each.group for each in collected.channels.groups], plans, spectra, collected.image
        )
        kept = choose_widths(collected.channels, costs, plans.rule.amount, plans.round_to, world)
    else:
        kept = ()
    if not kept:
        return kept, collected.model, collected
    if kept not in collected.narrow:
        dense, network = _without(collected, kept, world)
        found = collect_again(collected, network, world)
        collected.narrow.clear()
        collected.narrow[kept] = dense, found
    return kept, *collected.narrow[kept]


def _without(collected: Collected, kept: Sequence[KeptChannels], world: World) -> tuple[nn.Module, nn.Module]:
    """The network that channels are removed from, and without them; layers that took them make up for it."""
    groups, channels = [each.group for each in kept], collected.channels
    if channels is None or not {each.group for each in channels.groups} >= {*groups}:
        channels = _turned(collected, groups, world)
    return channels.model, without(channels, kept, world)


def _turned(collected: Collected, groups: Sequence[Group], world: World) -> Channels:
    """For a plan that is not from these statistics: what it loses is not looked at."""
    model, batches, known = collected.model, collected.images.prepared, collected.sums.curvature
    heads = [group for group in groups if group.part]
    objective = Objective(collected.measure, 1, collected.run.seed)
    metrics = {**known, **output_metrics(model, heads, batches, objective, world, known)}
    network, moments = turned_with_moments(model, groups, batches, metrics, world)
    return Channels((), moments, network)


def directions(collected: Collected, plans: Planner, world: World) -> Directions:
    """The chains of other forms than `output`, and what each rank of all forms loses.

    Exact losses take a pass over the images: they are measured once for all choices of ranks with the same forms,
    or with some of them.
    """
    forms = frozenset(plans.projected_forms)
    for known, found in collected.measured.items():
        if forms <= known:
            return found
    collected.measured[forms] = _directions(collected, plans, world)
    return collected.measured[forms]


def _directions(collected: Collected, plans: Planner, world: World) -> Directions:
    model, sites, sums = collected.model, collected.found.sites, collected.sums
    bases, run = collected.bases, collected.run
    basis = run.compression.basis
    nested = nested_of(model, sites, plans.projected_forms, bases, sums, basis.damping, world)
    known, images = spectra_of(bases, basis, nested), collected.opened
    return nested, with_exact_losses(known, model, sites, bases, nested, sums, images, world, basis, run.seed)
