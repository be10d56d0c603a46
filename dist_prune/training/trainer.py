"""Training in lockstep: SGD or AdamW, warm-up and cosine decay, one generator of progress per epoch."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from dist_prune.config.flags import ConfigError, Distillation
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import fingerprint
from dist_prune.distributed.world import World
from dist_prune.network.memory_format import lay_out, layout_of
from dist_prune.network.outputs import logits_of
from dist_prune.training.optimizer import global_batch, optimizer_of, peaks_of, rate_of, scaled_lr, schedule

Loss = Callable[[Tensor, Batch], Tensor]  # float32 logits and their batch → a scalar


class TrainingError(RuntimeError):
    """Training that cannot continue."""


@dataclass(frozen=True)
class Progress:
    """Since the last progress: `loss` the mean of the steps', `images_per_second`; both over all ranks."""

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
        self.layout = layout_of(model)
        lay_out(model, self.layout)  # 1×1 kernels, too
        # Batch norm's running statistics are averaged here, not overwritten by rank 0's as DDP would.
        trained = _synchronised(model) if settings.bn == "sync" else model
        self.replica = world.replicate(trained, broadcast_buffers=False)
        self.forward = torch.compile(self.replica) if settings.compile else self.replica
        self.average = _RunningAverage(model, settings.ema) if settings.ema else None
        self.steps = steps
        self.loss = loss or (lambda logits, batch: cross_entropy(logits, batch, settings.label_smoothing))
        self.step = 0
        self.optimizer = optimizer_of(self.model, settings, world.size)
        warmup = settings.warmup * self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, self.steps, warmup)
        )

    def epoch(self, batches: Iterable[Batch], every: int = 20) -> Iterator[Progress]:
        """Train on the batches, `--accumulate` of them a step, fewer in the last; at the end prove the lockstep.

        Yields after every `every` steps and at the end. Whatever `state` and the model hold then is the same on
        all ranks, and no batch of the next step has been drawn. The losses stay on the device in between, so the
        host never waits for one in a step.

        Raises:
            TrainingError: the loss is no longer a number on some rank.
            RankError: the ranks no longer hold the same parameters and buffers.
        """
        nn.Module.train(self.replica)
        if self.settings.bn == "frozen":
            freeze_norms(self.replica)
        window, source = _Window(self), iter(batches)
        while group := list(islice(source, self.settings.accumulate)):
            window.add(self._update(group), sum(len(batch.labels) for batch in group))
            self.step += 1
            if self.step % every == 0:
                yield window.close()
                window = _Window(self)
        if window.losses:
            yield window.close()
        self.world.require_same(f"parameters and buffers after step {self.step}", fingerprint(self.model))

    def _update(self, group: Sequence[Batch]) -> Tensor:
        """One step; the mean loss of its images, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        images = sum(len(batch.labels) for batch in group)
        losses = [self._backward(batch, len(batch.labels) / images) for batch in group[:-1]]
        losses.append(self._backward(group[-1], len(group[-1].labels) / images, last=True))
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return torch.stack(losses).sum()

    def _backward(self, batch: Batch, share: float, last: bool = False) -> Tensor:
        """Add the gradient of `share` of the batch's loss; the `last` of a step sums it over ranks."""
        batch = replace(batch, images=batch.images.contiguous(memory_format=self.layout))
        with nullcontext() if last else self.replica.no_sync():
            loss = share * self.loss(self._logits(batch.images), batch)
            torch.autograd.backward(loss)
        return loss.detach()

    def _logits(self, images: Tensor) -> Tensor:
        """What the network says of images in its layout, in the precision of the training; float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return logits_of(self.forward(images)).float()

    def settle(self) -> None:
        """Give all ranks the mean of their batch norm's running statistics: each saw only its own images.

        Training does not depend on these, and they are linear in the batches': it does not matter how often.
        """
        if self.settings.bn != "local":
            return
        networks = [self.model] if self.average is None else [self.model, self.average]
        running = [b for network in networks for b in _running_statistics(network)]
        self.world.sum_(*running)
        for buffer in running:
            buffer.div_(self.world.size)

    def finish(self) -> None:
        """Put into the model the weights to evaluate and save: under `--ema` the averaged ones."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, enough to continue from where `epoch` yielded; the model's own not included."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the model and its average: each rank's own between two `settle`s."""
        networks = (
            {"model": self.model} if self.average is None else {"model": self.model, "average": self.average}
        )
        return {f"{kind}.{name}": b for kind, network in networks.items() for name, b in network.named_buffers()}

    def reschedule(self, step: int) -> None:
        """Stand at `step` of this trainer's own schedule, after `restore` from one of other steps."""
        self.step = step
        peaks = peaks_of(self.optimizer, self.settings, self.world.size)
        rates = [peak * factor(step) for peak, factor in zip(peaks, self.scheduler.lr_lambdas, strict=True)]
        self.scheduler.base_lrs, self.scheduler._last_lr, self.scheduler.last_epoch = [*peaks], [*rates], step
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate

    def rehearse(self, images: Tensor) -> None:
        """One step without consequences but for the model's buffers, before a `restore`.

        DDP orders its messages again after the first backward. With three ranks or more sums depend on that, so
        that a resumed run must have done this as the stopped one had. The step is as all others are: in another
        precision or layout it would take more memory, and be compiled once more.
        """
        nn.Module.train(self.replica)
        if self.settings.bn == "frozen":
            freeze_norms(self.replica)
        images = images.contiguous(memory_format=self.layout)
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.autograd.backward(self._logits(images).sum())
        self.optimizer.zero_grad(set_to_none=True)


