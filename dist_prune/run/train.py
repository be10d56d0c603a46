"""A job's network in training: epochs, curves, and where it can be stopped and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from dist_prune.config.flags import is_from_file
from dist_prune.config.run import Run, to_dict
from dist_prune.config.training import TrainingConfig, TuningConfig
from dist_prune.data.dataset import Split
from dist_prune.data.loader import Batch, Stream, training_stream
from dist_prune.factorization.project import balance
from dist_prune.network import models, user_code
from dist_prune.network.attention import opened_as, opened_in
from dist_prune.network.memory_format import layout_of
from dist_prune.run.checkpointing import ResumePoint
from dist_prune.run.job import Job, probe, share_bits
from dist_prune.training.distillation_loss import distillation_loss
from dist_prune.training.dry_step import reached_alone
from dist_prune.training.trainer import Trainer, TrainingError, format_summary, steps_of
from dist_prune.utils import files


def train(job: Job, model: nn.Module, settings: TrainingConfig, group: str, before: int = 0) -> None:
    """Train `model` in place, or resume training it; a checkpoint is saved after every epoch.

    `before`: how often the run has trained before; images come in another order, curves continue from there.
    """
    images, split, seed = job.config.images, job.dataset.train, job.config.seed + before
    stream = training_stream(
        split, images.image, job.world, settings.batch_size, images.threads, seed, images.augment, layout_of(model)
    )
    teacher = settings.distillation if isinstance(settings, TuningConfig) else None
    loss = distillation_loss(job.dense, teacher, settings) if teacher else None
    with reached_alone(model, probe(job.config, job.world, 2), settings, job.world, loss):
        trainer = Trainer(model, settings, settings.epochs * steps_of(settings, len(stream)), job.world, loss)
        job.report.say(format_summary(settings, len(stream), job.world.size, teacher))
        session = Session(job, trainer, stream)
        for epoch in range(session.resume(), settings.epochs):
            for progress in trainer.epoch(session.batches(settings.epochs, epoch)):
                step = before * trainer.steps + progress.step
                job.report.scalars(group, step, {**asdict(progress), "step": None, "steps": None})
            job.report.say(
                f"   epoch {epoch + 1}/{settings.epochs}: loss {progress.loss:.4f}, "
                f"{progress.images_per_second:.0f} images/s"
            )
            job.checkpoints.close(session.standing(epoch + 1, f"epoch {epoch + 1}", whole=True))
        trainer.finish()


def cached_weights(config: Run, ranks: int, train: Split) -> Path | None:
    """Where weights that a run trains first are kept for other runs; None if they are given."""
    if config.network.weights != "none":
        return None
    settings = [
        config.network,
        config.images,
        config.pretrain,
        config.channels_last,
        config.seed,
        ranks,
        torch.__version__,
    ]
    arch = config.network.arch
    code = list(map(files.checksum, user_code.sources(arch).values())) if is_from_file(arch) else []
    key = [*map(str, map(to_dict, settings)), train.digest(), *code]
    return files.cache_folder() / f"{arch.replace('/', '_')}-{files.name_of(key)}.pt"


def load_dense(job: Job) -> None:
    """Without given weights, train the dense network, or take the one an earlier run trained the same way."""
    network, cached = job.config.network, cached_weights(job.config, job.world.size, job.dataset.train)
    if cached is None:
        return
    if job.world.from_first(lambda: files.is_intact(cached)):
        job.report.say(f"dense weights from {cached}")
        models.fill(job.given, network.arch, network.classes, str(cached))
        _take_over(job)
        return
    job.checkpoints.stage = "pretrain"
    with job.report.phase("pretrain"):
        train(job, job.given, job.config.pretrain, "pretrain")
    job.world.from_first(lambda: files.save_weights(cached, job.given))
    job.report.say(f"dense weights kept in {cached}")
    _take_over(job)


def _take_over(job: Job) -> None:
    """Give the dense network what it does not share with the given one: biases that opened attention joins."""
    if names := opened_in(job.dense):
        job.dense.load_state_dict(opened_as(job.given, names).state_dict())


def tune(job: Job) -> None:
    """Fine-tune the compressed network."""
    balance(job.state.compressed)
    with job.report.phase("finetune"):
        train(job, job.state.compressed, last_tuning(job.config), "train")
    balance(job.state.compressed)
    share_bits(job, job.state.compressed)


def last_tuning(config: Run) -> TuningConfig:
    """After the last round as after the others, unless `--epochs` says how long."""
    rounds = config.iteration.tune_epochs if config.iteration.is_iterative else 0
    return replace(config.tuning, epochs=config.tuning.epochs or rounds)


class Session:
    """Training that can be stopped and resumed after every step."""

    def __init__(self, job: Job, trainer: Trainer, stream: Stream) -> None:
        self.job, self.trainer, self.stream = job, trainer, stream
        self.step = trainer.step
        self.began = 0  # epochs that were done when the stream began: another order than theirs

    def batches(self, epochs: int, epoch: int) -> Iterator[Batch]:
        """Of one epoch; training may be stopped after each step."""
        shown = self.job.report.meter.batches(self.stream, epochs, epoch)
        return self.job.checkpoints.watched(shown, lambda: self.in_epoch(epoch))

    def in_epoch(self, epoch: int) -> ResumePoint | None:
        """After a step, unless it is the last of its epoch, whose end follows; None between two steps."""
        stepped, self.step = self.trainer.step > self.step, self.trainer.step
        if not stepped or self.stream.at_end:
            return None
        return self.standing(epoch, f"epoch {epoch + 1}, step {self.trainer.step}")

    def standing(self, epoch: int, at: str, whole: bool = False) -> ResumePoint:
        """The state that training resumes from, once `epoch` epochs are done.

        Raises:
            TrainingError: the network is not finite: the checkpoint before stays the last.
        """
        model = self.trainer.model
        require_numbers(model, self.trainer.step)
        return ResumePoint(
            at,
            {
                "epoch": epoch,
                "began": self.began,
                "trainer": self.trainer.state_dict(),
                "model": model.state_dict(),
            },
            {"stream": self.stream.state_dict(), "buffers": self.trainer.buffers()},
            whole,
        )

    def resume(self) -> int:
        """Resume where training was stopped, if it was; the epochs already done."""
        left = self.job.checkpoints.resumed()
        if left is None:
            return 0
        epochs, model = int(left.common["epoch"]), self.trainer.model
        self.trainer.rehearse(probe(self.job.config, self.job.world, self.stream.batch_size))
        model.load_state_dict(left.common["model"])
        self.trainer.load_state_dict(left.common["trainer"])
        self.began = int(left.common["began"]) if left.own else epochs
        self.stream.seed += self.began
        if left.own:
            for name, buffer in self.trainer.buffers().items():
                buffer.copy_(left.own["buffers"][name])
            self.stream.load_state_dict(left.own["stream"])
        else:
            self.trainer.reschedule(epochs * steps_of(self.trainer.settings, len(self.stream)))
            self.job.report.say(
                f"   {epochs} epochs are done, every image seen once in each; steps are of "
                f"{self.stream.batch_size} × {self.job.world.size} images now: {self.trainer.step} of "
                f"{self.trainer.steps} done"
            )
        self.step = self.trainer.step
        return epochs


def require_numbers(model: nn.Module, step: int) -> None:
    """Never save a network that is not finite.

    Raises:
        TrainingError: a parameter is NaN or infinite, on any rank: after an all-reduce, on all.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise TrainingError(
                f"{name} is not finite after step {step}: nothing was saved over the last checkpoint; "
                f"try a lower --lr or a longer --warmup"
            )
