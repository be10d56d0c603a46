"""The stage that takes channels out of the network, before what is left of its layers is factored."""

from __future__ import annotations

import math

from dist_prune.correction.calibration import decode
from dist_prune.correction.channels import channels_of
from dist_prune.data.views import views_of
from dist_prune.run.compress import collect_statistics, directions_with_losses, load_statistics
from dist_prune.run.job import Job, probe, unlabelled_stream
from dist_prune.width.choose import choose_widths, costs_within, removable_groups, without
from dist_prune.width.listing import format_widths, note_on_staying


def remove_channels(job: Job) -> None:
    """Choose widths, in closed form from the calibration images, and narrow the network."""
    config, planner = job.config, job.dense_planner
    possible = removable_groups(job.dense, job.survey.sites, probe(config, job.world, 2))
    if note := note_on_staying(possible):
        job.report.say(note)
    gathered = load_statistics(job)
    found = directions_with_losses(job, gathered)
    with job.report.phase("width"):
        images = decode(unlabelled_stream(job), views_of(config.correction, config.seed))
        channels = channels_of(job.dense, possible.groups, images, gathered.curvature, config.seed, job.world)
        costs = costs_within(job.dense, possible.groups, planner, found.spectra, probe(config, job.world, 1))
        kept = choose_widths(channels, costs, planner.rule.amount, planner.round_to, job.world)
    if not kept:
        job.state.directions = found
        job.report.say("no channels are removed: lower ranks lose less")
        return
    job.state.kept, job.state.dense = kept, channels.model
    job.state.narrow = without(channels, kept, job.world)
    lost = math.fsum(each.loss or 0.0 for each in kept)
    job.report.say(format_widths(kept, job.everything.macs / job.dense_survey.macs, lost))
    job.planner.check()


def collect_of_the_rest(job: Job) -> None:
    """Statistics of the network that is left, if channels were removed."""
    if job.state.narrow is not None:
        collect_statistics(job)
