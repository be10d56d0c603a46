"""How much of each site to keep: from a rule to a plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_prune.config.flags import Rule, did_you_mean, parse_rule
from dist_prune.factorization import knapsack
from dist_prune.factorization.budget import NAMED, Budget, Menu, budget_of, multiples, repair_counts, rounded
from dist_prune.factorization.forms import DENSE, FORMS, Form, Ranks, form_of, format_ranks
from dist_prune.factorization.latency import LatencyTable
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.channels import KeptChannels
from dist_prune.network.sites import Site, SiteError, Survey, View
from dist_prune.utils.files import require_absent, to_json, write_text
from dist_prune.utils.tables import table
from dist_prune.utils.text import read_text

WORTH_IT = "within the budget nothing need be left out"
UNDECIDED = "its rank follows from the statistics"


class PlanError(ValueError):
    """A rule or a plan that cannot be followed."""


@dataclass(frozen=True)
class Choice:
    """What happens to one site: a form with its ranks, or kept dense (`rank` None) for `reason`.

    Attributes:
        site: its name.
        rank: the smallest of `ranks`.
        reason: why it stays dense.
        loss: predicted from the spectrum, in the unit of `Spectra.unit`; None where there is no spectrum.
        form: one of `forms.FORMS`.
        ranks: the form's, as many as it has; `rank` alone where none are given.
    """

    site: str
    rank: int | None
    reason: str = ""
    loss: float | None = None
    form: str = "output"
    ranks: Ranks = ()

    def __post_init__(self) -> None:
        if self.rank is not None and not self.ranks:
            object.__setattr__(self, "ranks", (self.rank,))

    @property
    def label(self) -> str:
        """In short: `dense`, `12`, `vertical 12` or `tucker 12x16`."""
        if self.rank is None:
            return "dense"
        return format_ranks(self.ranks) if self.form == "output" else f"{self.form} {format_ranks(self.ranks)}"


def choose(site: str, form: str, ranks: Ranks, loss: float | None = None) -> Choice:
    """The site in this form."""
    return Choice(site, min(ranks), "", loss, form, ranks)


@dataclass(frozen=True)
class Plan:
    """The ordered map site → rank, and every layer kept dense with the reason. Goes with every saved model.

    `time` is the share of the dense network's time that the planned one took, where that is the budget; `kept` are
    the groups of channels that become narrower first, so that ranks are of narrow layers. `attention` names the
    modules that are taken apart before that, see `network.attention`.
    """

    choices: tuple[Choice, ...]
    time: float | None = field(default=None, compare=False)
    kept: tuple[KeptChannels, ...] = ()
    attention: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A table of the sites, and one of the channels that go, if any do."""
        rows = [[c.site, c.label, "" if c.loss is None else f"{c.loss:.3g}", c.reason] for c in self.choices]
        narrow = [[each.group.name, f"{len(each.channels)}/{each.group.width}"] for each in self.kept]
        text = table(["site", "rank", "predicted loss", "why dense"], rows)
        return f"{table(['made by', 'channels'], narrow)}\n{text}" if narrow else text

    @property
    def ranks(self) -> dict[str, int]:
        """Site → rank of the factored sites, in execution order."""
        return {c.site: c.rank for c in self.choices if c.rank is not None}

    @property
    def factored(self) -> dict[str, Choice]:
        """Site → choice of the factored sites, in execution order."""
        return {c.site: c for c in self.choices if c.rank is not None}

    @property
    def loss(self) -> float | None:
        """Predicted loss of all sites and narrow groups together; None where none has one."""
        losses = [*(choice.loss for choice in self.choices), *(each.loss for each in self.kept)]
        known = [loss for loss in losses if loss is not None]
        return math.fsum(known) if known else None

    def edited(self, ranks: Mapping[str, int | str]) -> Plan:
        """With other ranks at these sites: 8, "vertical:8", "tucker:8x16" or "dense".

        Raises:
            ConfigError, PlanError: no ranks, or a site that is not in the plan; close names are offered.
        """
        known = {choice.site: choice for choice in self.choices}
        for site, rank in ranks.items():
            if site not in known:
                raise PlanError(f"the plan has no site {site}; {did_you_mean(site, known, ', '.join(known))}")
            named = () if rank == DENSE else parse_rule(f"sites:{site}={rank}").listed
            known[site] = choose(*named[0]) if named else Choice(site, None, "asked for")
        return replace(self, choices=tuple(known.values()), time=None)

    def save(self, path: str | Path) -> None:
        """Write what `load` reads; a file that is there is not replaced.

        Raises:
            CheckpointError: there is one, or it cannot be written.
        """
        require_absent(Path(path))
        widths = [each.to_json() for each in self.kept]
        content = {"format": 1, "choices": self.to_json(), "widths": widths, "attention": list(self.attention)}
        write_text(Path(path), to_json(content))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """From a plan's file, or from the folder of a run or of a saved network.

        Raises:
            PlanError: there is none, or it is not one.
        """
        file = Path(path, "plan.json") if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(read_text(file))
            both = content if isinstance(content, dict) else {"choices": content}
            kept = tuple(map(KeptChannels.from_json, both.get("widths", ())))
            attention = tuple(map(str, both.get("attention", ())))
            return replace(Plan.from_json(both["choices"]), kept=kept, attention=attention)
        except OSError as error:
            raise PlanError(f"{file}: {error.strerror}; expected a plan.json, or a folder with one") from error
        except (ValueError, KeyError, TypeError) as error:
            what = "not JSON" if isinstance(error, json.JSONDecodeError) else "not a plan"
            raise PlanError(f"{file}: {what} ({error})") from error

    def to_json(self) -> list[dict[str, object]]:
        """Its choices as plain types, for plan.json."""
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
    rank, loss = row["rank"], row.get("loss")
    reason = str(row.get("reason", ""))
    form, ranks = str(row.get("form", "output")), tuple(map(int, row.get("ranks") or ()))
    if form == DENSE or (rank is None and not ranks):
        return Choice(str(row["site"]), None, reason, loss)
    form_of(form)
    if rank is not None and form == "output":
        ranks = (int(rank),)  # which is what people edit
    ranks = ranks or (int(rank),)
    return Choice(str(row["site"]), min(ranks), reason, None if loss is None else float(loss), form, ranks)


