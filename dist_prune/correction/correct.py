"""Correction of a whole network: calibration images decoded once, several metrics tried, the best kept or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.correction.calibration import Calibration, divergence, holdout_logits
from dist_prune.correction.reconstruct import Correction, Pair, SiteCorrection, left_out
from dist_prune.correction.solver import Solver
from dist_prune.distributed.world import World
from dist_prune.network.channels import KeptChannels
from dist_prune.network.factored import Factored
from dist_prune.network.outputs import logits_of
from dist_prune.network.replacing import with_replaced
from dist_prune.network.replay import Listing, Route, follow, listing
from dist_prune.network.sites import Site, Survey, View, evaluating
from dist_prune.statistics.curvature import STEPS, NoGradientError, Objective, collect_curvature
from dist_prune.statistics.probes import LOSSES
from dist_prune.utils.tables import table
from dist_prune.width.narrowing import kept_outputs

FEWEST = 8  # images, one of which is held out
GRADIENTS = 2048  # of labels drawn for the metric, about, over all images; at most MOST_DRAWS an image
MOST_DRAWS = 4


class CorrectionError(ValueError):
    """A network that cannot be corrected against itself."""


@dataclass(frozen=True)
class Trial:
    """One correction of all sites: `kl` to the dense network on the held-out images, nats per image."""

    damping: float
    kl: float
    outcomes: tuple[SiteCorrection, ...]


@dataclass(frozen=True)
class Result:
    """The held-out KL `before`, every trial, and the one kept, None if all made it worse."""

    before: float
    trials: tuple[Trial, ...]
    kept: Trial | None
    notes: tuple[str, ...] = ()


@dataclass
class CorrectionState:
    """How far a correction has come; it can be left after each site."""

    trials: list[Trial] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # the network of the best trial
    outcomes: list[SiteCorrection] = field(default_factory=list)  # of the trial under way
    candidate: dict[str, Tensor] | None = None  # its network, the sites of `outcomes` solved

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "best": self.best,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "candidate": self.candidate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.trials = [Trial(t["damping"], t["kl"], tuple(map(_outcome, t["outcomes"]))) for t in state["trials"]]
        self.outcomes = list(map(_outcome, state["outcomes"]))
        self.best, self.candidate = state["best"], state["candidate"]

    def close(self, trial: Trial, network: nn.Module) -> None:
        """A trial is done."""
        if self.best is None or all(improves(trial.kl, before.kl) for before in self.trials):
            self.best = network.state_dict()
        self.trials.append(trial)
        self.outcomes, self.candidate = [], None


def improves(after: float, before: float) -> bool:
    """Whether a divergence went down; one that is not finite is worse than any other."""
    return math.isfinite(after) and not after >= before


def _outcome(fields: Mapping[str, Any]) -> SiteCorrection:
    return SiteCorrection(**fields)


def correct(
    dense: nn.Module,
    compressed: nn.Module,
    survey: Survey,
    images: Calibration,
    settings: CorrectionConfig,
    seed: int,
    world: World,
    state: CorrectionState | None = None,
    source: nn.Module | None = None,
    kept: Sequence[KeptChannels] = (),
    loss: str = "kl",
    after_site: Callable[[CorrectionState], None] = lambda _: None,
    metrics: Mapping[str, Tensor] | None = None,
) -> Result:
    """Solve all sites of the compressed network again, in place, once for each damping; keep the best if it helps.

    Args:
        dense: the network to match.
        compressed: its compressed copy.
        survey: of the source, all its sites.
        images: this rank's calibration images.
        settings: how.
        seed: of drawn labels and positions.
        world: the ranks, which all end with the same network.
        state: how far it had come before.
        source: the dense network without the channels that were removed, from which the compressed one was made.
        kept: the channels of the groups that lost some.
        loss: of the outputs, `kl` or `mse`, see `probes.LOSSES`: measured on the holdout, and the metric is of it.
        after_site: called after each site; the correction may be left there.
        metrics: of the sites' outputs, see `metrics_of`, if they are known.

    Raises:
        StatisticsError: no image of any rank reaches a site.
    """
    sites = solvable(compressed, survey, settings)
    route = agreed_route(dense, [site.name for site in sites], images, world)
    with evaluating(dense), evaluating(compressed):
        holdout = holdout_logits(dense, images)
        before = divergence(compressed, holdout, images.prepare, world, loss)
    source = source or dense
    outputs = kept_outputs(dense, kept)
    notes: list[str] = []
    if metrics is None:
        metrics, notes = metrics_of(source, sites, images, settings, seed, world, loss)
    state, memory = state or CorrectionState(), settings.calibration_bytes(world.free_memory())
    for damping in settings.dampings[len(state.trials) :]:
        candidate = with_replaced(compressed)
        candidate.load_state_dict(state.candidate or compressed.state_dict())
        with evaluating(dense), evaluating(source), evaluating(candidate):
            pairs = list(_pairs(route, dense, candidate, images, holdout))
            solver = Solver(settings.correct, settings.ridge, (damping,))
            limits = settings.positions, seed, memory, LOSSES[loss]
            walk = Correction(route, source, candidate, pairs, metrics, solver, world, *limits, outputs=outputs)
            for outcome in walk.run(sites, [done.site for done in state.outcomes]):
                state.outcomes.append(outcome)
                state.candidate = candidate.state_dict()
                after_site(state)
            reached = divergence(candidate, holdout, images.prepare, world, loss)
            state.close(Trial(damping, reached, tuple(state.outcomes)), candidate)
    best, helped = best_of(state.trials), improves(best_of(state.trials).kl, before)
    if helped:
        assert state.best is not None
        compressed.load_state_dict(state.best)
    notes += _notes(route, left_out(sites, route), sites, best, settings.ridge)
    return Result(before, tuple(state.trials), best if helped else None, tuple(notes))


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial that came nearest; of several alike, the first."""
    return min(trials, key=lambda trial: trial.kl if math.isfinite(trial.kl) else math.inf)


