"""Memory formats of kernels and images: contiguous (NCHW), torch's default, or channels_last (NHWC)."""

from __future__ import annotations

import torch
from torch import nn

from dist_prune.network.replacing import with_replaced


def layout_of(model: nn.Module) -> torch.memory_format:
    """channels_last if the kernels are in that format; those of 1×1 are in both."""
    kernels = [weight for weight in model.parameters() if weight.dim() == 4 and not weight.is_contiguous()]
    last = any(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    return torch.channels_last if last else torch.contiguous_format


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Convert every kernel, in place; convolutions then return that format, whatever they are given."""
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's hints lack it


def place_like(layer: nn.Module, model: nn.Module) -> None:
    """Move to the same device, type and memory format, in place."""
    weight = next(model.parameters())
    layer.to(weight.device, weight.dtype)
    lay_out(layer, layout_of(model))


def channels_last(model: nn.Module) -> nn.Module:
    """A copy in that memory format."""
    laid_out = with_replaced(model)
    lay_out(laid_out, torch.channels_last)
    return laid_out