@dataclass(frozen=True)
class Cost:
    """Totals for one image of the whole network."""

    macs: int
    params: int


def cost(survey: Survey, plan: Plan) -> Cost:
    """Exact multiply-adds and parameters of the network under the plan."""
    macs, params = survey.macs, survey.params
    for site in survey.sites:
        if (choice := plan.factored.get(site.name)) is not None:
            form = FORMS[choice.form]
            macs += form.macs(site, choice.ranks) - site.macs
            params += form.params(site, choice.ranks) - site.dense_weights + (0 if site.bias else site.outputs)
    return Cost(macs, params)


# ── from a rule to a plan ──────────────────────────────────────────────────────────────────────────────────


def make_plan(
    rule: Rule,
    survey: Survey,
    round_to: int,
    side: str = "output",
    spectra: Spectra | None = None,
    latency: LatencyTable | None = None,
    repair: float = 0.0,
    forms: Sequence[Form] = (FORMS["output"],),
    coefficients: Sequence[float] = (),
) -> Plan:
    """Apply the rule.

    Args:
        rule: see `flags.parse_rule`.
        survey: the chosen sites and the skipped ones.
        round_to: ranks are multiples of this where the site is large enough.
        side: of the bases, which have no more directions than that side has dimensions.
        spectra: of the directions; the rules `energy` and `budget` need them.
        latency: what ranks cost, for a budget of latency.
        repair: how much later sites repair, for a budget; see `_within`.
        forms: that a budget chooses from.
        coefficients: of the losses of each site, for a budget; none: all are 1.

    Raises:
        PlanError: a file that cannot be used, a budget out of reach, or a rule without the spectra it needs.
    """
    views = [View(site, side) for site in survey.sites]
    if rule.kind == "file":
        where, absent = f"--ranks {rule.file}", f"not in {rule.file.name}"
        plan = listed(_without_widths(Plan.load(rule.file), where).choices, survey, side, where, absent)
    elif rule.kind == "sites":
        choices = [choose(name, form, ranks) for name, form, ranks in rule.listed]
        plan = listed(choices, survey, side, f"--ranks {rule.text}", "not in --ranks")
    elif rule.kind == "uniform":
        plan = _plan(survey, [_uniform(view, rule.amount, round_to) for view in views])
    elif spectra is None:
        raise PlanError(f"--ranks {rule.text}: there is no spectrum here; use uniform:RATIO")
    elif rule.kind == "energy":
        plan = _plan(survey, [_by_energy(view, rule.amount, round_to, spectra) for view in views])
    else:
        budget = require_reachable(rule, survey, round_to, side, latency, forms)
        plan = _plan(survey, _within(budget, spectra, repair, coefficients))
    return with_losses(plan, survey, spectra) if spectra else plan


def _without_widths(plan: Plan, where: str) -> Plan:
    """The plan, if it removes no channels: its ranks would be of another network."""
    if plan.kept:
        named = ", ".join(each.group.name for each in plan.kept[:NAMED])
        raise PlanError(
            f"{where}: it removes channels of {len(plan.kept)} groups ({named}), which a run chooses by itself "
            f"for a budget; dist_prune.compress follows such a plan, and --width off makes one without"
        )
    return plan


def undecided(survey: Survey) -> Plan:
    """Every site dense: all that can be said of a rule that needs spectra before there are any."""
    return _plan(survey, [Choice(site.name, None, UNDECIDED) for site in survey.sites])


