"""Training in lockstep: SGD with momentum, warm-up and cosine decay, one generator of progress per epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.config import TrainingConfig
from dist_prune.data import Batch
from dist_prune.models import logits_of
from dist_prune.world import World

Loss = Callable[[Tensor, Batch], Tensor]  # float32 logits and their batch → a scalar


class TrainingError(RuntimeError):
    """Training that went wrong beyond repair."""


@dataclass(frozen=True)
class Progress:
    """Since the last progress: `loss` the mean over this rank's images, `images_per_second` over all ranks."""

    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float


class Trainer:
    """A model being trained on all ranks, and everything needed to continue later."""

    def __init__(
        self, model: nn.Module, settings: TrainingConfig, steps: int, world: World, loss: Loss | None = None
    ) -> None:
        """Prepare to train `model`, in place, for `steps` steps; by cross-entropy if no `loss` is given."""
        self.settings = settings
        self.world = world
        self.model = model
        if settings.channels_last:
            _lay_out_channels_last(model)
        self.replica = world.replicate(self.model)
        self.steps = steps
        self.loss = loss or (lambda logits, batch: cross_entropy(logits, batch, settings.label_smoothing))
        self.step = 0
        self.optimizer = torch.optim.SGD(
            decayed(self.model, settings.weight_decay),
            lr=scaled_lr(settings, world.size),
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        warmup = settings.warmup * self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, self.steps, warmup)
        )

    def epoch(self, batches: Iterable[Batch], every: int = 20) -> Iterator[Progress]:
        """Train on the batches; yields every `every` steps and at the end.

        The loss stays on the device between two reports, so the host never waits for it in a step.

        Raises:
            TrainingError: the loss is no longer a number.
        """
        nn.Module.train(self.replica)
        if self.settings.bn == "frozen":
            _freeze_norms(self.model)
        window = _Window(self.world)
        for batch in batches:
            window.add(self._update(batch), len(batch.labels))
            self.step += 1
            if self.step % every == 0:
                yield window.close(self)
                window = _Window(self.world)
        if window.steps:
            yield window.close(self)
        self._average_buffers()

    def _update(self, batch: Batch) -> Tensor:
        """One step; the loss, on the device."""
        images = batch.images
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.bf16):
            logits = logits_of(self.replica(images))
        loss = self.loss(logits.float(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def _average_buffers(self) -> None:
        """Batch norm sees only its own rank's images; the mean over ranks is the better estimate, and common."""
        running = [b for b in self.model.buffers() if b.is_floating_point()]
        self.world.sum_(*running)
        for buffer in running:
            buffer.div_(self.world.size)

    def state(self) -> dict[str, Any]:
        """Plain types and tensors, enough to continue at the next epoch."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross-entropy to the labels, mixed with the uniform distribution."""
    return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)


def _freeze_norms(model: nn.Module) -> None:
    """Batch norm keeps its running statistics; its scale and shift are trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class _Window:
    """Loss and time since the last report."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loss = torch.zeros((), device=world.device)
        self.images = self.steps = 0
        self.began = time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        self.loss += loss
        self.images += images
        self.steps += 1

    def close(self, trainer: Trainer) -> Progress:
        loss = self.loss.item() / self.steps
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in steps {trainer.step - self.steps + 1} to {trainer.step}; "
                f"try a lower --lr (it is {trainer.settings.lr}) or a longer --warmup"
            )
        rate = self.images * self.world.size / (time.perf_counter() - self.began)
        return Progress(trainer.step, trainer.steps, loss, float(trainer.scheduler.get_last_lr()[0]), rate)


def scaled_lr(settings: TrainingConfig, ranks: int) -> float:
    """Peak learning rate, linear in the global batch (Goyal et al. 2017)."""
    return settings.lr * settings.batch_size * ranks / 256


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a line up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices and kernels decay, biases and normalisation do not."""
    wide = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    flat = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]


def _lay_out_channels_last(model: nn.Module) -> None:
    """NHWC for every kernel, in place; by copy: `contiguous` leaves 1×1 kernels in strides that DDP warns of."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            laid_out = torch.empty_like(parameter.data, memory_format=torch.channels_last)
            parameter.data = laid_out.copy_(parameter.data)
