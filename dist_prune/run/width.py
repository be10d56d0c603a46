"""The stage that takes channels out of the network, before what is left of its layers is factored."""

from __future__ import annotations

from dist_prune.correction import correct as correction
from dist_prune.network.sites import evaluating
from dist_prune.run.job import Job, probe, unlabelled_stream
from dist_prune.width.choose import choose_widths
from dist_prune.width.listing import format_widths


def remove_channels(job: Job) -> None:
    """Choose widths, in closed form from the calibration images, and narrow the network."""
    config, planner = job.config, job.dense_planner
    with job.report.phase("width"), evaluating(job.dense):
        images = correction.decode(unlabelled_stream(job), config.correction.mirrored)
        judges = correction.holdout_logits(job.dense, images)
        found = choose_widths(
            job.dense,
            probe(config, job.world, 2),
            images.prepared,
            lambda network: correction.divergence(network, judges, images.prepare, job.world),
            budget=planner.rule.amount**config.compression.width,
            round_to=planner.round_to,
            seed=config.seed,
            world=job.world,
        )
    job.state.kept, job.state.narrow = found.kept, found.network
    job.report.say(format_widths(found.kept, found.macs / job.dense_survey.macs, found.loss))
    job.planner.check()
