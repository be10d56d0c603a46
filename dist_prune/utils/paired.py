"""Whether one of two networks loses less than the other on the same images, by more than chance would have it."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor


def standard_error(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Of the mean of so many numbers, from their sum and the sum of their squares; infinite below two numbers."""
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return torch.where(count > 1, (variance / (count - 1)).sqrt(), math.inf)


def is_clearly_positive(sums: Tensor, chance: float) -> bool:
    """Whether the mean is above zero, one-sided: of a true mean of zero, this is said with probability `chance`.

    Args:
        sums: of the numbers, see `sums_of`.
        chance: between 0 and 1/2.
    """
    total, squares, count = sums
    return bool(total / count > NormalDist().inv_cdf(1 - chance) * standard_error(total, squares, count))


def sums_of(values: Tensor) -> Tensor:
    """Sum, sum of squares and count of these numbers, float64 (3,): to be added up over ranks."""
    values = values.double()
    return torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])
