"""Which optimizer takes the steps of a training, and its learning rate at each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.config.training import TrainingConfig

SMALLEST = 1e-3  # that a parameter's size is taken to be, at least: biases may begin at zero


def optimizer_of(model: nn.Module, settings: TrainingConfig, ranks: int) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW (Loshchilov & Hutter 2019), at the peak learning rate.

    AdamW's decay of the mean is `momentum`, that of the squares PyTorch's 0.999. The rate of `adamw-relative` is
    a share of each parameter's size, see `relative_groups`.
    """
    groups = weight_decay_groups(model, settings.weight_decay)
    lr, momentum = scaled_lr(settings, ranks), settings.momentum
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    betas = momentum, 0.999
    if settings.optimizer == "adamw-relative":  # a group for each parameter: a kernel for each, too, or else ten
        return torch.optim.AdamW(relative_groups(groups, lr), lr=lr, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def relative_groups(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Each parameter by itself, with `lr` times its root mean square as its rate, as Adafactor has it.

    So factors of every shape move by as much of themselves (Shazeer & Stern 2018, §8). The size is that at the
    beginning; the decay is that of a rate of `lr`.
    """
    sized = [(p, size_of(p), group["weight_decay"]) for group in groups for p in group["params"]]
    return [{"params": [p], "lr": lr * size, "weight_decay": d / size, "size": size} for p, size, d in sized]


def size_of(parameter: Tensor) -> float:
    """Its root mean square; `SMALLEST` at least."""
    return max(float(parameter.detach().square().mean().sqrt()), SMALLEST)


def peaks_of(optimizer: torch.optim.Optimizer, settings: TrainingConfig, ranks: int) -> list[float]:
    """Peak learning rate of each of its groups."""
    return [scaled_lr(settings, ranks) * float(group.get("size", 1.0)) for group in optimizer.param_groups]


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The present learning rate; a relative one as it is before parameters' sizes."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group.get("size", 1.0))


def global_batch(settings: TrainingConfig, ranks: int) -> int:
    """Images of a step: a batch on each rank, times the batches that are accumulated."""
    return settings.batch_size * settings.accumulate * ranks


def scaled_lr(settings: TrainingConfig, ranks: int) -> float:
    """Peak learning rate, linear in the global batch (Goyal et al. 2017); a relative one does not depend on it."""
    if settings.optimizer == "adamw-relative":
        return settings.lr
    return settings.lr * global_batch(settings, ranks) / 256


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a line up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices and kernels decay, biases and normalisation do not."""
    wide = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    flat = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
