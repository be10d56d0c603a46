"""Label-free distillation from the dense network, and how far its weights are followed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn

from dist_prune.config.run import Run
from dist_prune.config.training import TuningConfig
from dist_prune.correction.correct import improves
from dist_prune.data.dataset import Split
from dist_prune.data.loader import Stream, training_stream
from dist_prune.factorization.project import balance
from dist_prune.network.memory_format import layout_of
from dist_prune.reporting.progress import count_images
from dist_prune.run.holdout import Holdout, between, holding, weights_of
from dist_prune.run.job import Job, held_out_split, limited, probe, share_bits
from dist_prune.run.state import Undistilled
from dist_prune.run.train import Session
from dist_prune.training.cutmix import pasted
from dist_prune.training.distillation_loss import towards
from dist_prune.training.dry_step import reached_alone
from dist_prune.training.trainer import Loss, Progress, Trainer, TrainingError

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the weights before to the last ones
CHECKS = 8  # how often the network is measured on images held out
EVERY = 20  # steps from one point of the curves to the next
FIRST_RATE = 0.01  # where none is given; a third of it, and so on, where it does harm
LEAST_RATE = 1e-5
HARM = 1.5  # times the held-out KL before is too much at the beginning,
MENDED = 0.75  # and after this share of the steps more than once


def distill(job: Job) -> None:
    """Label-free distillation; it is taken back as far as it did harm on images held out."""
    model, state = job.state.compressed, job.state
    with job.report.phase("distillation"):
        holdout = Holdout.of(job)
        if state.undistilled is None:
            balance(model)
            share_bits(job, model)
            rate = job.config.distillation.distill_lr or FIRST_RATE
            state.undistilled = Undistilled(holdout.kl(model), weights_of(model), rate)
            job.report.say(f"   held-out KL {state.undistilled.kl:.4f} before")
        before = train_towards(job, model, holdout, state.undistilled)
        follow(job, model, holdout, before)
        state.undistilled = None


def follow(job: Job, model: nn.Module, holdout: Holdout, before: Undistilled) -> None:
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


def best_share(model: nn.Module, before: Undistilled, holdout: Holdout) -> tuple[float, dict[float, float]]:
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


def train_towards(job: Job, model: nn.Module, holdout: Holdout, before: Undistilled) -> Undistilled:
    """Train `model` towards the job's dense network, in place, again at lower rates where one does harm."""
    settings = job.config.distillation
    how, noise = training_of(job.config, before.lr), probe(job.config, job.world, 2)
    with (
        towards(job.dense, model, settings.distill_features, settings.distill_temperature, how.bf16) as loss,
        reached_alone(model, noise, how, job.world, loss),
    ):
        while harm := attempt(job, model, holdout, before, loss):
            model.load_state_dict(before.weights)
            before = job.state.undistilled = before.slower(harm.step)
            job.report.say(f"   {harm.reason}: from the beginning again, at a rate of {before.lr:.2g}")
    return before


@dataclass(frozen=True)
class Harm:
    """Why a rate is too high, and after how many steps that was known."""

    reason: str
    step: int


def attempt(job: Job, model: nn.Module, holdout: Holdout, before: Undistilled, loss: Loss) -> Harm | None:
    """Train at the present rate; where the user gave none and this one does harm, stop early and say which."""
    settings, split = job.config.distillation, images_of(job)
    trainer = Trainer(model, training_of(job.config, before.lr), settings.distill_steps, job.world, loss)
    session = Session(job, trainer, opened(job, split, layout_of(model)))
    session.resume()
    endless = chain.from_iterable(repeat(session.stream))
    shown = job.report.meter.along(endless, trainer.steps, trainer.step, images=count_images)
    watched = job.checkpoints.watched(shown, lambda: session.in_epoch(0))
    batches = islice(watched, trainer.steps - trainer.step)
    mixtures = pasted(batches, settings.distill_cutmix, job.config.seed, job.world.rank, trainer.step)
    lowers = not settings.distill_lr and before.lr > LEAST_RATE
    looks = lowers and before.taken_back < settings.distill_steps  # where nothing is to be gained, all do harm
    try:
        for progress in trainer.epoch(mixtures, EVERY):
            checked = is_checked(progress.step, progress.steps)
            kl = look(job, model, holdout, progress) if checked else None
            point = {**asdict(progress), "step": None, "steps": None, "held_out_kl": kl}
            job.report.scalars("distill", before.taken_back + progress.step, point)
            most = bearable(progress.step / progress.steps) * before.kl
            if looks and kl is not None and not kl < most:
                return Harm(f"held-out KL {kl:.4f}, more than {most:.4f}", progress.step)
    except TrainingError as error:
        if not lowers:
            raise TrainingError(f"{error}; of distillation, the rate is --distill-lr") from error
        return Harm(str(error), trainer.step)
    job.report.say(f"   {settings.distill_steps} steps on {len(split)} images")
    return None


def training_of(config: Run, rate: float) -> TuningConfig:
    """How the network is trained at this rate: batch norm stays as it is."""
    return replace(
        config.tuning,
        batch_size=config.distillation.distill_batch_size,
        optimizer="adamw-relative",
        lr=rate,
        weight_decay=0.0,
        clip=0.0,
        bn="frozen",
        accumulate=1,
        ema=0.0,
        compile=False,  # hooks read the blocks' outputs
    )


def images_of(job: Job) -> Split:
    """What is trained on: none of the images held out."""
    unseen = (job.unlabelled or job.dataset.train).without(held_out_split(job))
    return limited(unseen, job.config.distillation.distill_images, job.config.seed)


def opened(job: Job, split: Split, layout: torch.memory_format) -> Stream:
    """These images from the beginning, with other crops than fine-tuning sees."""
    images, batch = job.config.images, job.config.distillation.distill_batch_size
    seed = job.config.seed + 1
    return training_stream(split, images.image, job.world, batch, images.threads, seed, images.augment, layout)


def look(job: Job, model: nn.Module, holdout: Holdout, progress: Progress) -> float:
    """KL on images held out."""
    kl = holdout.kl(model)
    job.report.say(f"   step {progress.step}: loss {progress.loss:.4f}, held-out KL {kl:.4f}")
    return kl


def is_checked(step: int, steps: int) -> bool:
    """Whether the network is measured after this step: eight times, evenly, at the last step, too."""
    part = steps / CHECKS
    return step == steps or int(step / part) > int((step - EVERY) / part)


def bearable(done: float) -> float:
    """Times the KL before, that it may be after this share of the steps.

    Steps of AdamW are as long at the beginning as later: at the rates that are best in the end little is gained at
    first, and something lost.
    """
    return max(HARM - (HARM - 1) * done / MENDED, 1.0)
