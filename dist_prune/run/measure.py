"""Stages that evaluate: networks on the validation images, sites alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from dist_prune.artifacts.answers import right
from dist_prune.data.loader import normalise
from dist_prune.data.share import Unsharded
from dist_prune.distributed.fingerprint import fingerprint
from dist_prune.factorization.spectra import unit_of
from dist_prune.run.job import (
    STAGES,
    Job,
    decoded_alike,
    statistics_split,
    watched_validation,
)
from dist_prune.training import sensitivity
from dist_prune.training.evaluate import Metrics, Predictions, predict, score

SITE_IMAGES = 512  # on which sites are measured alone


def evaluate_dense(job: Job) -> None:
    """The dense network on the validation images: figures, and logits for the divergence."""
    job.world.require_same("parameters (dense)", fingerprint(job.dense))
    with job.report.phase("baseline"):
        metrics = score_and_record(job, "dense", job.reference)
    log_metrics(job, "dense", metrics)


def evaluate(stage: str) -> Callable[[Job], None]:
    """The compressed network on the validation images, reported as `stage`; all ranks hold the same network."""

    def measure(job: Job) -> None:
        job.world.require_same(f"parameters ({stage})", fingerprint(job.state.compressed))
        with job.report.phase(f"evaluate {stage}"):
            found = predict(job.state.compressed, watched_validation(job))
            metrics = score_and_record(job, stage, found, job.reference)
        log_metrics(job, stage, metrics)

    return measure


def score_and_record(job: Job, stage: str, found: Predictions, dense: Predictions | None = None) -> Metrics:
    """Metrics over all ranks; which images were got right is kept."""
    images = len(job.dataset.val)
    metrics = score(found, images, job.world, dense)
    job.state.right[stage] = right(found, images, job.world)
    return metrics


def log_metrics(job: Job, stage: str, metrics: Metrics) -> None:
    """Keep the figures: one line for people, one point on the curves."""
    job.state.metrics[stage] = metrics
    step, dense = STAGES.index(stage), job.state.metrics["dense"].top1
    job.report.scalars("val", step, metrics.figures)
    job.report.scalars("top1", step, {"dense": dense, stage: metrics.top1})
    job.report.flush()
    divergence = "" if metrics.kl is None else f", KL to dense {metrics.kl:.4f}"
    if (
        stage == "projected"
        and unit_of(job.config.compression.basis) == "KL"
        and job.state.chosen.loss is not None
    ):
        divergence += f", predicted {job.state.chosen.loss:.4f}"
    job.report.say(
        f"   {stage}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}{divergence}"
    )


def measure_sites(job: Job) -> None:
    """Sensitivity: what each site loses by itself, next to what was predicted."""
    images, split = job.config.images, statistics_split(job, SITE_IMAGES)
    with job.report.phase("measure sites"):
        everything = Unsharded(job.world.device, job.world.local_rank)
        decoded = list(decoded_alike(job, split, everything).raw())
        losses = sensitivity.measure_sites(
            job.state.source,
            job.state.compressed,
            job.state.chosen,
            lambda: (replace(b, images=normalise(b.images, images.image)) for b in decoded),
            job.world,
            lambda names: job.report.meter.along(names, len(names), unit="layer"),
        )
    unit = unit_of(job.config.compression.basis)
    job.report.say(sensitivity.format_summary(losses, unit))
    path = job.folder / sensitivity.SITES
    job.world.from_first(lambda: sensitivity.save(path, losses, unit, len(split)))
    job.report.predictions([asdict(loss) for loss in losses], unit)
