"""Families of nested replacements of one site, W = Σᵢ Wᵢ, and what each term gives for each image.

Term i gives image n  s_{n,i} = Σ_p g_pᵀWᵢ(x_p − x̄), with g the gradient at the site's output y = Wx + b.

- Along directions of the outputs, Wᵢ = dᵢeᵢᵀW, or of the input's channels, Wᵢ = W dᵢeᵢᵀ at each place of a kernel,
  s is a product of two projections: (eᵢ·y)(dᵢ·g), or (eᵢ·x)(dᵢ·h) with h = ∂l/∂x through this layer alone, which
  the backward pass has at hand.
- Of any two layers, s = ⟨∂⟨g, second(t)⟩/∂tᵢ, tᵢ⟩ with t = first(x): the products of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from dist_prune.network.sites import Site, output_rows
from dist_prune.network.windows import padded
from dist_prune.statistics.precision import full_float32_convolutions


@dataclass(frozen=True)
class Call:
    """One call of a site's layer and its gradients, all of whole batches.

    Attributes:
        x: what it was given, (N, in, H, W) or (N, …, in).
        y: what it gave, (N, C, H, W) or (N, …, C).
        gradients: at y, of all draws, (draws, …) as y.
        back: at x, through this layer alone, (draws, …) as x; empty where no family needs it.
    """

    x: Tensor
    y: Tensor
    gradients: Tensor
    back: Tensor

    def to(self, dtype: torch.dtype) -> Call:
        """The same in another precision."""
        return Call(*(tensor.to(dtype) for tensor in (self.x, self.y, self.gradients, self.back)))

    @staticmethod
    def joined(calls: Sequence[Call]) -> Call:
        """Calls of a part of the images each, one after another."""
        x, y = torch.cat([call.x for call in calls]), torch.cat([call.y for call in calls])
        gradients, back = ([getattr(call, name) for call in calls] for name in ("gradients", "back"))
        return Call(x, y, torch.cat(gradients, 1), torch.cat(back, 1))


class Terms(Protocol):
    """A family: its weight as a sum of terms, best first."""

    @property
    def offset(self) -> Tensor:
        """What each term gives for the mean row, (C, r) float64, groups joined."""

    @property
    def needs_back(self) -> bool:
        """Whether `given` takes `Call.back`."""

    def given(self, site: Site, call: Call) -> Tensor:
        """Σ_p g_pᵀWᵢx_p of each term i, summed over groups, (draws, N, r)."""


@dataclass(frozen=True)
class Directions:
    """Terms along directions of one side, of the outputs or of the input's channels.

    Attributes:
        side: which.
        encode: (g, r, k), in the precision that rows are multiplied in.
        decode: (g, k, r).
        offset: see `Terms`; of the outputs decode·encode·ȳ, as y is taken with its bias.
    """

    side: Literal["input", "output"]
    encode: Tensor
    decode: Tensor
    offset: Tensor

    @property
    def needs_back(self) -> bool:
        """See `Terms`."""
        return self.side == "input"

    def given(self, site: Site, call: Call) -> Tensor:
        """See `Terms`."""
        rows, gradients = (call.x, call.back) if self.needs_back else (call.y, call.gradients)
        along = _along(self.encode, output_rows(site, rows))
        return torch.stack(
            [(along * _along(self.decode.mT, output_rows(site, one))).sum((0, 3)).mT for one in gradients]
        )


@dataclass(frozen=True)
class ChainTerms:
    """Two convolutions: `first` gives one channel per term and group, `second` the outputs; biases are ignored."""

    first: nn.Conv2d
    second: nn.Conv2d
    offset: Tensor
    needs_back: bool = False

    def given(self, site: Site, call: Call) -> Tensor:
        """See `Terms`."""
        first, second, x, g = self.first, self.second, call.x, call.gradients
        weights = [each.weight.to(x.dtype) for each in (first, second)]
        how = (second.stride, (0, 0), second.dilation, second.groups)
        with full_float32_convolutions():  # rows are not centred here
            t = torch.conv2d(padded(first, x), weights[0], None, first.stride, 0, first.dilation, first.groups)
            t = padded(second, t)
            size = (len(g) * len(t), *t.shape[1:])
            back = conv2d_input(size, weights[1], g.flatten(0, 1), *how)  # type: ignore[no-untyped-call]
        given = torch.einsum("nrhw,dnrhw->dnr", t, back.reshape(len(g), *t.shape))
        return given.reshape(*given.shape[:2], first.groups, -1).sum(2)


def _along(directions: Tensor, columns: Tensor) -> Tensor:
    """Columns (g·k, N, positions) along directions (g, r, k): (g, r, N, positions)."""
    flat = columns.reshape(len(directions), -1, columns.shape[1] * columns.shape[2])
    return (directions @ flat).reshape(*directions.shape[:2], *columns.shape[1:])


def offset_of(first: nn.Conv2d, second: nn.Conv2d, mean: Tensor) -> Tensor:
    """What each term gives for the mean patch, (C, r) float64: the two layers on a single window.

    Args:
        first: to r channels per group.
        second: to C channels.
        mean: the mean patch (g, in/g·kh·kw).
    """
    kernel = [1 + (a - 1) + (b - 1) for a, b in zip(first.kernel_size, second.kernel_size, strict=True)]
    window = mean.double().reshape(1, first.in_channels, *kernel)
    t = torch.conv2d(window, first.weight.double(), groups=first.groups)[0]
    t = t.reshape(first.groups, -1, *t.shape[1:])  # g, r, kh, kw
    weight = second.weight.detach().double()
    weight = weight.reshape(second.groups, -1, *weight.shape[1:])  # g, c, r, kh, kw
    return torch.einsum("gcrhw,grhw->gcr", weight, t).flatten(0, 1)
