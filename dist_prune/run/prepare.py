"""Everything that can be wrong is found here, before a run's work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dist_prune.artifacts import run_directory
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.correction.correct import require_deterministic
from dist_prune.data import pretrained_images
from dist_prune.data.dataset import Dataset, Split
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.preemption import Flag
from dist_prune.distributed.world import World
from dist_prune.factorization.planner import Planner, planner, timed_planner
from dist_prune.network import models
from dist_prune.network.attention import opened_as, opened_in
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Survey
from dist_prune.reporting.report import Report
from dist_prune.run.checkpointing import CheckpointManager
from dist_prune.run.compress import made_of
from dist_prune.run.images import (
    check_images,
    open_images,
    open_unlabelled,
    require_calibration,
    require_classes,
)
from dist_prune.run.job import Job, calibration, probe, unlabelled_stream, validation
from dist_prune.run.network import load_network, open_attention
from dist_prune.run.state import State
from dist_prune.run.train import cached_weights
from dist_prune.statistics import collect as statistics
from dist_prune.training.dry_step import format_unreached, unreached
from dist_prune.training.evaluate import time_sites
from dist_prune.training.trainer import require_possible
from dist_prune.utils import files
from dist_prune.width.choose import removable_groups, require_reachable_widths
from dist_prune.width.groups import find_groups
from dist_prune.width.listing import format_groups


@dataclass(frozen=True)
class Given:
    """What a run is given, each sound by itself: images, and a network on this rank's device with all its sites.

    `notes` are for the log.
    """

    dataset: Dataset
    unlabelled: Split | None
    dense: nn.Module
    everything: Survey
    notes: tuple[str, ...] = ()


def prepare(config: Run, world: World, report: Report, folder: Path, flag: Flag) -> Job:
    """Check the data, the network and the plan. Changes nothing on disk.

    Raises:
        ValueError: in its many kinds; see `pipeline.run`.
    """
    dataset = world.from_first(lambda: open_images(config))
    require_classes(config, dataset)
    unlabelled = world.from_first(lambda: open_unlabelled(config))
    if not (
        config.resume and world.from_first(lambda: run_directory.is_known(folder))
    ):  # they were sound when it began
        for split in (dataset.train, dataset.val, unlabelled):
            if split is not None:
                check_images(config, split, world)
    for settings in (config.tuning, config.pretrain):
        require_possible(settings, world.device)
    notes: list[str] = []
    dense, everything = load_network(config, world, notes.append)
    if everything.concern:
        report.warn(everything.concern)
    return begin(config, world, report, folder, flag, Given(dataset, unlabelled, dense, everything, tuple(notes)))


def begin(config: Run, world: World, report: Report, folder: Path, flag: Flag, given: Given) -> Job:
    """A run of what is given, once everything that its stages will need of it was tried.

    Raises:
        ValueError: in its many kinds: what is given does not go together, or with the settings.
        CheckpointError: see `check_files_of`.
    """
    dense, everything = open_attention(config, given.dense, given.everything, world, report.say)
    found = everything.select(config.compression.sites)
    ranks = timed_planner(config, dense, found, world, probe(config, world, 1))
    require_reachable(config, dense, ranks, world)
    require_calibration(config, given.unlabelled or given.dataset.train)
    if config.correction.correct != "none":
        require_deterministic(given.dense, probe(config, world, 2), world)
    untrained = require_trainable(config, given.dense, world)
    state = State(dense)
    job = Job(
        config=config,
        world=world,
        report=report,
        folder=folder,
        dataset=given.dataset,
        unlabelled=given.unlabelled,
        given=given.dense,
        dense=dense,
        dense_survey=everything,
        dense_planner=ranks,
        checkpoints=CheckpointManager(
            world=world,
            folder=folder / "checkpoints",
            flag=flag,
            say=report.say,
            every_s=60 * config.save_minutes,
            keep=config.keep_checkpoints,
            header={
                "identity": identity_of(given.dataset, given.unlabelled, given.dense),
                "shares": shares_of(config, world),
            },
            parts={"state": state, "report": report},
        ),
        state=state,
        notes=tuple(filter(None, (*given.notes, *untrained, pretrained_images.adopted(config)))),
    )
    for stream in (validation(job), calibration(job, 0), unlabelled_stream(job)):
        assert len(stream), "streams refuse to share fewer images than ranks"
    world.from_first(lambda: check_files_of(job))
    return job


def require_reachable(config: Run, dense: nn.Module, ranks: Planner, world: World) -> None:
    """Refuse a budget before any work is done for it.

    Raises:
        PlanError: out of reach; the least is named.
    """
    if not config.compression.removes_channels:
        ranks.check()
        return
    groups = removable_groups(dense, ranks.survey.sites, probe(config, world, 2)).groups
    require_reachable_widths(dense, groups, ranks, probe(config, world, 1))


def require_trainable(config: Run, dense: nn.Module, world: World) -> list[str]:
    """Try one step of each training that this run has; what of the network it does not reach, for the log.

    Raises:
        ConfigError: the network cannot be trained so.
    """
    distilled = replace(config.tuning, bn="frozen", batch_size=config.distillation.distill_batch_size)
    rounds = config.iteration.tune_epochs if config.iteration.is_iterative else 0
    trainings = {
        "pretrain.": (config.pretrain, config.pretrain.epochs if config.network.weights == "none" else 0),
        "": (config.tuning, max(config.tuning.epochs, rounds)),
        "distill-": (distilled, config.distillation.distill_steps),
    }
    found: dict[str, None] = {}
    for group, (settings, much) in trainings.items():
        if much:
            images = 1 if settings.batch_size == 1 and settings.bn == "local" else 2
            try:
                names = unreached(dense, probe(config, world, images), settings)
            except ConfigError as error:
                raise ConfigError(str(error).replace("--", f"--{group}") if group else str(error)) from error
            found |= dict.fromkeys(names)
    return [format_unreached(tuple(found))]


def check_files_of(job: Job) -> None:
    """Files that the work will read or write later.

    Raises:
        CheckpointError: statistics that are absent or damaged; a cache that cannot be written, by its variable.
        StatisticsError: statistics of another network or other images.
    """
    given = job.config.compression.basis.statistics
    weights = cached_weights(job.config, job.world.size, job.dataset.train)
    if given is not None:
        origin = made_of(job, trained_before(job, weights))
        statistics.require_fitting(given, job.survey.sites, origin, job.planner.needs_patches)
    if weights is not None and not weights.is_file():
        files.require_writable(weights.parent, "name another place with DIST_PRUNE_CACHE")


def trained_before(job: Job, cached: Path | None) -> nn.Module | None:
    """The network that will be compressed, if it is known: not before a run that trains it has done so."""
    if cached is None:
        return job.dense
    if not files.is_intact(cached):
        return None
    network, trained = job.config.network, with_replaced(job.given)
    models.fill(trained, network.arch, network.classes, str(cached))
    return opened_as(trained, opened_in(job.dense))


def identity_of(dataset: Dataset, unlabelled: Split | None, dense: nn.Module) -> dict[str, str]:
    """What a run is about: another one cannot resume from its checkpoints."""
    return {
        "training images": dataset.train.digest(),
        "validation images": dataset.val.digest(),
        "network": digest(dense),
        "calibration images": unlabelled.digest() if unlabelled else "",
    }


def shares_of(config: Run, world: World) -> dict[str, int]:
    """How the images are shared out: a pass over them can only resume with the same."""
    return {
        "ranks": world.size,
        "batch_size": config.tuning.batch_size,
        "distill": config.distillation.distill_batch_size,
        "pretrain": config.pretrain.batch_size,
    }


def show_plan(config: Run, world: World, report: Report) -> None:
    """The dry run: the plan's table from the network alone; weights are not even read."""
    dense, everything = open_attention(
        config, *load_network(config, world, report.say, read=False), world, report.say
    )
    found = everything.select(config.compression.sites)
    known = planner(config, found, world)
    if known.rule.kind == "budget" and known.rule.of != "latency":  # times follow from a run
        require_reachable(config, dense, known, world)
    plan, note = known.foreseen()
    report.say(known.format_table(plan, time_sites(dense, found.sites, probe(config, world, 4))))
    for more in filter(None, (note, known.way(plan, config.iteration), pretrained_images.adopted(config))):
        report.say(more)
    report.say(format_groups(find_groups(dense, probe(config, world, 2))))
