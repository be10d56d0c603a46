"""How much of each site to keep: from a rule to a plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dist_prune.config import Rule
from dist_prune.sites import Survey, View


class PlanError(ValueError):
    """A rule or a plan that cannot be followed."""


@dataclass(frozen=True)
class Choice:
    """What happens to one site: `rank` channels, or kept dense (`rank` None) for `reason`."""

    site: str
    rank: int | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The ordered map site → rank, and every layer kept dense with the reason. Goes with every saved model."""

    choices: tuple[Choice, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Site → rank of the factored sites, in execution order."""
        return {c.site: c.rank for c in self.choices if c.rank is not None}

    def to_json(self) -> list[dict[str, object]]:
        """Plain types, for plan.json."""
        return [asdict(choice) for choice in self.choices]

    @staticmethod
    def from_json(rows: Sequence[Mapping[str, Any]]) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: a row that is not one.
        """
        try:
            return Plan(tuple(_choice(row) for row in rows))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a plan: every row needs site, rank (or null) and reason ({error})") from error


def _choice(row: Mapping[str, Any]) -> Choice:
    rank = row["rank"]
    return Choice(str(row["site"]), None if rank is None else int(rank), str(row.get("reason", "")))


@dataclass(frozen=True)
class Cost:
    """Totals for one image of the whole network."""

    macs: int
    params: int


def cost(survey: Survey, plan: Plan) -> Cost:
    """Exact multiply-adds and parameters of the network under the plan."""
    macs, params = survey.macs, survey.params
    for site in survey.sites:
        rank = plan.ranks.get(site.name)
        if rank is not None:
            macs += site.factored_macs(rank) - site.macs
            params += site.factored_weights(rank) - site.dense_weights + (0 if site.bias else site.outputs)
    return Cost(macs, params)


def make_plan(rule: Rule, survey: Survey, round_to: int, side: str = "output") -> Plan:
    """Apply the rule.

    Args:
        rule: see `config.parse_rule`.
        survey: the chosen sites and the skipped ones.
        round_to: ranks are multiples of this where the site is large enough.
        side: of the bases, which have no more directions than that side has dimensions.
    """
    if rule.kind == "file":
        return read_plan(rule.file, survey, side)
    chosen = tuple(_uniform(View(site, side), rule.amount, round_to) for site in survey.sites)
    return Plan(chosen + tuple(Choice(s.name, None, s.reason) for s in survey.skipped))


def _uniform(view: View, ratio: float, round_to: int) -> Choice:
    """`ratio` of the site's output channels. At ratio 1 all directions are kept, whatever that costs."""
    site = view.site
    if ratio == 1:
        return Choice(site.name, view.full_rank)
    rank = rounded(view, ratio * site.outputs, round_to)
    if site.factored_macs(rank) >= site.macs:
        return Choice(site.name, None, f"rank {rank} costs no less than the dense layer")
    return Choice(site.name, rank)


def rounded(view: View, rank: float, round_to: int) -> int:
    """The nearest rank the site allows: a multiple of its groups, and of `round_to` if it has room."""
    step = math.lcm(view.site.groups, round_to)
    if step > view.full_rank:
        step = view.site.groups
    return int(min(max(round(rank / step), 1) * step, view.full_rank))


def read_plan(file: Path, survey: Survey, side: str) -> Plan:
    """A plan edited by hand (`plan.json` of a run, or only its `choices`).

    Raises:
        PlanError: not JSON, unknown sites, or impossible ranks, each named.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise PlanError(f"--ranks {file}: not JSON ({error})") from error
    plan = Plan.from_json(content["choices"] if isinstance(content, dict) else content)
    sites = {site.name: View(site, side) for site in survey.sites}
    for name, rank in plan.ranks.items():
        if name not in sites:
            raise PlanError(f"--ranks {file}: {name} is not a site here; sites: {', '.join(sites)}")
        _check_rank(sites[name], rank, file)
    named = {choice.site: choice for choice in plan.choices}
    chosen = tuple(named.get(name, Choice(name, None, f"not in {file.name}")) for name in sites)
    return replace(plan, choices=chosen + tuple(Choice(s.name, None, s.reason) for s in survey.skipped))


def _check_rank(view: View, rank: int, file: Path) -> None:
    site = view.site
    if not 1 <= rank <= view.full_rank or rank % site.groups:
        extra = f", a multiple of {site.groups}" if site.groups > 1 else ""
        raise PlanError(f"--ranks {file}: {site.name} has rank {rank}; expected 1 to {view.full_rank}{extra}")
