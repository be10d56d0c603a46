"""How kernels and images lie in memory: channels first (NCHW), as torch has them, or channels last (NHWC)."""

from __future__ import annotations

import torch
from torch import nn

from dist_prune.network.replacing import with_replaced


def layout_of(model: nn.Module) -> torch.memory_format:
    """Channels last if that is how kernels lie in memory; those of 1×1 lie both ways."""
    kernels = [weight for weight in model.parameters() if weight.dim() == 4 and not weight.is_contiguous()]
    last = any(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    return torch.channels_last if last else torch.contiguous_format


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Every kernel so, in place; what convolutions return then lies so, too, whatever they are given."""
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's hints lack it


def place_like(layer: nn.Module, model: nn.Module) -> None:
    """On the same device, of the same type, and laid out alike, in place."""
    weight = next(model.parameters())
    layer.to(weight.device, weight.dtype)
    lay_out(layer, layout_of(model))


def channels_last(model: nn.Module) -> nn.Module:
    """A copy that lies so."""
    laid_out = with_replaced(model)
    lay_out(laid_out, torch.channels_last)
    return laid_out
