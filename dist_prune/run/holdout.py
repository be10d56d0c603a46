"""Images held out, what networks lose on them, and points between two sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_prune.correction.calibration import decode, divergences, holdout_logits, mean_loss
from dist_prune.distributed.world import World
from dist_prune.network.sites import evaluating
from dist_prune.run.job import Job, unlabelled_stream
from dist_prune.utils.paired import is_clearly_positive, sums_of

CHANCE = 0.05  # that weights are preferred which are no better


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