def require_possible(settings: TrainingConfig, device: torch.device) -> None:
    """Check before long work that this machine supports these settings.

    Raises:
        ConfigError: it cannot; names the flag.
    """
    if settings.bn == "sync" and device.type != "cuda":
        raise ConfigError(
            f"--bn sync: torch.nn.SyncBatchNorm runs on CUDA only, this is {device.type}; use local or frozen"
        )
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    names = (os.environ[variable],) if variable in os.environ else usual
    if settings.compile and not any(map(shutil.which, names)):
        raise ConfigError(
            f"--compile: torch.compile needs a compiler, and {' or '.join(names)} is not there: install one, name "
            f"it in {variable}, or leave the flag out"
        )


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross-entropy to the labels, mixed with the uniform distribution."""
    return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)


def freeze_norms(model: nn.Module) -> None:
    """Batch norm keeps its running statistics; its scale and shift are trained."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _running_statistics(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]


def _synchronised(model: nn.Module) -> nn.Module:
    """The same parameters and buffers in a network whose batch norm looks at all ranks' images."""
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, memo={id(t): t for t in tensors})
    return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(twin))  # type: ignore[no-untyped-call]


class _RunningAverage(AveragedModel):
    """Of all parameters and of batch norm's running statistics, which belong to them; counts are the model's.

    PyTorch's own copies a number to the GPU for each type, which waits for it, and averages counts one by one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move by 1 − decay towards the model, the first time all the way."""
        both = list(zip(*map(_tensors, (self.module, model)), strict=True))
        numbers = [pair for pair in both if pair[0].is_floating_point()]
        counts = [pair for pair in both if not pair[0].is_floating_point()]
        share = 1 - self.decay if self.n_averaged else 1.0
        if numbers:
            torch._foreach_lerp_([own for own, _ in numbers], [new for _, new in numbers], share)
        if counts:
            torch._foreach_copy_([own for own, _ in counts], [new for _, new in counts])
        self.n_averaged += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class _Window:
    """Loss and time since the last report."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.losses: list[Tensor] = []
        self.images = 0
        self.began = time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        self.losses.append(loss)
        self.images += images

    def close(self) -> Progress:
        trainer = self.trainer
        losses = torch.stack(self.losses).tolist()
        bad = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        seen = trainer.world.gather((losses[0 if bad is None else bad], bad, sum(losses), self.images))
        _require_numbers(trainer, len(losses), [(loss, place) for loss, place, _, _ in seen])
        trainer.settle()
        mean = sum(total for _, _, total, _ in seen) / (len(losses) * len(seen))
        rate = sum(images for _, _, _, images in seen) / (time.perf_counter() - self.began)
        return Progress(trainer.step, trainer.steps, mean, rate_of(trainer.optimizer), rate)


def _require_numbers(trainer: Trainer, steps: int, seen: Sequence[tuple[float, int | None]]) -> None:
    """Raise the same error on all ranks if, on any, one of the last `steps` losses is no number.

    `seen` are each rank's first loss that is none, and its place among them (or None).
    """
    bad = [(place, rank, loss) for rank, (loss, place) in enumerate(seen) if place is not None]
    if bad:
        place, rank, loss = min(bad)
        raise TrainingError(
            f"the loss became {loss} on rank {rank} in step {trainer.step - steps + place + 1}; "
            f"try a lower --lr (it is {trainer.settings.lr}), a longer --warmup, or --clip"
        )


def steps_of(settings: TrainingConfig, batches: int) -> int:
    """Steps of an epoch of so many batches per rank."""
    return math.ceil(batches / settings.accumulate)


def format_summary(settings: TrainingConfig, batches: int, ranks: int, teacher: Distillation | None) -> str:
    """The settings of a training, in lines for the log."""
    product = f"{settings.batch_size} images × {settings.accumulate} × {ranks} rank(s)"
    per = "of each parameter's size" if settings.optimizer == "adamw-relative" else f"{settings.lr} per 256 images"
    lines = [
        f"{settings.epochs} epochs of {steps_of(settings, batches)} steps, global batch "
        f"{global_batch(settings, ranks)} ({product}), peak learning rate {scaled_lr(settings, ranks):.4g} "
        f"({per}), batch norm {settings.bn}"
    ]
    if teacher is not None:
        alpha, temperature = teacher.alpha, teacher.temperature
        labels = f"{1 - alpha:g} × cross-entropy to the labels"
        divergence = f"{temperature**2:g} × KL(dense ‖ compressed) at temperature {temperature:g}"
        lines.append(f"loss: {alpha:g} × {divergence} + {labels}")
    if settings.ema:
        lines.append(f"weights evaluated and saved: running average, {settings.ema} of the old at each step")
    return "\n".join(f"   {line}" for line in lines)
