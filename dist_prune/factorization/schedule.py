"""From dense to the target in small steps: the plans of an iterative run."""

from __future__ import annotations

from dataclasses import replace

from dist_prune.factorization.budget import cheaper_ranks, rounded
from dist_prune.factorization.forms import FORMS, Ranks
from dist_prune.factorization.plan import Choice, Plan, choose
from dist_prune.network.sites import Site, Survey, View

NOT_YET = "not shrunk so far that a pair costs less"


def rounds(target: Plan, survey: Survey, step: float, round_to: int, side: str) -> list[Plan]:
    """The plans of all rounds, each cheaper than the one before; the last is the target.

    After k rounds a site has the form of the target, with stepᵏ of its full ranks, no less than the target has.
    It stays dense as long as that would cost no less.

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
        if _forms(plan) != _forms(plans[-1]):
            plans.append(plan)
    return plans[1:] or [target]


def _dense(target: Plan) -> Plan:
    return Plan(tuple(c if c.rank is None else Choice(c.site, None, NOT_YET) for c in target.choices))


def _forms(plan: Plan) -> dict[str, tuple[str, Ranks]]:
    return {name: (choice.form, choice.ranks) for name, choice in plan.factored.items()}


def _shrunk(choice: Choice, view: View | None, share: float, round_to: int) -> Choice:
    if choice.rank is None or view is None:
        return choice
    form, site = FORMS[choice.form], view.site
    ranks = tuple(
        _on_the_way(last, share * full, view, round_to if form.name == "output" else 1)
        for last, full in zip(choice.ranks, form.full_ranks(site), strict=True)
    )
    if ranks == choice.ranks:
        return choice
    if form.macs(site, ranks) >= site.macs:
        return Choice(choice.site, None, NOT_YET)
    return choose(choice.site, choice.form, ranks)


def _on_the_way(last: int, wanted: float, view: View, round_to: int) -> int:
    """The rank nearest to `wanted`, not below the last one."""
    groups = view.site.groups
    rank = rounded(view, wanted, round_to) if round_to > 1 else max(1, round(wanted / groups)) * groups
    return last if wanted <= last else max(rank, last)


def still_factored(plan: Plan, before: Plan, survey: Survey, round_to: int, side: str) -> Plan:
    """The plan, in which every site that was factored before is: at most at the largest rank that costs less.

    A chain has a bias where the dense layer may have none, so it cannot be put back; this one costs less.
    """
    views = {site.name: View(site, side) for site in survey.sites}

    def kept(choice: Choice) -> Choice:
        if choice.rank is not None or choice.site not in before.factored:
            return choice
        had = before.factored[choice.site]
        if had.form != "output":
            return replace(had, loss=choice.loss)
        cheaper = cheaper_ranks(views[choice.site], round_to)
        return Choice(choice.site, max([*cheaper.tolist(), had.ranks[0]]), "", choice.loss)

    return Plan(tuple(map(kept, plan.choices)))


def shrunk_sites(plan: Plan, before: Plan | None, survey: Survey) -> tuple[Site, ...]:
    """The sites to project: those that the plan gives another form, or other ranks, than they have."""
    has, wanted = {} if before is None else _forms(before), _forms(plan)
    return tuple(s for s in survey.sites if s.name in wanted and wanted[s.name] != has.get(s.name))
