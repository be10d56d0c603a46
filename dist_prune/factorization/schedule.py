"""From dense to the target in small steps: the plans of an iterative run."""

from __future__ import annotations

from dataclasses import replace

from dist_prune.factorization.budget import cheaper_ranks, rounded
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.network.sites import Site, Survey, View

NOT_YET = "not shrunk so far that a pair costs less"


def rounds(target: Plan, survey: Survey, step: float, round_to: int, side: str) -> list[Plan]:
    """The plans of all rounds, each cheaper than the one before; the last is the target.

    After k rounds a site keeps stepᵏ of its output channels, but no less than the target says. It stays dense as
    long as a pair of that rank would cost no less.

    Args:
        target: where to end.
        survey: its sites.
        step: 0 < step < 1.
        round_to: ranks on the way are multiples of this where the site is large enough.
        side: of the bases.
    """
    views = {site.name: View(site, side) for site in survey.sites}
    share, plans = 1.0, [_dense(target)]
    while plans[-1] != target:
        share *= step
        plan = Plan(tuple(_shrunk(choice, views.get(choice.site), share, round_to) for choice in target.choices))
        if plan.ranks != plans[-1].ranks:
            plans.append(plan)
    return plans[1:] or [target]


def _dense(target: Plan) -> Plan:
    return Plan(tuple(c if c.rank is None else Choice(c.site, None, NOT_YET) for c in target.choices))


def _shrunk(choice: Choice, view: View | None, share: float, round_to: int) -> Choice:
    if choice.rank is None or view is None:
        return choice
    wanted = share * view.site.outputs
    rank = rounded(view, wanted, round_to)
    if wanted <= choice.rank or rank <= choice.rank:
        return choice
    if view.site.factored_macs(rank) >= view.site.macs:
        return Choice(choice.site, None, NOT_YET)
    return Choice(choice.site, rank)


def still_factored(plan: Plan, before: Plan, survey: Survey, round_to: int, side: str) -> Plan:
    """The plan, with a pair for every site that was one before: at most the largest that costs less than dense.

    A pair has a bias where the dense layer may have none, so it cannot be put back; this one costs less.
    """
    views = {site.name: View(site, side) for site in survey.sites}

    def kept(choice: Choice) -> Choice:
        if choice.rank is not None or choice.site not in before.ranks:
            return choice
        cheaper = cheaper_ranks(views[choice.site], round_to)
        return replace(choice, rank=max([*cheaper.tolist(), before.ranks[choice.site]]), reason="")

    return Plan(tuple(map(kept, plan.choices)))


def shrunk_sites(plan: Plan, before: Plan | None, survey: Survey) -> tuple[Site, ...]:
    """The sites to project: those that the plan gives another rank than they have."""
    has = {} if before is None else before.ranks
    return tuple(s for s in survey.sites if s.name in plan.ranks and plan.ranks[s.name] != has.get(s.name))
