"""Stages of closed-form correction."""

from __future__ import annotations

from dist_prune.correction import batchnorm
from dist_prune.correction import correct as correction
from dist_prune.correction.calibration import decode
from dist_prune.data.views import views_of
from dist_prune.reporting.progress import Count
from dist_prune.run.checkpointing import ResumePoint
from dist_prune.run.job import Job, held_out_split, share_bits, unlabelled_stream

SITE_GROUP = 8  # corrected sites from one checkpoint to the next, at most


def correct(job: Job) -> None:
    """Solve the sites again against the dense network, in place."""
    settings, seed = job.config.correction, job.config.seed
    with job.report.phase("correction"):
        images = decode(unlabelled_stream(job), views_of(settings, job.config.seed))
        state = correction.CorrectionState()
        if (left := job.checkpoints.resumed()) is not None:
            state.load_state_dict(left.common)
        sites = len(correction.solvable(job.state.compressed, job.everything, settings))
        shown = job.report.meter.count(sites * len(settings.dampings), solved(state), "layer")
        result = correction.correct(
            job.state.dense,
            job.state.compressed,
            job.everything,
            images,
            settings,
            seed,
            job.world,
            state,
            job.state.source,
            job.state.kept,
            after_site=lambda state: pause_between_sites(job, state, shown),
        )
        shown.close()
    job.report.say(correction.format_summary(result))
    job.report.say(held_out(job))
    for concern in correction.concerns(result):
        job.report.warn(concern)


def reestimate_batch_norm(job: Job) -> None:
    """Re-estimate batch norm's statistics, in place."""
    with job.report.phase("batch norm"):
        images = decode(unlabelled_stream(job))
        memory = job.config.correction.calibration_bytes(job.world.free_memory())
        result = batchnorm.reestimate(job.dense, job.state.compressed, images, memory, job.world)
        share_bits(job, job.state.compressed)
    job.report.say(batchnorm.format_summary(result))
    job.report.say(held_out(job))


def held_out(job: Job) -> str:
    """What the held-out KL was measured on, and what to expect of it."""
    held = held_out_split(job)
    count = len(held)
    if job.unlabelled is not None:
        return f"held out: {count:,} images of {held.root}, not used to solve from"
    return (
        f"held out: {count:,} training images, not used to solve from; a network that has learnt them is surer of "
        f"them, and KL on other images is usually higher"
    )


def solved(state: correction.CorrectionState) -> int:
    """How many sites, those of earlier trials included."""
    return sum(len(trial.outcomes) for trial in state.trials) + len(state.outcomes)


def pause_between_sites(job: Job, state: correction.CorrectionState, shown: Count) -> None:
    """A correction may be stopped after each site; after some of them a checkpoint is due."""
    number, trial, last = solved(state), len(state.trials) + 1, state.outcomes[-1]
    shown.step()
    job.report.scalars("calibration", len(state.outcomes), {f"trial {trial}": last.tried[last.chosen]})
    standing = ResumePoint(f"site {number} of trial {trial}", state.state_dict())
    if number % SITE_GROUP:
        job.checkpoints.pause(lambda: standing)
    else:
        job.checkpoints.close(standing)
