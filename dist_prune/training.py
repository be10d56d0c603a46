"""A job's network in training: epochs, curves, a checkpoint after each, and coming back to it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from dist_prune import checkpoint
from dist_prune.config import TrainingConfig, TuningConfig
from dist_prune.data import Stream, training_stream
from dist_prune.evaluate import Metrics
from dist_prune.finetune import Trainer, steps_of, taught, told
from dist_prune.flags import ConfigError
from dist_prune.job import Job
from dist_prune.ranks import Plan


def train(
    job: Job,
    model: nn.Module,
    settings: TrainingConfig,
    group: str,
    keep: Plan | None = None,
    resumed: dict[str, Any] | None = None,
) -> None:
    """Train `model` in place; with a plan to `keep`, leave a checkpoint after every epoch."""
    images, split = job.config.images, job.dataset.train
    stream = training_stream(
        split, images.image, job.world, settings.batch_size, images.threads, job.config.seed, images.augment
    )
    teacher = settings.distillation if isinstance(settings, TuningConfig) else None
    loss = taught(job.dense, teacher, settings) if teacher else None
    trainer = Trainer(model, settings, settings.epochs * steps_of(settings, len(stream)), job.world, loss)
    done = restore(trainer, stream, resumed)
    job.report.say(told(settings, len(stream), job.world.size, teacher))
    for epoch in range(done, settings.epochs):
        for progress in trainer.epoch(stream):
            job.report.scalars(group, progress.step, {**asdict(progress), "step": None, "steps": None})
        job.report.say(
            f"   epoch {epoch + 1}/{settings.epochs}: loss {progress.loss:.4f}, "
            f"{progress.images_per_second:.0f} images/s"
        )
        if keep is not None:
            save_progress(job, keep, trainer, stream, epoch + 1)
    trainer.finish()


def save_progress(job: Job, plan: Plan, trainer: Trainer, stream: Stream, epoch: int) -> None:
    """A checkpoint from which `--resume` continues at the next epoch."""
    streams = job.world.gather(stream.state())
    state = {
        "epoch": epoch,
        "world_size": job.world.size,
        "plan": plan.to_json(),
        "model": trainer.model.state_dict(),
        "trainer": trainer.state(),
        "streams": streams,
        "metrics": {stage: asdict(m) for stage, m in job.metrics.items()},
        "seconds": job.report.seconds,
    }
    job.world.from_first(lambda: str(checkpoint.save(job.folder / "checkpoints", epoch, state)))


def resume_point(job: Job) -> dict[str, Any] | None:
    """The newest intact checkpoint of the run to resume, if there is one.

    Raises:
        ConfigError: it was left by another number of ranks.
    """
    if not job.config.resume:
        return None
    state, problems = checkpoint.newest(job.folder / "checkpoints")
    for problem in problems:
        job.report.say(f"warning: {problem}; using the checkpoint before")
    if state is None:
        job.report.say("no checkpoint yet: starting from the beginning")
        return None
    if state["world_size"] != job.world.size:
        raise ConfigError(
            f"--resume: the run was left by {state['world_size']} ranks, these are {job.world.size}; "
            f"start it with {state['world_size']}"
        )
    job.metrics.update({stage: Metrics(**m) for stage, m in state["metrics"].items()})
    job.report.seconds.update(state["seconds"])
    job.report.rewind("train", state["trainer"]["step"])
    job.report.say(f"resuming after epoch {state['epoch']}")
    return state


def restore(trainer: Trainer, stream: Stream, resumed: dict[str, Any] | None) -> int:
    """Put trainer and stream where the checkpoint left them; the epochs already done."""
    if resumed is None:
        return 0
    trainer.restore(resumed["trainer"])
    stream.restore(resumed["streams"][stream.world.rank])
    return int(resumed["epoch"])
