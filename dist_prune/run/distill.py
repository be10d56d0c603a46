"""Label-free distillation from the dense network, and how far its weights are followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn

from dist_prune.correction.calibration import decode, divergences, holdout_logits, mean_loss
from dist_prune.correction.correct import improves
from dist_prune.data.loader import training_stream
from dist_prune.distributed.world import World
from dist_prune.factorization.project import balance
from dist_prune.network.memory_format import layout_of
from dist_prune.network.sites import evaluating
from dist_prune.reporting.progress import count_images
from dist_prune.run.job import Job, held_out_split, limited, probe, share_bits, unlabelled_stream
from dist_prune.run.state import Weighed
from dist_prune.run.train import Session
from dist_prune.training.cutmix import pasted
from dist_prune.training.distillation_loss import towards
from dist_prune.training.dry_step import reached_alone
from dist_prune.training.trainer import Progress, Trainer
from dist_prune.utils.paired import is_clearly_positive, sums_of

CHANCE = 0.05  # that weights nearer to those before, which are no better, are kept instead of the last
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the weights before to the last ones
CHECKS = 8  # how often the network is measured on images held out
EVERY = 20  # steps from one point of the curves to the next


def distill(job: Job) -> None:
    """Label-free distillation; it is taken back as far as it did harm on images held out."""
    model, state = job.state.compressed, job.state
    with job.report.phase("distillation"):
        holdout = Holdout.of(job)
        if state.undistilled is None:
            balance(model)
            share_bits(job, model)
            state.undistilled = Weighed(holdout.kl(model), weights_of(model))
            job.report.say(f"   held-out KL {state.undistilled.kl:.4f} before")
        train_towards(job, model, holdout)
        follow(job, model, holdout, state.undistilled)
        state.undistilled = None


@dataclass(frozen=True)
class Holdout:
    """This rank's images that nothing is solved from or trained on, and what the dense network answers."""

    answers: list[tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Tensor]
    world: World

    @classmethod
    def of(cls, job: Job) -> Holdout:
        """Of the job's images."""
        images = decode(unlabelled_stream(job))
        with evaluating(job.dense):
            return cls(holdout_logits(job.dense, images), images.prepare, job.world)

    def losses(self, model: nn.Module) -> Tensor:
        """KL of each of this rank's images to the dense network, (images,)."""
        with evaluating(model):
            return divergences(model, self.answers, self.prepare)

    def kl(self, model: nn.Module) -> float:
        """The model's, nats per image, over all ranks."""
        return self.mean(self.losses(model))

    def mean(self, losses: Tensor) -> float:
        """Over the images of all ranks."""
        return mean_loss(losses, self.world)

    def prefers(self, other: Tensor, own: Tensor) -> bool:
        """Whether the other losses of the same images are less than `own`, by more than chance."""
        sums = sums_of(own - other).to(self.world.device)
        self.world.sum_(sums)
        return is_clearly_positive(sums, CHANCE)


@contextmanager
def holding(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """While open, the model has these weights instead of its own."""
    own = weights_of(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def between(one: dict[str, Tensor], other: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The point at this share of the way from one set of weights to the other; integers are the other's."""
    if share == 0:  # whatever the other's are: they may not be finite
        return one
    return {n: torch.lerp(w, other[n], share) if w.is_floating_point() else other[n] for n, w in one.items()}


def follow(job: Job, model: nn.Module, holdout: Holdout, before: Weighed) -> None:
    """Go as far as `best_share` says from the weights before to the last, which the model has."""
    last = weights_of(model)
    share, kls = best_share(model, before, holdout)
    job.report.say("   held-out KL " + ", ".join(f"{kl:.4f} at {at:.0%}" for at, kl in kls.items()))
    if share == 0:
        job.report.warn("distillation brought nothing on images held out: the network is what it was before")
    elif share < 1:
        job.report.say(f"   kept {share:.0%} of the way to the last weights, where it was less")
    model.load_state_dict(between(before.weights, last, share))
    balance(model)
    share_bits(job, model)


def best_share(model: nn.Module, before: Weighed, holdout: Holdout) -> tuple[float, dict[float, float]]:
    """How far to go on the line from the weights before to the model's, and the held-out KL by share of the way.

    All the way, unless its end is no better than the beginning, or another point is better by more than chance: so
    is taken back in part what fits the images of the training too closely, or came from too high a rate (Wortsman
    et al. 2022, https://arxiv.org/abs/2109.01903). No step, 0, where no point is better than the weights before.
    """
    last, losses = weights_of(model), dict[float, Tensor]()
    for share in SHARES:
        with holding(model, between(before.weights, last, share)):
            losses[share] = holdout.losses(model)
    kls = {share: holdout.mean(each) for share, each in losses.items()}
    best = min(SHARES, key=lambda share: kls[share] if math.isfinite(kls[share]) else math.inf)
    if not improves(kls[best], before.kl):
        return 0.0, kls
    wholly = improves(kls[SHARES[0]], before.kl) and not holdout.prefers(losses[best], losses[SHARES[0]])
    return (SHARES[0] if wholly else best), kls


def train_towards(job: Job, model: nn.Module, holdout: Holdout) -> None:
    """Train `model` towards the job's dense network, in place, batch norm frozen."""
    settings, images, seed = job.config.distillation, job.config.images, job.config.seed
    how = replace(
        job.config.tuning,
        batch_size=settings.distill_batch_size,
        optimizer="adamw-relative",
        lr=settings.distill_lr,
        weight_decay=0.0,
        clip=0.0,
        bn="frozen",
        accumulate=1,
        ema=0.0,
        compile=False,  # hooks read the blocks' outputs
    )
    unseen = (job.unlabelled or job.dataset.train).without(held_out_split(job))
    split = limited(unseen, settings.distill_images, seed)
    # Another seed than fine-tuning's: it is to see other crops.
    stream = training_stream(
        split, images.image, job.world, how.batch_size, images.threads, seed + 1, images.augment, layout_of(model)
    )
    noise = probe(job.config, job.world, 2)
    with (
        towards(job.dense, model, settings.distill_features, settings.distill_temperature, how.bf16) as loss,
        reached_alone(model, noise, how, job.world, loss),
    ):
        trainer = Trainer(model, how, settings.distill_steps, job.world, loss)
        session = Session(job, trainer, stream)
        session.resume()
        endless = job.report.meter.along(
            chain.from_iterable(repeat(stream)), trainer.steps, trainer.step, images=count_images
        )
        watched = job.checkpoints.watched(endless, lambda: session.in_epoch(0))
        batches = islice(watched, settings.distill_steps - trainer.step)
        mixtures = pasted(batches, settings.distill_cutmix, seed, job.world.rank, trainer.step)
        for progress in trainer.epoch(mixtures, EVERY):
            checked = is_checked(progress.step, progress.steps)
            kl = look(job, model, holdout, progress) if checked else None
            point = {**asdict(progress), "step": None, "steps": None, "held_out_kl": kl}
            job.report.scalars("distill", progress.step, point)
    job.report.say(f"   {settings.distill_steps} steps on {len(split)} images")


def look(job: Job, model: nn.Module, holdout: Holdout, progress: Progress) -> float:
    """KL on images held out."""
    kl = holdout.kl(model)
    job.report.say(f"   step {progress.step}: loss {progress.loss:.4f}, held-out KL {kl:.4f}")
    return kl


def is_checked(step: int, steps: int) -> bool:
    """Whether the network is measured after this step: eight times, evenly, at the last step, too."""
    part = steps / CHECKS
    return step == steps or int(step / part) > int((step - EVERY) / part)
