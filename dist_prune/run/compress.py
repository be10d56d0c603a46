"""Statistics → bases → plan → projected network: at once, or in rounds with training in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.config.compression import DATA_FREE
from dist_prune.config.run import Run, to_dict
from dist_prune.config.training import TuningConfig
from dist_prune.data.views import in_views, views_of_statistics
from dist_prune.distributed.fingerprint import digest, fingerprint
from dist_prune.factorization import layers
from dist_prune.factorization.bases import Basis, solve
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Plan, cost
from dist_prune.factorization.project import balance, project, rebuild, unfold
from dist_prune.factorization.schedule import shrunk_sites, still_factored
from dist_prune.factorization.spectra import Spectra, spectra_of
from dist_prune.network import models
from dist_prune.network.published import options_of
from dist_prune.network.sites import Site
from dist_prune.run.checkpointing import Resumable
from dist_prune.run.job import Job, Stage, calibration, probe, share_bits, statistics_split, watched_validation
from dist_prune.run.state import SiteDirections
from dist_prune.run.train import train
from dist_prune.statistics import collect as statistics
from dist_prune.statistics.collect import Statistics
from dist_prune.training.evaluate import predict, score, time_sites
from dist_prune.width.narrowing import narrowed


def rounds(job: Job) -> Iterator[Stage]:
    """Training and projection in turns, `--step` and `--alternate`; the first projection decides how many."""
    way = rounds_of(job)
    for number, plan in enumerate(way[1:], start=2):
        yield f"round {number - 1}: training", partial(train_between, number=number - 1)
        yield f"round {number}: projection", partial(shrink, number=number, plan=plan)
    for number in range(1, job.config.iteration.alternate + 1):
        yield f"alternation {number}: training", partial(train_unfolded, number=number)
        yield f"alternation {number}: projection", partial(project_again, number=number)


def rounds_of(job: Job) -> list[Plan]:
    """The plans of all rounds; without `--step` the target alone."""
    assert job.state.target is not None
    return job.planner.rounds(job.state.target, job.config.iteration.step)


# ── the first projection ───────────────────────────────────────────────────────────────────────────────────


def collect_statistics(job: Job) -> None:
    """Collect the statistics the method needs into the run's directory, unless they are given."""
    method, sites, seed = job.config.compression.basis, job.survey.sites, job.config.seed
    if method.method in DATA_FREE or statistics_file(job) == method.statistics:
        return
    with job.report.phase("statistics"):
        if folder := job.config.unlabelled_statistics:
            job.report.say(f"   {len(statistics_split(job, 0)):,} images of {folder}, without labels")
        passes = passes_of(job)
        patches = job.planner.needs_patches
        found = statistics.collect(job.state.source, sites, passes.open, job.world, method, seed, passes, patches)
    for warning in statistics.warnings(found, sites, method, len(statistics_split(job, 0))):
        job.report.warn(warning)
    job.world.from_first(lambda: statistics.save(statistics_file(job), found, made_of(job, job.state.source)))


def statistics_file(job: Job) -> Path:
    """Where the statistics are: in the run's directory, or, of the dense network, in that of an earlier run."""
    if job.state.narrow is not None:
        return job.folder / "statistics-narrow.safetensors"
    return job.config.compression.basis.statistics or job.folder / "statistics.safetensors"


def made_of(job: Job, network: nn.Module | None) -> dict[str, Any]:
    """What the statistics of this network are of; of one that is not known yet, everything else."""
    image, images = to_dict(job.config.images.image), statistics_split(job, 0)
    model = "" if network is None else digest(network)
    method = job.config.compression.basis
    bf16 = statistics.runs_bf16(method, job.world.device)
    views = views_of_statistics(job.config).described
    origin = statistics.origin(method, model, images.digest(), image, job.config.seed, bf16, views)
    known = {name: value for name, value in origin.items() if network is not None or name != "model"}
    return known | {statistics.IMAGE_COUNT: len(images)}


