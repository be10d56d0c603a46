"""What tells two networks apart, bit by bit: compared between ranks, and kept with results."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, str]:
    """The sha256 of the dtype, shape and bytes of every parameter and buffer, by name."""
    return {name: _sha256(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def digest(model: nn.Module) -> str:
    """One sha256 over all parameters and buffers and their names."""
    return hashlib.sha256(repr(sorted(fingerprint(model).items())).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1)
    header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(header + flat.view(torch.uint8).numpy().tobytes()).hexdigest()
