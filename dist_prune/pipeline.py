"""The story of a run: load → collect → rank → project → correct → fine-tune → evaluate → save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dist_prune.artifacts import run_directory
from dist_prune.artifacts.answers import right
from dist_prune.artifacts.environment import launch_of
from dist_prune.config.run import CorrectionConfig, Run, require_complete, to_dict
from dist_prune.config.training import TuningConfig
from dist_prune.correction import batchnorm
from dist_prune.correction import correct as correction
from dist_prune.data.loader import Unsharded, evaluation_stream, normalise
from dist_prune.distributed.preemption import Preempted, listening, restarts
from dist_prune.distributed.world import fingerprint, joined
from dist_prune.factorization.project import balance
from dist_prune.factorization.spectra import unit_of
from dist_prune.network import models
from dist_prune.reporting.progress import Course
from dist_prune.reporting.report import Report
from dist_prune.run.checkpointing import ResumePoint
from dist_prune.run.compress import gather, stages
from dist_prune.run.distill import distill
from dist_prune.run.finish import finish, finished
from dist_prune.run.job import (
    STAGES,
    Job,
    Stage,
    opened,
    prepare,
    show_plan,
    statistics_split,
    unlabelled_stream,
    watched_validation,
)
from dist_prune.run.train import train
from dist_prune.training import sensitivity
from dist_prune.training.evaluate import Metrics, Predictions, predict, score
from dist_prune.utils import files

SITE_GROUP = 8  # corrected sites from one checkpoint to the next, at most
SITE_IMAGES = 512  # on which sites are measured alone


class WorkError(RuntimeError):
    """What seemed sound before the work turned out not to be, in the middle of it."""


def run(config: Run) -> Path | None:
    """Do the whole job on all ranks, or what is left of it; the run's directory, or None for a dry run.

    Raises:
        ValueError: in its many kinds: something in the configuration, data or weights cannot be used. Raised
            before long work starts, and on every rank.
        WorkError: the same, found in the middle of the work.
        Preempted: a signal asked to leave; `--resume` goes on from there.
    """
    with listening() as flag, joined(config.device, config.timeout) as world:
        report = Report(speaks=world.is_first, entering=world.enter, ranks=world.size)
        if config.dry_run:
            require_complete(config)
            show_plan(config, world, report)
            return None
        config, folder = world.from_first(lambda: settle(config))
        if config.resume and world.from_first(lambda: finished(folder)):
            report.say(f"{folder} holds a finished run; nothing to resume")
            return folder
        job = prepare(config, world, report, folder, flag)
        try:
            with opened(job), at_work():
                compress_and_tune(job)
        except Preempted as reason:
            preempted = reason  # all ranks leave alike, and in order
        else:
            return folder
    raise preempted


@contextmanager
def at_work() -> Iterator[None]:
    """While open, what cannot be used is no longer a wrong start, but a failure of the work."""
    try:
        yield
    except ValueError as error:
        raise WorkError(str(error)) from error


def settle(config: Run) -> tuple[Run, Path]:
    """The run's directory, and whether it is begun or gone on with. Changes nothing on disk."""
    launch = launch_of(os.environ)
    folder = run_directory.run_directory(config, launch)
    config = run_directory.taken_up(config, folder, launch, restarts(os.environ))
    require_complete(config)
    run_directory.require_free(folder, config)
    run_directory.require_writable(folder)
    return config, folder


def compress_and_tune(job: Job) -> None:
    """The story: each stage once, however often the run is left and taken up again."""
    train_dense(job)
    for name, work in story(job):
        if name not in job.done:
            job.checkpoints.stage = name
            work(job)
            job.done.append(name)
            job.checkpoints.close()
    if job.config.until == "end":
        finish(job)


def story(job: Job) -> Iterator[Stage]:
    """The stages of this run, in order. Names are unique: they say which are done."""
    config = job.config
    if config.until == "statistics":
        yield "statistics", gather
        return
    yield "baseline", baseline
    yield from stages(job)
    yield "projected", measured("projected")
    if config.compression.measure_sites:
        yield "measure sites", measure_alone
    if config.keeps_to_dense:
        yield from corrections(config.correction)
    if config.distillation.distill_steps:
        yield "distillation", distill_further
        yield "distilled", measured("distilled")
    if last_tuning(config).epochs:
        yield "finetune", tune
        yield "tuned", measured("tuned")


def corrections(settings: CorrectionConfig) -> list[Stage]:
    """What comes nearer to the dense network in closed form, and the measurement of all of it."""
    stages: list[Stage] = [("correction", correct)] if settings.correct != "none" else []
    stages += [("batch norm", reestimate)] if settings.reestimate_bn else []
    return [*stages, ("corrected", measured("corrected"))] if stages else []


# ── the work ───────────────────────────────────────────────────────────────────────────────────────────────


def train_dense(job: Job) -> None:
    """Without given weights, train the dense network, or take the one an earlier run trained the same way."""
    config = job.config
    if config.network.weights != "none":
        return
    settings = [
        config.network,
        config.images,
        config.pretrain,
        config.channels_last,
        config.seed,
        job.world.size,
        torch.__version__,
    ]
    source = Path(config.network.arch.partition(":")[0])  # where the architecture is a file of the user's own
    code = files.checksum(source) if source.is_file() else ""
    key = [*map(str, map(to_dict, settings)), job.dataset.train.digest(), code]
    cached = files.cache_folder() / f"{config.network.arch.replace('/', '_')}-{files.name_of(key)}.pt"
    if job.world.from_first(lambda: files.is_intact(cached)):
        job.report.say(f"dense weights from {cached}")
        job.dense.load_state_dict(models.read_weights(config.network.arch, config.network.classes, str(cached)))
        return
    job.checkpoints.stage = "pretrain"
    with job.report.phase("pretrain"):
        train(job, job.dense, config.pretrain, "pretrain")
    job.world.from_first(lambda: files.save_weights(cached, job.dense))
    job.report.say(f"dense weights kept in {cached}")