def plan_and_project(job: Job) -> None:
    """Decide where to end, and project the dense network for the first round, which may be the only one."""
    config, sites, method = job.config, job.survey.sites, job.config.compression.basis
    if method.method == "random-init":
        job.state.plan = job.state.target = decide(job, None)
        torch.manual_seed(config.seed)
        network = config.network
        untrained = models.build(network.arch, network.classes, options_of(network.arch, network.weights))
        job.state.network = rebuild(narrowed(untrained, job.state.kept), job.state.plan).to(job.world.device)
        keep_layers(job, {})
        return
    found, job.state.directions = job.state.directions or directions_with_losses(job, load_statistics(job)), None
    job.state.target = decide(job, found.spectra)
    job.state.plan, *later = rounds_of(job)
    if later:
        job.report.say(f"{len(later) + 1} rounds to get there, --step {config.iteration.step}")
    keep_layers(job, found.bases)
    with job.report.phase("projection"):
        job.state.network = projected(job, job.state.source, sites, found, job.state.plan)
    if config.iteration.is_iterative:
        if config.correction.correct != "none":
            job.report.say(f"--correct {config.correction.correct} is left out: training comes in between")
        tell_plan(job, 1)


def load_statistics(job: Job) -> Statistics:
    """Those that `collect_statistics` left."""
    if job.config.compression.basis.method in DATA_FREE:
        return Statistics()
    patches, device = job.planner.needs_patches, job.world.device
    return statistics.load(statistics_file(job), job.survey.sites, made_of(job, job.state.source), device, patches)


def passes_of(job: Job) -> Resumable:
    """Over the statistics' images, in a run that can be left in their middle."""
    views = views_of_statistics(job.config)
    return Resumable(
        job.checkpoints,
        lambda images: calibration(job, images),
        lambda stream: in_views(job.report.meter.batches(stream), views),
    )


def keep_layers(job: Job, bases: Mapping[str, Basis]) -> None:
    """The layers and their spectra, on disk and in TensorBoard."""
    found, path = layers.layers_of(job.survey, bases), job.folder / layers.LAYERS
    job.world.from_first(lambda: layers.save(path, found))
    job.report.layers(found, job.state.chosen)


def directions_with_losses(job: Job, gathered: Statistics) -> SiteDirections:
    """Of all sites of the network whose layers are factored."""
    found = directions(job, job.state.source, job.survey.sites, gathered)
    return replace(found, spectra=losses_that_hold(job, job.state.source, gathered, found))


def directions(job: Job, model: nn.Module, sites: Sequence[Site], gathered: Statistics) -> SiteDirections:
    """The bases of these sites of the network, the chains of other forms, and what all of these are worth."""
    method, forms = job.config.compression.basis, job.planner.projected_forms
    with job.report.phase("bases"):
        bases = solve(model, sites, gathered, method, job.config.seed, job.world)
        nested = nested_of(model, sites, forms, bases, gathered, method.damping, job.world)
    return SiteDirections(bases, nested, spectra_of(bases, method, nested))


def projected(job: Job, source: nn.Module, sites: Sequence[Site], found: SiteDirections, plan: Plan) -> nn.Module:
    """`source` projected, with the same bits on all ranks."""
    side = job.config.compression.basis.side
    return share_bits(job, project(source, sites, found.bases, plan, side, found.nested))


def losses_that_hold(job: Job, model: nn.Module, gathered: Statistics, found: SiteDirections) -> Spectra | None:
    """The spectra of all sites with exact losses, where the method has such."""
    passes, method = passes_of(job), job.config.compression.basis
    with job.report.phase("losses"):
        return with_exact_losses(
            found.spectra,
            model,
            job.survey.sites,
            found.bases,
            found.nested,
            gathered,
            passes.open,
            job.world,
            method,
            job.config.seed,
        )


