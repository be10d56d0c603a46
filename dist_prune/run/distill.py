"""Label-free distillation from the dense network: KL of the softmax, and errors of the blocks' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn

from dist_prune.correction.correct import decode, divergence, holdout_logits, improves
from dist_prune.data.loader import Batch, training_stream
from dist_prune.factorization.project import balance
from dist_prune.network.factored import Factored
from dist_prune.network.memory_format import layout_of
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating
from dist_prune.reporting.progress import count_images
from dist_prune.run.job import Job, held_out_split, limited, probe, share_bits, unlabelled_stream
from dist_prune.run.state import Weighed
from dist_prune.run.train import Session
from dist_prune.training.cutmix import pasted
from dist_prune.training.dry_step import reached_alone
from dist_prune.training.trainer import Loss, Progress, Trainer, softened_kl

CHECKS = 8  # how often the network is measured on images held out
EVERY = 20  # steps from one point of the curves to the next
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def distill(job: Job) -> None:
    """Label-free distillation; what stays are the weights nearest to the dense network on images held out."""
    model, state = job.state.compressed, job.state
    with job.report.phase("distillation"):
        holdout = Holdout(job)
        if state.best is None:
            balance(model)
            share_bits(job, model)
            state.best = holdout.measured(model, 0)
            job.report.say(f"   held-out KL {state.best.kl:.4f} before")
        train_towards(job, model, holdout)
        keep_best(job, model, state.best)
        state.best = None


class Holdout:
    """The images that nothing is solved from or trained on, and what the dense network answers."""

    def __init__(self, job: Job) -> None:
        self.world = job.world
        images = decode(unlabelled_stream(job), mirrored=False)
        self.prepare = images.prepare
        with evaluating(job.dense):
            self.answers = holdout_logits(job.dense, images)

    def measured(self, model: nn.Module, step: int) -> Weighed:
        """The model's weights after so many steps, and their KL."""
        with evaluating(model):
            found = divergence(model, self.answers, self.prepare, self.world)
        return Weighed(step, found, {name: value.clone() for name, value in model.state_dict().items()})


def keep_best(job: Job, model: nn.Module, best: Weighed) -> None:
    """Leave in the model the weights that lost least on images held out, and say which these are."""
    steps = job.config.distillation.distill_steps
    model.load_state_dict(best.weights)
    if best.step == 0:
        job.report.warn("distillation brought nothing on images held out: the network is what it was before")
    elif best.step < steps:
        job.report.say(f"   kept after {best.step} steps, where the held-out KL was least: {best.kl:.4f}")
    balance(model)
    share_bits(job, model)


def train_towards(job: Job, model: nn.Module, holdout: Holdout) -> None:
    """Train `model` towards the job's dense network, in place, batch norm frozen; the state keeps the best."""
    settings, images, seed = job.config.distillation, job.config.images, job.config.seed
    how = replace(
        job.config.tuning,
        batch_size=settings.distill_batch_size,
        optimizer="sgd",
        lr=settings.distill_lr,
        weight_decay=0.0,
        clip=1.0,  # gradients of batch norm that is frozen have no natural scale: without it, some runs diverged
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
        towards(job.dense, model, settings.distill_features, settings.distill_temperature) as loss,
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
    """KL on images held out; where it is the least so far, the state keeps the weights."""
    found = holdout.measured(model, progress.step)
    job.report.say(f"   step {found.step}: loss {progress.loss:.4f}, held-out KL {found.kl:.4f}")
    assert job.state.best is not None
    if improves(found.kl, job.state.best.kl):
        job.state.best = found
    return found.kl


def is_checked(step: int, steps: int) -> bool:
    """Whether the network is measured after this step: eight times, evenly, at the last step, too."""
    part = steps / CHECKS
    return step == steps or int(step / part) > int((step - EVERY) / part)


@contextmanager
def towards(dense: nn.Module, trained: nn.Module, features: float, temperature: float) -> Iterator[Loss]:
    """While open, lend the loss for `trained`'s last forward pass.

    T²·KL(dense ‖ trained) at temperature T, plus `features` times the mean over the blocks of ‖f̂ − f‖²/‖f‖², f
    what the dense block gives (FitNets, Romero et al. 2015, no regressors).
    """
    names = matched(dense, trained) if features else ()
    with recorded(dense, names) as wanted, recorded(trained, names) as given:

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            with evaluating(dense):
                target = logits_of(dense(batch.images)).float()
            divergence = softened_kl(target, logits, temperature)
            alike = [n for n in names if n in wanted and given[n].shape == wanted[n].shape]
            errors = [relative_error(given[name], wanted[name]) for name in alike]
            return divergence + features * torch.stack(errors).mean() if errors else divergence

        yield loss


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """‖given − wanted‖²/‖wanted‖² over the whole batch, in float32."""
    given, wanted = given.float(), wanted.float()
    return (given - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def matched(dense: nn.Module, trained: nn.Module) -> tuple[str, ...]:
    """The blocks whose outputs are compared; the factored layers where the network is not made of blocks."""
    pairs = [name for name, module in trained.named_modules() if isinstance(module, Factored)]
    return tuple(blocks(dense)) or tuple(pairs)


def blocks(model: nn.Module) -> Iterator[str]:
    """The outermost elements of `Sequential`s and lists that have parts of their own, parameters among them."""

    def search(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            is_part = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if is_part and type(module) in _CONTAINERS and type(child) not in _CONTAINERS:
                yield prefix + name
            else:
                yield from search(child, f"{prefix}{name}.")

    return search(model, "")


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves the named modules' outputs here, as far as they are tensors."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(record(name)).remove)
        yield outputs
