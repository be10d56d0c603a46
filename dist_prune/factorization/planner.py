"""The plan of a run: what `--ranks` asks for, on this network and this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dist_prune.config.flags import Rule, parse_rule
from dist_prune.config.run import Run
from dist_prune.config.training import IterationConfig
from dist_prune.distributed.world import World
from dist_prune.factorization import latency
from dist_prune.factorization.budget import budget_of, options_of
from dist_prune.factorization.execution import Execution
from dist_prune.factorization.forms import FORMS, Form
from dist_prune.factorization.latency import LatencyTable
from dist_prune.factorization.layers import layers_of
from dist_prune.factorization.plan import (
    Cost,
    Plan,
    PlanError,
    cost,
    make_plan,
    require_reachable,
    undecided,
)
from dist_prune.factorization.plan_table import plan_table
from dist_prune.factorization.project import rebuild
from dist_prune.factorization.schedule import rounds
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.sites import Survey, View

TRIALS = 6  # plans that are timed as whole networks, at most
NEAR = 1.01  # a measured time within this factor of the budget meets it: clocks are no better
FAR = 0.95  # a plan after the first that takes less than this part of the budget leaves out too much

TENSOR_CORES = 8  # take factors of this many columns
MULTIPLES = 8  # of the step that a layer has at least, else its ranks are too coarse
FEW = 0.1  # of the multiply-adds


@dataclass(frozen=True)
class Planner:
    """A rule and all it needs but the spectra; `latency` only where it is the budget, of batches of `batch`.

    `repair`, for a budget, is how much later sites will repair, see `plan.make_plan`; it chooses from `forms`.
    `dense` is the cost of the dense network where the survey is of one from which channels were removed.
    `time_of` measures, where latency is the budget, what share of the dense network's time a planned one takes;
    `timed_in` says in which precision and layout.
    """

    rule: Rule
    survey: Survey
    round_to: int
    side: str
    batch: int
    latency: LatencyTable | None = None
    repair: float = 0.0
    forms: tuple[Form, ...] = (FORMS["output"],)
    dense: Cost | None = None
    time_of: Callable[[Plan], float] | None = None
    timed_in: str = ""

    @property
    def projected_forms(self) -> frozenset[str]:
        """The forms that sites may come to have, as far as is known before there are spectra."""
        if self.rule.needs_spectra:
            return frozenset(form.name for form in self.forms)
        return frozenset(choice.form for choice in self.plan(None).factored.values())

    @property
    def needs_patches(self) -> bool:
        """Whether the statistics have to tell of patches: a site may take another form than `output`."""
        return not self.projected_forms <= {"output"}

    def within(self, narrow: Survey) -> Planner:
        """For the network without the channels that were removed, and the same budget of multiply-adds."""
        whole = Cost(self.survey.macs, self.survey.params)
        rule = replace(self.rule, amount=self.rule.amount * whole.macs / narrow.macs)
        return replace(self, rule=rule, survey=narrow, dense=whole)

    @property
    def before(self) -> Cost:
        """Of the dense network."""
        return self.dense or Cost(self.survey.macs, self.survey.params)

    def check(self) -> None:
        """Refuse, before long work, what can be seen to be impossible without spectra.

        Raises:
            PlanError: a budget out of reach, or a file that does not fit.
        """
        if self.rule.kind == "budget":
            require_reachable(self.rule, self.survey, self.round_to, self.side, self.latency, self.forms)
        elif not self.rule.needs_spectra:
            self.plan(None)

    def plan(self, spectra: Spectra | None) -> Plan:
        """Apply the rule, see `plan.make_plan`; where latency is the budget, to the network as a whole."""
        if self.time_of is None or spectra is None:
            return self._planned(self.rule, spectra)
        return self._met(self.time_of, spectra)

    def weighted(self, first: Plan, spectra: Spectra, coefficients: Sequence[float]) -> Plan:
        """Another plan for the same budget, each site's losses counted with a coefficient.

        Where latency is the budget, it takes no longer than `first`, the plan of equal coefficients, by the times
        of the layers; see `meets`.
        """
        rule = self.rule
        if self.latency is not None:
            rule = replace(rule, amount=self._predicted_time(self.latency, first) / self.latency.whole)
        return self._planned(rule, spectra, coefficients)

    def meets(self, plan: Plan) -> Plan | None:
        """The plan if it meets the budget, where that is of latency measured on the network as a whole."""
        if self.time_of is None:
            return plan
        timed = replace(plan, time=self.time_of(plan))
        return timed if timed.time is not None and timed.time <= NEAR * self.rule.amount else None

    def _predicted_time(self, table: LatencyTable, plan: Plan) -> int:
        return table.predicted({name: (choice.form, choice.ranks) for name, choice in plan.factored.items()})

    def _planned(self, rule: Rule, spectra: Spectra | None, coefficients: Sequence[float] = ()) -> Plan:
        return make_plan(
            rule,
            self.survey,
            self.round_to,
            self.side,
            spectra,
            self.latency,
            self.repair,
            self.forms,
            coefficients,
        )

    def _met(self, time_of: Callable[[Plan], float], spectra: Spectra) -> Plan:
        """A plan whose network is as fast as asked, but not much faster; the fastest, where none is as fast.

        Layers timed alone find their input in the cache, and promise more than the whole network keeps: then less
        is asked for. Where a reading was far too long, as on a busy machine, that was too much, and the search
        goes on between the two.
        """
        wanted, amount = self.rule.amount, self.rule.amount
        slow = 0.0  # the least amount whose network was too slow; 0: none yet
        less = 0.0  # the largest that was enough, or out of reach
        tried = list[Plan]()
        for _ in range(TRIALS):
            plan = self._timed(replace(self.rule, amount=amount), spectra, time_of, tried)
            share = 0.0 if plan is None else (plan.time or 0) / wanted
            if share > NEAR:
                slow = amount
            elif share >= FAR or not slow:
                break
            else:
                less = amount
            amount = (slow + less) / 2 if less else amount / share
        met = [plan for plan in tried if (plan.time or 0) <= NEAR * wanted]
        return met[-1] if met else min(tried, key=lambda plan: plan.time or 0)

    def _timed(
        self, rule: Rule, spectra: Spectra, time_of: Callable[[Plan], float], tried: list[Plan]
    ) -> Plan | None:
        """What is planned by the rule, with its network's time; None if that is out of reach, and others were not.

        Raises:
            PlanError: it is the first, and out of reach.
        """
        try:
            plan = self._planned(rule, spectra)
        except PlanError:
            if tried:
                return None
            raise
        known = (other for other in tried if replace(other, time=None) == plan)
        timed = next(known, None) or replace(plan, time=time_of(plan))
        tried.append(timed)
        return timed

    def foreseen(self) -> tuple[Plan, str]:
        """The plan before anything was measured, and, where the rule needs measurements, why it is incomplete."""
        if not self.rule.needs_spectra:
            return self.plan(None), ""
        note = f"--ranks {self.rule.text}: ranks follow from statistics of the data; every site is shown dense"
        if self.rule.of == "latency":
            note += "; what can be reached follows from times that a run measures on its device"
        elif self.rule.kind == "budget":
            least = budget_of(self.rule, self.survey, self.round_to, self.side, forms=self.forms).least
            note += (
                f"; the least that can be reached is {least} of the dense network's {self.rule.of} by ranks alone"
            )
        return undecided(self.survey), note

    def rounds(self, target: Plan, step: float) -> list[Plan]:
        """The plans of all rounds on the way to the target; without a step the target alone."""
        return rounds(target, self.survey, step, self.round_to, self.side) if step else [target]

    def way(self, target: Plan, iteration: IterationConfig) -> str:
        """The rounds to the target in words, one per line; empty where there is only one."""
        text, step = [], iteration.step
        if step and self.rule.needs_spectra:
            text.append(f"--step {step:g}: how many rounds follows from the ranks")
        elif step:
            plans = self.rounds(target, step)
            text.append(f"{len(plans)} rounds to get there, --step {step:g}")
            text += [f"   round {number}: {self.brief(plan)}" for number, plan in enumerate(plans, start=1)]
        if iteration.alternate:
            text.append(f"--alternate {iteration.alternate}: then trained as dense layers and projected again")
        return "\n".join(text)

    def brief(self, plan: Plan) -> str:
        """A plan in a few words."""
        return f"{len(plan.ranks)} sites factored, MACs ×{cost(self.survey, plan).macs / self.before.macs:.3f}"

    def format_table(self, plan: Plan, shares: Mapping[str, float], unit: str = "") -> str:
        """The plan's table with its totals.

        Args:
            plan: to show.
            shares: of the dense forward time, per cent, by site.
            unit: of predicted losses, where the plan has them.
        """
        before, after = self.before, cost(self.survey, plan)
        lines = [
            plan_table(layers_of(self.survey, {}), plan, shares, unit),
            f"MACs {before.macs / 1e6:.1f} M → {after.macs / 1e6:.1f} M ({after.macs / before.macs:.3f}), "
            f"parameters {before.params / 1e6:.2f} M → {after.params / 1e6:.2f} M "
            f"({after.params / before.params:.3f})",
        ]
        if self.latency is not None:
            whole, predicted = self.latency.whole, self._predicted_time(self.latency, plan)
            lines.append(
                f"predicted latency of a batch of {self.batch}, {self.timed_in}: "
                f"{latency.format_time(whole)} → {latency.format_time(predicted)} "
                f"({predicted / whole:.3f})"
            )
        if plan.time is not None:
            missed = plan.time > NEAR * self.rule.amount
            lines.append(
                f"measured, dense and compressed in turns: {plan.time:.3f}"
                f"{f', no plan that was tried is faster; asked {self.rule.amount:g}' if missed else ''}"
            )
        if plan.loss is not None:
            lines.append(f"predicted {unit}, summed over sites: {plan.loss:.4g}")
        return "\n".join(lines)


def planner(config: Run, found: Survey, world: World) -> Planner:
    """For the run's flags."""
    compression = config.compression
    rule, side = parse_rule(compression.ranks), compression.basis.side
    forms = tuple(FORMS[name] for name in compression.allowed_forms)
    round_to = compression.round_to or usual_step(rule, world.device, found)
    batch = config.images.eval_batch_size
    return Planner(rule, found, round_to, side, batch, repair=config.repair, forms=forms)


