"""Random numbers keyed by image: what is drawn depends on the image's index, not on the rank that holds it."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

# The constants of splitmix64 (Steele, Lea & Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def uniform(seed: int, purpose: str, indices: Tensor, width: int) -> Tensor:
    """Uniform numbers in (0, 1), float64, (N, width), on the device of `indices`.

    Args:
        seed: of the run.
        purpose: what they are for; other purposes get other numbers.
        indices: (N,) int64, of the images.
        width: numbers per image.
    """
    key = zlib.crc32(f"{seed}:{purpose}".encode())
    counter = indices[:, None] * width + torch.arange(width, device=indices.device)
    bits = _mix(_mix(counter * _GOLDEN) + key)
    return ((bits >> 11 & (1 << 53) - 1).double() + 0.5) / (1 << 53)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap, and masks make the arithmetic shifts logical."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


def normal(seed: int, purpose: str, indices: Tensor, width: int) -> Tensor:
    """Standard normal numbers, float64, (N, width) (Box-Muller); see `uniform`."""
    radius = uniform(seed, purpose + ":radius", indices, width).log().mul(-2).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(seed, purpose + ":angle", indices, width))


def directions(seed: int, purpose: str, indices: Tensor, width: int) -> Tensor:
    """Unit vectors, uniform on the sphere, float64, (N, width); see `uniform`."""
    return F.normalize(normal(seed, purpose, indices, width), dim=1)


def labels(seed: int, purpose: str, indices: Tensor, logits: Tensor) -> Tensor:
    """Labels drawn from each softmax, (N,) or (N, positions) int64, by inverting the distribution function.

    Args:
        seed: of the run.
        purpose: see `uniform`.
        indices: (N,) of the images.
        logits: (N, classes) or (N, classes, positions).
    """
    steps = logits.detach().double().softmax(1).cumsum(1)
    drawn = uniform(seed, purpose, indices, logits.shape[2:].numel()).reshape(len(logits), 1, *logits.shape[2:])
    return (steps < drawn * steps[:, -1:]).sum(1).clamp(max=logits.shape[1] - 1)
