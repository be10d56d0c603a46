"""Streamed second moments of every site in one forward pass, exact over any number of ranks.

Each rank sums n, Σ(y−m) and Σ(y−m)(y−m)ᵀ about a shift m of its own (near the mean of its first batch): without
the shift, float32 products of data far from zero would cancel. At the end all ranks move their sums to one
common shift, in float64, where the distance is a few standard deviations at most, and one all-reduce adds
them. Products of centred rows are taken in float32, or, on a GPU where the network runs in bfloat16, of rows that
are centred in bfloat16; their sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.sites import View, call_of, evaluating
from dist_prune.statistics.precision import products
from dist_prune.statistics.symmetric import SymmetricSum, tiles_of

T = TypeVar("T")


class StatisticsError(ValueError):
    """Statistics that cannot be used; the message names the site."""


class Sums(Protocol):
    """Sums of a pass over images: their state can be saved between two batches, and loaded again."""

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, of symmetric matrices the lower panels."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        ...


class Watch(Protocol):
    """Hands a pass its batches; before the first it may load saved sums, between two it may save them."""

    def __call__(self, batches: Iterable[T], sums: Mapping[str, Sums], /) -> Iterable[T]: ...


def unwatched(batches: Iterable[T], _sums: Mapping[str, Sums], /) -> Iterable[T]:
    """The batches, and nothing else."""
    return batches


@dataclass(frozen=True)
class Tally:
    """Tensors that are added to in place."""

    tensors: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """See `Sums`."""
        return dict(self.tensors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Sums`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


@dataclass(frozen=True)
class Moments:
    """Raw sums over rows, never divided: they add over batches and ranks. All float64.

    `count` is a scalar, `shift` and `total` are (g, k), `outer` is (g, k, k), where k is c on the output
    side and d on the input side.
    """

    count: Tensor
    shift: Tensor
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean row, (g, k)."""
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, (g, k, k), symmetric, divided by n (the maximum-likelihood estimate)."""
        offset = (self.total / self.count)[..., None]
        return torch.baddbmm(self.outer, offset, offset.mT, beta=1 / max(1.0, self.count.item()), alpha=-1)

    def moved_(self, shift: Tensor) -> Moments:
        """The same sums about another shift (g, k); `outer` is changed in place, as it may be large.

        Σ(y−m′)(y−m′)ᵀ with m′ = m − d expands exactly, in rank-one terms.
        """
        step, total = (self.shift - shift)[..., None], self.total[..., None]
        outer = self.outer.baddbmm_(total, step.mT).baddbmm_(step, total.mT)
        outer = outer.baddbmm_(step * self.count, step.mT)
        return Moments(self.count, shift, self.total + self.count * step[..., 0], outer)


class Accumulator:
    """Adds rows to one site's moments, batch after batch, on the device, without a host synchronisation."""

    def __init__(self, groups: int, width: int, device: torch.device) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self.outer = SymmetricSum(groups, width, device)

    @torch.no_grad()
    def add(self, *blocks: Tensor) -> None:
        """Add rows given as columns, (g·k, images, positions), of any strides and floating type.

        Several blocks, (g·k₁, …), (g·k₂, …), are the parts of longer rows: k = k₁ + k₂ + … They are not joined in
        memory before they are needed.
        """
        if not blocks[0].numel():
            return
        groups, given, tiles = len(self.total), blocks[0].dtype, tiles_of(self.total)
        wide = torch.promote_types(given, torch.float32)
        dtype = given if given == torch.bfloat16 and tiles.keeps_bf16 else wide
        parts = [block.view(groups, -1, *block.shape[1:]) for block in blocks]
        if self.shift is None:
            self.shift = torch.cat([_shift_of(part, wide) for part in parts], 1)
        shift = self.shift.to(dtype)
        count, positions = blocks[0].shape[1:]
        images = max(1, tiles.bytes // (self.total.numel() * positions * dtype.itemsize))
        for some in zip(*(torch.split(part, images, dim=2) for part in parts), strict=True):
            columns = _minus(some, shift)
            self.outer.add_square(columns)
            self.total += columns.sum(-1, dtype=wide)
        self.count += count * positions
        self.outer.close_batch()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Sums`."""
        sums = {"count": torch.tensor(self.count), "total": self.total} | self.outer.state_dict("outer")
        return sums if self.shift is None else sums | {"shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Sums`."""
        self.count = int(state["count"])
        self.shift = state["shift"].to(self.total.device) if "shift" in state else None
        self.total.copy_(state["total"])
        self.outer.load_state_dict("outer", state)

    def moments(self) -> Moments:
        """The sums so far."""
        shift = self.total.new_zeros(self.total.shape) if self.shift is None else self.shift.double()
        return Moments(self.total.new_tensor(self.count), shift, self.total, self.outer.matrix())


def _shift_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Their mean, (g, k), as a multiple of the last bit of the largest.

    In bfloat16 large rows then lose it exactly, and what small rows are rounded by has no sign.
    """
    mean, largest = rows.mean((2, 3), dtype=dtype), torch.linalg.vector_norm(rows, torch.inf, (2, 3), dtype=dtype)
    bit = torch.finfo(rows.dtype).eps
    unit = largest.clamp_(torch.finfo(dtype).tiny / bit).log2_().ceil_().exp2_().mul_(bit)
    return mean.div_(unit).round_().mul_(unit)


def _minus(blocks: Sequence[Tensor], shift: Tensor) -> Tensor:
    """Centred rows, (g, k, images·positions), laid out for the product: nothing is transposed in memory."""
    groups, width = shift.shape
    images, positions = blocks[0].shape[2:]
    if len(blocks) == 1 and blocks[0].stride(1) == 1:  # channels last, linear layers
        centred = shift.new_empty((images, positions, groups, width)).permute(2, 3, 0, 1)
    else:
        centred = shift.new_empty((groups, width, images, positions))
    ends = list(accumulate(block.shape[1] for block in blocks))
    for block, end in zip(blocks, ends, strict=True):
        own = slice(end - block.shape[1], end)
        torch.sub(block, shift[:, own, None, None], out=centred[:, own])
    return centred.flatten(2)


def collect_moments(
    model: nn.Module,
    views: Iterable[View],
    batches: Iterable[Tensor],
    world: World,
    watch: Watch = unwatched,
    bf16: bool = False,
) -> dict[str, Moments]:
    """Moments of all sites from one forward pass over this rank's batches, summed over the ranks.

    Args:
        model: the dense network, on the world's device.
        views: of the sites, on either side.
        batches: images (N, 3, H, W) of this rank; N may be 0 and may differ between ranks.
        world: the ranks to sum over.
        watch: hands over the batches.
        bf16: run the network in bfloat16 autocast; on a GPU what its layers return is then multiplied as it is.

    Returns:
        site name → moments, equal on all ranks.

    Raises:
        StatisticsError: NaN or infinity, or no rows at all (site named).
    """
    with accumulating(model, views, world.device) as accumulators, evaluating(model), products(tf32=bf16):
        for images in watch(batches, accumulators):
            if len(images):
                with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                    model(images)
    return sum_moments({name: a.moments() for name, a in accumulators.items()}, world)


@contextmanager
def accumulating(
    model: nn.Module, views: Iterable[View], device: torch.device
) -> Iterator[dict[str, Accumulator]]:
    """While open, every forward pass of the model adds to the accumulators it gives, site name → moments."""
    accumulators: dict[str, Accumulator] = {}
    with ExitStack() as stack:
        for view in views:
            accumulator = Accumulator(view.site.groups, view.width, device)
            accumulators[view.site.name] = accumulator
            module = model.get_submodule(view.site.name)
            stack.callback(module.register_forward_hook(_feed(view, accumulator), with_kwargs=True).remove)
        yield accumulators


def _feed(view: View, accumulator: Accumulator) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x, y = call_of(view.site, args, kwargs, output)
        source = view.source(x, y).detach()
        with torch.autocast(y.device.type, enabled=False):  # the network's, not ours
            for chunk in view.chunks(y, len(y)):
                accumulator.add(view.rows(module, source[chunk]))

    return hook


def sum_moments(local: Mapping[str, Moments], world: World) -> dict[str, Moments]:
    """Add every rank's moments, in place; rank 0's shift becomes everybody's.

    Raises:
        StatisticsError: see `collect_moments`.
    """
    shifts = [m.shift.clone() for m in local.values()]
    world.broadcast_(*shifts)
    moved = [m.moved_(shift) for m, shift in zip(local.values(), shifts, strict=True)]
    world.sum_(*(t for m in moved for t in (m.count, m.total)))
    world.sum_symmetric_(*(m.outer for m in moved))
    summed = dict(zip(local, moved, strict=True))
    for name, moments in summed.items():
        require_finite(name, moments)
    return summed


def require_finite(name: str, moments: Moments) -> None:
    """Refuse moments that would make an eigensolver answer nonsense (`eigh(inf)` does so silently).

    Raises:
        StatisticsError: see the message.
    """
    if not moments.count:
        raise StatisticsError(f"{name}: no rows were seen; are there images in the statistics split?")
    # A sum is not finite as soon as one term is not, and needs no memory.
    if not torch.isfinite(moments.total.sum() + moments.outer.sum()):
        raise StatisticsError(
            f"{name}: its statistics hold NaN or infinity. Check the weights and the normalisation; "
            f"with half precision, overflow is likely"
        )
