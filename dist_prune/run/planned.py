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
from dist_prune.network.channels import KeptChannels
from dist_prune.network.padding import note_on
from dist_prune.run.collected import Collected, Directions, collect_again
from dist_prune.search.explore import SearchState, chosen, search
from dist_prune.search.trial import Ground, gather_images, trial_on
from dist_prune.utils.caller import bar
from dist_prune.width.choose import choose_widths, costs_within, predictions
from dist_prune.width.listing import format_widths
from dist_prune.width.moments import collect_channel_moments
from dist_prune.width.narrowing import narrowed, require_channels


@dataclass(frozen=True)
class Planned:
    """A plan that is ready to be followed.

    Attributes:
        collected: of the network that is to be matched.
        source: of that whose layers are factored: the same one, or what is left without some channels.
        plans: the rule.
        directions: of `source`.
        plan: the plan.
    """

    collected: Collected
    source: Collected
    plans: Planner
    directions: Directions
    plan: Plan

    @property
    def table(self) -> str:
        """What happens to each layer, and the totals; first which channels go."""
        plan, unit = self.plan, unit_of(self.source.run.compression.basis)
        text = self.plans.format_table(replace(plan, kept=()), {}, unit)
        text = "\n".join(filter(None, (note_on(self.collected.padding), text)))
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
    kept, source = _narrow(collected, ranks, plans, world)
    if kept:
        plans = plans.within(source.found)
    if isinstance(ranks, Plan):
        given = listed(ranks.choices, source.found, plans.side, "the plan", "not in the plan")
        found = directions(source, plans, world)
        plan = given if found[1] is None else with_losses(given, source.found, found[1])
    else:
        plans.check()
        found = directions(source, plans, world)
        plan = _chosen(collected, source, kept, plans, found, world)
    return Planned(collected, source, plans, found, replace(plan, kept=kept))


def _chosen(
    collected: Collected,
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
        dense=collected.model,
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
) -> tuple[tuple[KeptChannels, ...], Collected]:
    """The channels that stay, and what is collected of the network without the others."""
    if isinstance(ranks, Plan):
        kept, network = ranks.kept, _without(collected, ranks.kept, world)
    elif collected.channels is not None and plans.rule.is_counted:
        _, spectra = directions(collected, plans, world)
        costs = costs_within(
            collected.model, [each.group for each in collected.channels.groups], plans, spectra, collected.image
        )
        choice = choose_widths(
            collected.model, collected.channels, costs, plans.rule.amount, plans.round_to, world
        )
        kept, network = choice.kept, choice.network
    else:
        return (), collected
    if kept and kept not in collected.narrow:
        found = collect_again(collected, network, world)
        collected.narrow.clear()
        collected.narrow[kept] = found
    return kept, collected.narrow[kept] if kept else collected


def _without(collected: Collected, kept: Sequence[KeptChannels], world: World) -> nn.Module:
    """The network without the channels that a plan leaves out; layers that take the others make up for them."""
    model = collected.model
    require_channels(model, kept)
    moments = dict(collected.channels.moments) if collected.channels else {}
    unknown = [c for each in kept for c in each.group.consumers if c.name not in moments]
    if unknown:
        images = (batch.images for batch in collected.images.prepared())
        moments |= collect_channel_moments(model, unknown, images, world)
    network = narrowed(model, kept, predictions(kept, moments))
    world.broadcast_(*network.state_dict().values())
    return network


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
    known, images = spectra_of(bases, basis, nested), collected.given.open
    return nested, with_exact_losses(known, model, sites, bases, nested, sums, images, world, basis, run.seed)
