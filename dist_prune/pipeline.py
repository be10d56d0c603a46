"""The story of a run: load → collect → search → plan → project → correct → distil → tune → save."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from dist_prune.artifacts import run_directory
from dist_prune.artifacts.environment import launch_of
from dist_prune.config.run import Run, require_complete
from dist_prune.distributed.preemption import Flag, listening, restarts
from dist_prune.distributed.world import World, joined
from dist_prune.reporting.report import Report
from dist_prune.run.compress import collect_statistics, plan_and_project, rounds
from dist_prune.run.correct import correct, reestimate_batch_norm
from dist_prune.run.distill import distill
from dist_prune.run.family import draw_family, members
from dist_prune.run.finish import finish, finished
from dist_prune.run.job import Job, Stage
from dist_prune.run.measure import evaluate, evaluate_dense, measure_sites
from dist_prune.run.memory import format_exhausted, is_exhausted
from dist_prune.run.prepare import prepare, show_plan
from dist_prune.run.resume import locked, opened
from dist_prune.run.search import search_plans
from dist_prune.run.stage import stage_images
from dist_prune.run.train import last_tuning, load_dense, tune
from dist_prune.run.width import collect_of_the_rest, remove_channels
from dist_prune.training.evaluate import Predictions
from dist_prune.utils.files import require_writable


class WorkError(RuntimeError):
    """Something that passed all checks before the work turned out to be unusable, or too large for the memory."""


def run(config: Run) -> Path | None:
    """Do all stages on all ranks, or those that are left; the run's directory, or None for a dry run.

    Raises:
        ValueError: in its many kinds: something in the configuration, data or weights cannot be used. Raised
            before long work starts, and on every rank.
        WorkError: the same, found in the middle of the work.
        Preempted: a signal asked to stop; `--resume` continues.
    """
    with listening() as flag, joined(config.device, config.timeout) as world, flag.deferring():
        if not config.compression.family:
            return run_one(config, world, flag)
        if config.dry_run:
            for each in members(config, Path()):
                run_one(each, world, flag)
            return None
        return run_family(config, world, flag)


def run_family(config: Run, world: World, flag: Flag) -> Path:
    """One run for each budget; statistics are collected, and the dense network is evaluated, once."""
    config, folder = world.from_first(lambda: settle(config))
    runs = world.from_first(lambda: members(config, folder))
    with closing(Report(speaks=world.is_first, ranks=world.size)) as report:
        prepare(replace(runs[0], overwrite=config.overwrite), world, report, folder, flag)
    references: dict[str, Predictions] = {}
    with locked(config, folder, world):
        for each in runs:
            run_one(each, world, flag, references)
        world.from_first(lambda: draw_family(folder))
    return folder


def run_one(
    config: Run, world: World, flag: Flag, references: dict[str, Predictions] | None = None
) -> Path | None:
    """One run; `references` of others are used, and its own kept there. Otherwise see `run`."""
    with (
        closing(Report(speaks=world.is_first, entering=world.enter, ranks=world.size)) as report,
        memory_named(config, world),
    ):
        if config.dry_run:
            require_complete(config)
            show_plan(config, world, report)
            return None
        config, folder = world.from_first(lambda: settle(config))
        if config.resume and world.from_first(lambda: finished(folder)):
            report.say(f"{folder} holds a finished run; nothing to resume")
            return folder
        with opened(prepare(config, world, report, folder, flag)) as begun, at_work():
            job = stage_images(begun)
            job = job if references is None else replace(job, references=references)
            load_dense(job)
            for name, work in stages(job):
                if name not in job.state.done:
                    job.checkpoints.stage = name
                    work(job)
                    job.state.done.append(name)
                    job.checkpoints.close()
            if config.until == "end":
                finish(job)
    return folder


def stages(job: Job) -> Iterator[Stage]:
    """The stages of this run, in order. Names are unique: they say which are done."""
    config = job.config
    if config.until == "statistics":
        yield "statistics", collect_statistics
        return
    yield "baseline", evaluate_dense
    yield "statistics", collect_statistics
    if config.compression.removes_channels:
        yield "width", remove_channels
        yield "statistics of the rest", collect_of_the_rest
    if config.compression.search:
        yield "search", search_plans
    yield "projection", plan_and_project
    yield from rounds(job)
    yield "projected", evaluate("projected")
    if config.compression.measure_sites:
        yield "measure sites", measure_sites
    if config.keeps_to_dense and config.correction.correct != "none":
        yield "correction", correct
    if config.keeps_to_dense and config.correction.reestimate_bn:
        yield "batch norm", reestimate_batch_norm
    if "correction" in job.state.done or "batch norm" in job.state.done:
        yield "corrected", evaluate("corrected")
    if config.distillation.distill_steps:
        yield "distillation", distill
        yield "distilled", evaluate("distilled")
    if last_tuning(config).epochs:
        yield "finetune", tune
        yield "tuned", evaluate("tuned")


def settle(config: Run) -> tuple[Run, Path]:
    """The run's directory, and whether it is begun or resumed. Changes nothing on disk."""
    launch = launch_of(os.environ)
    folder = run_directory.run_directory(config, launch)
    config = run_directory.taken_up(config, folder, launch, restarts(os.environ))
    require_complete(config)
    require_writable(folder, "name a place that can with --run-dir")
    run_directory.require_free(folder, config)
    return config, folder


@contextmanager
def memory_named(config: Run, world: World) -> Iterator[None]:
    """While open, memory that runs out is said in one line: where, and which flag takes it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        raise WorkError(format_exhausted(error, world.where.phase, config)) from error


@contextmanager
def at_work() -> Iterator[None]:
    """While open, a ValueError is a failure of the work, no longer of the start."""
    try:
        yield
    except ValueError as error:
        raise WorkError(str(error)) from error