def baseline(job: Job) -> None:
    """The dense network on the validation images: figures, and logits for the divergence."""
    job.world.require_same("parameters (dense)", fingerprint(job.dense))
    with job.report.phase("baseline"):
        metrics = evaluate_and_record(job, "dense", job.reference)
    log_metrics(job, "dense", metrics)


def measured(stage: str) -> Callable[[Job], None]:
    """The compressed network on the validation images, told as `stage`; all ranks must hold the same network."""

    def measure(job: Job) -> None:
        job.world.require_same(f"parameters ({stage})", fingerprint(job.compressed))
        with job.report.phase(f"evaluate {stage}"):
            found = predict(job.compressed, watched_validation(job))
            metrics = evaluate_and_record(job, stage, found, job.reference)
        log_metrics(job, stage, metrics)

    return measure


def evaluate_and_record(job: Job, stage: str, found: Predictions, dense: Predictions | None = None) -> Metrics:
    """Metrics over all ranks; which images were got right is kept."""
    images = len(job.dataset.val)
    metrics = score(found, images, job.world, dense)
    job.right[stage] = right(found, images, job.world)
    return metrics


def log_metrics(job: Job, stage: str, metrics: Metrics) -> None:
    """Keep the figures: one line for people, one point on the curves."""
    job.metrics[stage] = metrics
    step, dense = STAGES.index(stage), job.metrics["dense"].top1
    job.report.scalars("val", step, metrics.figures)
    job.report.scalars("top1", step, {"dense": dense, stage: metrics.top1})
    job.report.flush()
    divergence = "" if metrics.kl is None else f", KL to dense {metrics.kl:.4f}"
    job.report.say(
        f"   {stage}: top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}{divergence}"
    )


def measure_alone(job: Job) -> None:
    """What each site loses by itself, next to what was predicted."""
    images, split = job.config.images, statistics_split(job, SITE_IMAGES)
    with job.report.phase("measure sites"):
        everything = Unsharded(job.world.device, job.world.local_rank)
        stream = evaluation_stream(split, images.image, everything, images.eval_batch_size, images.threads)
        decoded = list(stream.raw())
        losses = sensitivity.measure_sites(
            job.dense,
            job.compressed,
            job.chosen,
            lambda: (replace(b, images=normalise(b.images, images.image)) for b in decoded),
            job.world,
            lambda names: job.report.meter.along(names, len(names), unit="layer"),
        )
    unit = unit_of(job.config.compression.basis)
    job.report.say(sensitivity.format_summary(losses, unit))
    path = job.folder / sensitivity.SITES
    job.world.from_first(lambda: sensitivity.save(path, losses, unit, len(split)))
    job.report.predictions([asdict(loss) for loss in losses], unit)


def correct(job: Job) -> None:
    """Solve the sites again against the dense network, in place."""
    settings, seed = job.config.correction, job.config.seed
    with job.report.phase("correction"):
        images = correction.decode(unlabelled_stream(job), settings.mirrored)
        course = correction.Course()
        if (left := job.checkpoints.resumed()) is not None:
            course.restore(left.common)
        sites = len(correction.solvable(job.compressed, job.everything, settings))
        shown = job.report.meter.course(sites * len(settings.dampings), solved(course), "layer")
        course.pause = lambda course: pause_between_sites(job, course, shown)
        result = correction.correct(
            job.dense, job.compressed, job.everything, images, settings, seed, job.world, course
        )
        shown.close()
    job.report.say(correction.format_summary(result))
    for concern in correction.concerns(result):
        job.report.warn(concern)


def reestimate(job: Job) -> None:
    """Take batch norm's statistics again, in place."""
    with job.report.phase("batch norm"):
        images = correction.decode(unlabelled_stream(job), mirrored=False)
        memory = job.config.correction.calibration_bytes
        result = batchnorm.reestimate(job.dense, job.compressed, images, memory, job.world)
    job.report.say(batchnorm.format_summary(result))


def solved(course: correction.Course) -> int:
    """How many sites, those of earlier trials included."""
    return sum(len(trial.outcomes) for trial in course.trials) + len(course.outcomes)


def pause_between_sites(job: Job, course: correction.Course, shown: Course) -> None:
    """A correction may be left after each site; after some of them a checkpoint is due."""
    number, trial, last = solved(course), len(course.trials) + 1, course.outcomes[-1]
    shown.step()
    job.report.scalars("calibration", len(course.outcomes), {f"trial {trial}": last.tried[last.chosen]})
    standing = ResumePoint(f"site {number} of trial {trial}", course.state())
    if number % SITE_GROUP:
        job.checkpoints.pause(lambda: standing)
    else:
        job.checkpoints.close(standing)


def distill_further(job: Job) -> None:
    """Label-free training."""
    with job.report.phase("distillation"):
        distill(job, job.compressed)


def tune(job: Job) -> None:
    """Fine-tune the compressed network."""
    balance(job.compressed)
    with job.report.phase("finetune"):
        train(job, job.compressed, last_tuning(job.config), "train")


def last_tuning(config: Run) -> TuningConfig:
    """After the last round as after the others, unless `--epochs` says how long."""
    rounds = config.iteration.tune_epochs if config.iteration.is_iterative else 0
    return replace(config.tuning, epochs=config.tuning.epochs or rounds)
