"""A job's network in training: epochs, curves, a checkpoint after each, and coming back to it."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import chain, islice, repeat
from typing import Any

from torch import Tensor, nn

from dist_prune import checkpoint
from dist_prune.config import ConfigError, TrainingConfig
from dist_prune.data import Batch, Stream, training_stream
from dist_prune.evaluate import Metrics
from dist_prune.finetune import Loss, Trainer, scaled_lr
from dist_prune.job import Job, limited
from dist_prune.models import logits_of
from dist_prune.probes import kl
from dist_prune.projection import balance
from dist_prune.ranks import Plan
from dist_prune.sites import evaluating


def distill(job: Job, model: nn.Module) -> None:
    """Label-free training towards the dense network's softmax, in place, batch norm frozen, factors balanced."""
    settings, images = job.config.correction, job.config.images
    how = replace(job.config.tuning, lr=settings.distill_lr, weight_decay=0.0, bn="frozen")
    split = limited(job.dataset.train, settings.distill_images, job.config.seed)
    seed = job.config.seed + 1
    stream = training_stream(split, images.image, job.world, how.batch_size, images.threads, seed, images.augment)
    balance(model)
    trainer = Trainer(model, how, settings.distill_steps, job.world, towards(job.dense))
    batches = islice(chain.from_iterable(repeat(stream)), settings.distill_steps)
    for progress in trainer.epoch(batches):
        job.report.scalars("distill", progress.step, {**asdict(progress), "step": None, "steps": None})
    job.report.say(f"   {settings.distill_steps} steps on {len(split)} images: KL {progress.loss:.4f}")


def towards(dense: nn.Module) -> Loss:
    """KL(dense ‖ trained), mean over images (Hinton et al. 2015 at temperature 1)."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        with evaluating(dense):
            target = logits_of(dense(batch.images)).float()
        return kl(target, logits).mean()

    return loss


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
    trainer = Trainer(model, settings, settings.epochs * len(stream), job.world)
    done = restore(trainer, stream, resumed)
    size = settings.batch_size * job.world.size
    job.report.say(
        f"   {settings.epochs} epochs of {len(stream)} steps, global batch {size}, peak learning rate "
        f"{scaled_lr(settings, job.world.size):.4g} ({settings.lr} per 256 images)"
    )
    for epoch in range(done, settings.epochs):
        for progress in trainer.epoch(stream):
            job.report.scalars(group, progress.step, {**asdict(progress), "step": None, "steps": None})
        job.report.say(
            f"   epoch {epoch + 1}/{settings.epochs}: loss {progress.loss:.4f}, "
            f"{progress.images_per_second:.0f} images/s"
        )
        if keep is not None:
            save_progress(job, keep, trainer, stream, epoch + 1)


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
