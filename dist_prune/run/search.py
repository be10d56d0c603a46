"""The stage that looks for a better plan of the budget than predictions give: candidates are tried."""

from __future__ import annotations

from dist_prune.correction.calibration import decode
from dist_prune.data.views import views_of
from dist_prune.factorization.spectra import UNITS
from dist_prune.run.checkpointing import ResumePoint
from dist_prune.run.compress import directions_with_losses, load_statistics
from dist_prune.run.job import Job, unlabelled_stream
from dist_prune.search.explore import SearchState, chosen, finite, format_summary, search
from dist_prune.search.trial import Ground, gather_images, trial_on


def search_plans(job: Job) -> None:
    """Try candidates for the budget, one on each rank at a time; the best becomes the plan of the run."""
    config, state = job.config, SearchState()
    if (left := job.checkpoints.resumed()) is not None:
        state.load_state_dict(left.common)
    found = job.state.directions or directions_with_losses(job, load_statistics(job))
    assert found.spectra is not None, "a method without spectra has no budget"
    with job.report.phase("search"):
        images = gather_images(decode(unlabelled_stream(job), views_of(config.correction, config.seed)), job.world)
        ground = Ground(
            dense=job.state.dense,
            source=job.state.source,
            survey=job.everything,
            bases=found.bases,
            nested=found.nested,
            side=config.compression.basis.side,
            kept=job.state.kept,
        )
        settings = config.correction.within(job.world.free_memory())
        trial = trial_on(ground, images, settings, config.seed)
        count = config.compression.search
        shown = job.report.meter.count(count, len(state.candidates), "candidate")
        for complete in search(count, job.planner, found.spectra, trial, config.seed, state, job.world):
            for each in complete:
                least = min(finite(other.loss) for other in state.candidates[: each.number + 1])
                job.report.scalars("search", each.number, {"candidate": each.loss, "best": least})
                shown.step()
            place = f"plan {len(state.losses)}"
            job.checkpoints.close(ResumePoint(place, state.state_dict(), whole=True))
        shown.close()
        best = chosen(state, job.planner, job.world)
    job.state.target, job.state.directions = best.plan, found
    job.report.say(f"   {format_summary(state, best, len(images.measured.pixels), UNITS['kl'])}")