def follower(plan: Plan, config: Run, found: Survey, world: World) -> Planner:
    """As `planner`, for a plan that there is already."""
    named = tuple((name, choice.form, choice.ranks) for name, choice in plan.factored.items())
    return replace(planner(config, found, world), rule=Rule("sites", listed=named))


def usual_step(rule: Rule, device: torch.device, found: Survey) -> int:
    """What ranks are multiples of: 8 for tensor cores; where time is what counts, 16 for registers of 512 bits.

    A convolution on such a processor takes as long for 17 outputs as for 32. Tensor cores gain a few per cent, and
    a narrow layer loses more by it: for them it is halved until few multiply-adds are in layers of less than
    `MULTIPLES` multiples.
    """
    if device.type != "cuda":
        return 16 if rule.of == "latency" else 1
    return next(step for step in (TENSOR_CORES, 4, 2, 1) if step == 1 or _narrow(found, step) < FEW)


def _narrow(found: Survey, step: int) -> float:
    """The share of the sites' multiply-adds in those of too few outputs for ranks in multiples of this."""
    narrow = sum(site.macs for site in found.sites if site.outputs < MULTIPLES * step)
    return narrow / max(1, sum(site.macs for site in found.sites))


def timed_planner(config: Run, dense: nn.Module, found: Survey, world: World, image: Tensor) -> Planner:
    """As `planner`, with times where they are the budget: taken on rank 0, for a batch of `--eval-batch-size`.

    They are taken in bfloat16 autocast where the run trains in it (`--bf16`), and of whole networks that are
    compiled where it does that (`--compile`).

    Args:
        config: the run.
        dense: the network, on the world's device.
        found: its sites.
        world: the ranks, all of which get rank 0's times.
        image: (1, …), any of the right shape.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    plain = planner(config, found, world)
    if plain.rule.of != "latency":
        return plain
    options = {site: options_of(View(site, plain.side), plain.round_to, plain.forms) for site in found.sites}
    images = image.expand(plain.batch, *image.shape[1:]).contiguous()
    execution = Execution(config.tuning.bf16, config.tuning.compile)

    def share(plan: Plan) -> float:
        return latency.time_share(dense, rebuild(dense, plan), images, execution)

    table = world.from_first(lambda: latency.measure(dense, options, images, execution=execution))
    return replace(plain, latency=table, time_of=share, timed_in=execution.described(dense))