def decide(job: Job, spectra: Spectra | None) -> Plan:
    """The plan, printed; made on rank 0, unless a search has found one."""
    plan = job.state.target or job.world.from_first(lambda: job.planner.plan(spectra))
    noise = probe(job.config, job.world, 16)
    shares = job.world.from_first(lambda: time_sites(job.state.source, job.survey.sites, noise))
    job.report.say(job.planner.format_table(plan, shares, spectra.unit if spectra else ""))
    return plan


# ── rounds ─────────────────────────────────────────────────────────────────────────────────────────────────


def train_between(job: Job, number: int) -> None:
    """Train the pairs, and say what this round came to."""
    balance(job.state.compressed)
    with job.report.phase(f"round {number}: training"):
        train(job, job.state.compressed, between(job.config), "rounds/train", before=number - 1)
    tell_round(job, number)


def between(config: Run) -> TuningConfig:
    """How to train between two rounds."""
    return replace(config.tuning, epochs=config.iteration.tune_epochs)


def shrink(job: Job, number: int, plan: Plan) -> None:
    """Project the sites whose rank changes, pairs folded: from statistics of the network as it is now."""
    sites = shrunk_sites(plan, job.state.plan, job.survey)
    source = unfold(job.state.compressed, [site.name for site in sites])
    with job.report.phase(f"round {number}: projection"):
        found = directions(job, source, sites, gathered_from(job, source, sites))
        job.state.network = projected(job, source, sites, found, plan)
    job.state.plan = plan
    tell_plan(job, number)


def gathered_from(job: Job, model: nn.Module, sites: Sequence[Site]) -> Statistics:
    """Statistics of a network other than the dense one; used at once, and not kept."""
    method, passes = job.config.compression.basis, passes_of(job)
    patches = job.planner.needs_patches
    return statistics.collect(model, sites, passes.open, job.world, method, job.config.seed, passes, patches)


def train_unfolded(job: Job, number: int) -> None:
    """Multiply the pairs back and train the dense layers: what was left out may come back."""
    job.state.network, job.state.unfolded = unfold(job.state.compressed, job.state.chosen.ranks), True
    with job.report.phase(f"alternation {number}: training"):
        before = len(rounds_of(job)) - 1 + number - 1
        train(job, job.state.network, between(job.config), "rounds/train", before=before)


def project_again(job: Job, number: int) -> None:
    """Rank all sites again under the rule, and project them."""
    sites, side = job.survey.sites, job.config.compression.basis.side
    with job.report.phase(f"alternation {number}: projection"):
        gathered = gathered_from(job, job.state.compressed, sites)
        found = directions(job, job.state.compressed, sites, gathered)
        spectra = losses_that_hold(job, job.state.compressed, gathered, found)
        wanted = job.world.from_first(lambda: job.planner.plan(spectra))
        plan = still_factored(wanted, job.state.chosen, job.survey, job.planner.round_to, side)
        job.state.network = projected(job, job.state.compressed, sites, found, plan)
    job.state.plan, job.state.unfolded = plan, False
    tell_plan(job, len(rounds_of(job)) + number)
    tell_round(job, len(rounds_of(job)) + number)


def tell_plan(job: Job, number: int) -> None:
    """A point on the curves of the ranks, and a line for people."""
    plan = job.state.chosen
    ranks = {site.name: plan.ranks.get(site.name, site.outputs) for site in job.survey.sites}
    job.report.scalars("rank", number, ranks)
    job.report.say(f"   round {number}: {job.planner.brief(plan)}")


def tell_round(job: Job, number: int) -> None:
    """A point on the curves of the rounds, accuracy and cost, and a line for people."""
    job.world.require_same(f"parameters (round {number})", fingerprint(job.state.compressed))
    found = predict(job.state.compressed, watched_validation(job))
    metrics = score(found, len(job.dataset.val), job.world, job.reference)
    job.report.scalars("rounds", number, metrics.figures | asdict(cost(job.survey, job.state.chosen)))
    job.report.flush()
    job.report.say(
        f"   round {number}: top-1 {metrics.top1:.2f} %, loss {metrics.loss:.4f}, KL to dense {metrics.kl:.4f}"
    )