def _plan(survey: Survey, chosen: Sequence[Choice]) -> Plan:
    return Plan((*chosen, *(Choice(skipped.name, None, skipped.reason) for skipped in survey.skipped)))


def _uniform(view: View, ratio: float, round_to: int) -> Choice:
    """`ratio` of the site's output channels. At ratio 1 all directions are kept, whatever that costs."""
    if ratio == 1:
        return Choice(view.site.name, view.full_rank)
    return _if_cheaper(view.site, rounded(view, ratio * view.site.outputs, round_to))


def _by_energy(view: View, share: float, round_to: int, spectra: Spectra) -> Choice:
    """The smallest rank that keeps `share` of the sum of the spectrum."""
    site, tails = view.site, spectra.tails(view.site.name)
    ranks = np.append(multiples(view, round_to), view.full_rank)
    enough = tails[ranks // site.groups] <= (1 - share + 1e-12) * tails[0]
    return _if_cheaper(site, int(ranks[enough.argmax()]))


def _if_cheaper(site: Site, rank: int) -> Choice:
    if FORMS["output"].macs(site, (rank,)) >= site.macs:
        return Choice(site.name, None, f"rank {rank} costs no less than the dense layer")
    return Choice(site.name, rank)


def with_losses(plan: Plan, survey: Survey, spectra: Spectra) -> Plan:
    """The plan with the predicted loss of each site."""
    sites = {site.name: site for site in survey.sites}

    def predicted(choice: Choice) -> Choice:
        site = sites.get(choice.site)
        if site is None:
            return replace(choice, loss=None)
        if choice.rank is None:
            return replace(choice, loss=0.0)
        loss = float(spectra.of_options(site, [(choice.form, choice.ranks)])[0])
        return replace(choice, loss=None if math.isnan(loss) else loss)

    return replace(plan, choices=tuple(map(predicted, plan.choices)))


def require_reachable(
    rule: Rule,
    survey: Survey,
    round_to: int,
    side: str = "output",
    latency: LatencyTable | None = None,
    forms: Sequence[Form] = (FORMS["output"],),
) -> Budget:
    """Refuse a budget before any work is done for it. Arguments as for `make_plan`.

    Raises:
        PlanError: out of reach; the message gives the least possible, and which layers stand in the way.
    """
    budget = budget_of(rule, survey, round_to, side, latency, forms)
    if budget.is_reachable:
        return budget
    left = ", ".join(f"{s.name} ({s.reason})" for s in survey.skipped[:NAMED])
    raise PlanError(
        f"--ranks {rule.text}: out of reach, the least is {budget.least} of the dense network's {rule.of}: "
        f"{budget.in_the_way()}{f', among it {left}' if left else ''}. "
        f"Raise the budget, choose more --sites, or a smaller --round-to"
    )


def _within(budget: Budget, spectra: Spectra, repair: float, coefficients: Sequence[float]) -> list[Choice]:
    """The ranks of least predicted loss; see `knapsack.solve`."""
    menus = budget.menus
    counts = np.multiply(repair_counts(len(menus), repair), coefficients or 1.0).tolist()
    pruned = [menu.pruned(n, spectra) for n, menu in zip(counts, menus, strict=True)]
    chosen = knapsack.solve([options for _, options in pruned], budget.for_sites)
    return [_chosen(menu, option) for (menu, _), option in zip(pruned, chosen, strict=True)]


def _chosen(menu: Menu, option: int) -> Choice:
    if option < len(menu.options):
        form, ranks = menu.options[option]
        return choose(menu.site.name, form, ranks)
    return Choice(menu.site.name, None, menu.why_dense or WORTH_IT)


def listed(choices: Sequence[Choice], survey: Survey, side: str, where: str, absent: str) -> Plan:
    """Exactly these choices; every other site stays dense for the reason `absent`.

    Raises:
        PlanError: beginning with `where`: unknown sites, or impossible ranks, each named.
    """
    sites = {site.name: View(site, side) for site in survey.sites}
    named = {choice.site: choice for choice in choices}
    for name, choice in named.items():
        if choice.rank is not None and name not in sites:
            why = next((f" ({skipped.reason})" for skipped in survey.skipped if skipped.name == name), "")
            hint = did_you_mean(name, sites, f"sites: {', '.join(sites)}")
            raise PlanError(f"{where}: {name} is not a site here{why}; {hint}")
        if choice.rank is not None:
            _check(sites[name], choice, where)
    return _plan(survey, [named.get(name, Choice(name, None, absent)) for name in sites])


def _check(view: View, choice: Choice, where: str) -> None:
    form, site = form_of(choice.form), view.site
    try:
        form.require(site, choice.ranks, view.full_rank)
    except SiteError as error:
        raise PlanError(f"{where}: {error}") from error
    if view.side == "input" and form.name != "output":
        raise PlanError(f"{where}: {site.name} is {form.name}; on --side input there is output alone")
