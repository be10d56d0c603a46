"""A step of training without consequences: can a network be trained so, and which parameters does the loss reach?

What it does not reach (auxiliary heads, probes, projectors left over) stays out of training: DDP waits for the
gradient of every parameter that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_prune.config.flags import ConfigError
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.network.replacing import with_replaced
from dist_prune.training.trainer import Loss, cross_entropy, freeze_norms

SHOWN = 4  # names in a message


def unreached(
    model: nn.Module, images: Tensor, settings: TrainingConfig, loss: Loss | None = None
) -> tuple[str, ...]:
    """Names of the parameters that get no gradient, though they want one.

    Args:
        model: left as it was, counters of its own included: a copy makes the step.
        images: (N, 3, H, W) on its device; two are enough, and one is what shows that batch norm needs two.
        settings: of the training.
        loss: what is trained for; cross-entropy if none is given.

    Raises:
        ConfigError: in training mode the network's forward, or its backward, fails.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    batch = Batch(images, labels, labels)
    tried = with_replaced(model)
    nn.Module.train(tried)
    tried.zero_grad(set_to_none=True)
    if settings.bn == "frozen":
        freeze_norms(tried)
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
        try:
            logits = logits_of(tried(images)).float()
            value = loss(logits, batch) if loss else cross_entropy(logits, batch, settings.label_smoothing)
            torch.autograd.backward(value)
        except Exception as error:  # of the network's own code
            raise ConfigError(_why_not(error, len(images))) from error
    wanting = [(name, p) for name, p in tried.named_parameters() if p.requires_grad]
    return tuple(name for name, parameter in wanting if parameter.grad is None)


def _why_not(error: Exception, images: int) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    if images == 1 and "more than 1 value per channel" in text:
        return f"batch norm cannot average over one value: give --batch-size 2 or more, or --bn frozen ({text})"
    return f"in training mode the network fails, which fine-tuning needs: {type(error).__name__}: {text}"


@contextmanager
def reached_alone(
    model: nn.Module, images: Tensor, settings: TrainingConfig, world: World, loss: Loss | None = None
) -> Iterator[None]:
    """While open, parameters that the loss does not reach want no gradient, on all ranks alike.

    Args:
        model: as many parameters as before are trainable after.
        images: see `unreached`; the same on all ranks.
        settings: of the training.
        world: all its ranks leave out what the first one finds.
        loss: see `unreached`.
    """
    names = world.from_first(lambda: unreached(model, images, settings, loss))
    left_out = [model.get_parameter(name) for name in names]
    for parameter in left_out:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in left_out:
            parameter.requires_grad_(True)


def format_unreached(names: tuple[str, ...]) -> str:
    """A line for the log; empty if there are none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    shown = f"{', '.join(names[:SHOWN])}{more}"
    return f"the loss does not reach these parameters, which stay as they are: {shown}" if names else ""