def solvable(compressed: nn.Module, survey: Survey, settings: CorrectionConfig) -> list[Site]:
    """The sites that a correction comes to, in execution order."""
    return [s for s in survey.sites if settings.resolve_dense or _is_factored(compressed, s.name)]


def _notes(
    route: Route, left: Mapping[str, str], sites: Sequence[Site], trial: Trial, ridge: float
) -> Iterator[str]:
    """What was done otherwise than usual, and why."""
    if isinstance(route, Listing):
        yield f"plain targets, and each layer's inputs computed from the images again: {route.reason}"
    if left:
        yield f"not solved: {', '.join(f'{name} ({why})' for name, why in left.items())}"
    inputs = {site.name: site.inputs for site in sites}
    few = [f"{o.site}: {o.rows:,} for {inputs[o.site]:,}" for o in trial.outcomes if o.rows < inputs[o.site]]
    if few:
        yield (
            f"fewer rows than inputs in {len(few)} layers ({', '.join(few)}): what they leave open stays as in "
            f"the dense layers, by --ridge {ridge:g} of the inputs' mean variance; more --calibrate-images help"
        )


def _is_factored(compressed: nn.Module, name: str) -> bool:
    return isinstance(compressed.get_submodule(name), Factored)


def metrics_of(
    dense: nn.Module,
    sites: Sequence[Site],
    images: Calibration,
    settings: CorrectionConfig,
    seed: int,
    world: World,
    loss: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Fisher metrics of all sites' outputs, if any damping needs them; why there are none."""
    views = [View(site) for site in sites]
    if settings.correct != "regression" or all(map(math.isinf, settings.metric_damping)):
        return _no_metrics(views, world), []
    draws = max(1, min(MOST_DRAWS, GRADIENTS // settings.calibrate_images))
    objective = Objective(loss, draws, seed)
    try:
        return collect_curvature(dense, views, images.prepared(), world, STEPS["fisher"], objective), []
    except NoGradientError as error:
        return _no_metrics(views, world), [f"corrected without a metric: {error}"]


def _no_metrics(views: Sequence[View], world: World) -> dict[str, Tensor]:
    """All outputs of a site count alike."""
    sizes = {view.site.name: (view.site.groups, view.width) for view in views}
    return {
        name: torch.eye(width, dtype=torch.float64, device=world.device).expand(groups, width, width)
        for name, (groups, width) in sizes.items()
    }


def agreed_route(dense: nn.Module, names: Sequence[str], images: Calibration, world: World) -> Route:
    """How to walk through the network: found with rank 0's first image, twice, the same way on all ranks."""
    first = images.pixels.new_zeros(1, *images.pixels.shape[1:])
    first[: len(images.pixels)] = images.pixels[:1]  # a rank may have none
    world.broadcast_(first)
    probe = images.prepare(torch.cat([first, first]))  # two: some networks call a layer for each image by itself
    route = follow(dense, names, probe)
    if world.any(isinstance(route, Listing)) and not isinstance(route, Listing):
        return listing(dense, names, probe, "torch.fx failed on another rank")
    return route


def _pairs(
    route: Route,
    dense: nn.Module,
    compressed: nn.Module,
    images: Calibration,
    holdout: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[Pair]:
    for pixels, _ in images.batches(held=False):
        yield Pair(route.begin(dense, pixels, images.prepare), route.begin(compressed, pixels, images.prepare))
    for pixels, logits in holdout:
        yield Pair(
            route.begin(dense, pixels, images.prepare), route.begin(compressed, pixels, images.prepare), logits
        )


def require_deterministic(dense: nn.Module, images: Tensor, world: World) -> None:
    """Refuse a dense network that is not deterministic.

    Raises:
        CorrectionError: the network answers the same images differently each time.
    """
    with evaluating(dense):
        first, second = (logits_of(dense(images.clone())) for _ in range(2))
    if world.any(not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True)):
        raise CorrectionError(
            "the dense network gives the same images other outputs the second time, in evaluation mode; "
            "make it deterministic, or use --correct none"
        )


def concerns(result: Result) -> list[str]:
    """What was done otherwise than usual, or rejected."""
    rejected = f"the correction was rejected: the held-out KL of {result.before:.4f} did not go down"
    return [*result.notes, *([] if result.kept else [rejected])]


def format_summary(result: Result) -> str:
    """What each site became, and whether the whole was kept."""
    rows = []
    best = result.kept or best_of(result.trials)
    for outcome in best.outcomes:
        tried = ", ".join(f"{name} {value:.4f}" for name, value in outcome.tried.items())
        rows.append([outcome.site, outcome.chosen, f"{outcome.rows:,}", tried])
    trials = ", ".join(f"{trial.kl:.4f} with damping {trial.damping:g}" for trial in result.trials)
    verdict = f"kept damping {best.damping:g}" if result.kept else "rejected: the projected network stays"
    return (
        f"{table(['site', 'chosen', 'rows', 'held-out KL, the rest dense'], rows)}\n"
        f"held-out KL {result.before:.4f} before, {trials}; {verdict}"
    )
