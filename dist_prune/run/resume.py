"""A run's directory opened, and the run resumed from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_prune.artifacts import checkpoints, run_directory
from dist_prune.artifacts.checkpoints import Snapshot
from dist_prune.artifacts.environment import environment
from dist_prune.artifacts.lock import Lock
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.distributed.preemption import restarts
from dist_prune.distributed.world import World
from dist_prune.factorization import layers
from dist_prune.run.images import notes_on
from dist_prune.run.job import Job
from dist_prune.training import sensitivity
from dist_prune.utils.files import CheckpointError


@contextmanager
def locked(config: Run, folder: Path, world: World) -> Iterator[None]:
    """Hold the directory of a run or a family, as long as this is open, and write its settings.

    Raises:
        CheckpointError: another process works there, or it cannot be written.
    """
    lock: list[Lock] = []
    world.from_first(lambda: lock.append(run_directory.claim(folder, config, environment())))
    try:
        yield
    finally:
        for held in lock:
            held.release()


@contextmanager
def opened(job: Job) -> Iterator[Job]:
    """Lock the run's directory, and resume from its newest checkpoint, if there is one.

    Raises:
        CheckpointError: another process works there, or it cannot be written.
        ConfigError: what was left is of other images, another network, or another number of ranks.
        NoProgressError: see `run_directory.require_progress`.
    """
    with locked(job.config, job.folder, job.world), closing(job.report):
        if job.world.is_first:
            job.report.open(job.folder)
        job.report.say(f"run directory {job.folder}, {job.world.size} rank(s) on {job.world.device.type}")
        for note in job.notes:
            job.report.say(note)
        for concern in [job.world.note, *notes_on(job.dataset, job.unlabelled), job.world.crowding()]:
            if concern:
                job.report.warn(concern)
        if job.config.resume:
            take_up(job)
        yield job


def take_up(job: Job) -> None:
    """Resume from the newest checkpoint that can be used."""
    found = newest_checkpoint(job)
    if found is not None:
        require_identity(job, found.common["identity"])
        if found.common["shares"] != job.checkpoints.header["shares"]:
            found = resharded(job, found)
    place = "the beginning" if found is None else place_of(found.common)
    job.world.from_first(lambda: run_directory.require_progress(job.folder, place, restarts(os.environ)))
    job.report.say(
        "no checkpoint yet: starting from the beginning" if found is None else f"resuming after {place}"
    )
    if found is None:
        job.report.rewind(0)
    else:
        job.checkpoints.take_up(found)
        redraw(job)


def redraw(job: Job) -> None:
    """Draw again what is drawn only once: TensorBoard's folder was emptied."""
    if job.state.plan is None or not job.world.is_first:
        return
    try:
        job.report.layers(layers.load(job.folder / layers.LAYERS), job.state.chosen)
        if "measure sites" in job.state.done:
            job.report.predictions(**sensitivity.load(job.folder / sensitivity.SITES))
    except CheckpointError as error:
        job.report.warn(f"{error}: TensorBoard goes without")


def newest_checkpoint(job: Job, whole: bool = False) -> Snapshot | None:
    """The newest intact checkpoint; damaged ones are reported."""
    found, problems = checkpoints.newest(job.checkpoints.folder, job.world, whole)
    for problem in problems:
        job.report.warn(f"{problem}; renamed to ….damaged, using the checkpoint before")
    return found


def require_identity(job: Job, before: dict[str, str]) -> None:
    """Refuse to resume with other images or another network.

    Raises:
        ConfigError: names what is different.
    """
    differing = [name for name, value in job.checkpoints.header["identity"].items() if before[name] != value]
    if differing:
        raise ConfigError(
            f"--resume: the {' and the '.join(differing)} are not what {job.folder} was begun with: "
            f"put them back, or start over with --overwrite"
        )


def resharded(job: Job, found: Snapshot) -> Snapshot | None:
    """Another number of ranks, or batch size, resumes where no pass over the images is in its middle.

    Raises:
        ConfigError: that was not asked for.
    """
    before, now = (shares_text(shares) for shares in (found.common["shares"], job.checkpoints.header["shares"]))
    if not job.config.reshard:
        raise ConfigError(
            f"--resume: the run was stopped with {before}, this is {now}: start it as it was, or add --reshard to "
            f"resume from the end of its last epoch"
        )
    boundary = found if found.whole else newest_checkpoint(job, whole=True)
    again = "nothing" if found.whole else f"what was done between it and {place_of(found.common)}"
    job.report.say(f"resharding: {before} → {now}, from the last boundary; {again} is done again")
    return boundary and replace(boundary, own={})


def place_of(state: dict[str, Any]) -> str:
    """Where a checkpoint stands, in words."""
    standing, done = state["standing"], state["state"]["done"]
    return f"{standing['stage']}, {standing['at']}" if standing else done[-1] if done else "the beginning"


def shares_text(shares: dict[str, int]) -> str:
    """How images are shared out, in words."""
    return f"{shares['ranks']} ranks with batches of {shares['batch_size']}"
