"""Second moments of the patches of every convolution, as far as planning needs them: never a (k²c)² matrix.

A patch x is seen as c channels × k² places. Planning takes its covariance as a product, C_xx ≈ C_c ⊗ C_s, made of
the two block traces: C_c, between channels, averaged over places, and C_s, between places, summed over channels.
Both are exact, for any stride, dilation and padding, and need no patches in memory:

- an input position that n patches contain counts n times in C_c: one product of channels, with weights n;
- two places that lie δ apart are a product of the input with itself moved by δ, which all pairs of places with
  that distance share: (2k−1)² / 2 products instead of k⁴. Where patches do not overlap, as of a transformer's
  first layer, nothing is shared, and all pairs are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.sites import Site, call_of
from dist_prune.network.windows import padded
from dist_prune.statistics.moments import StatisticsError
from dist_prune.statistics.symmetric import load_lower_panels_, lower_panels, mirror_

CHUNK, GPU_CHUNK = 1 << 22, 1 << 27  # bytes of input that are multiplied at once: on a GPU, few large kernels


@dataclass(frozen=True)
class PatchMoments:
    """Raw sums over patches about a shift of each channel; they add over batches and ranks. All float64.

    Attributes:
        count: patches, a scalar.
        shift: (g, c).
        total: Σ of shifted patches, (g, c, k²).
        among_channels: Σ over patches and places of products of channels, (g, c, c).
        among_places: Σ over patches and channels of products of places, (g, k², k²).
    """

    count: Tensor
    shift: Tensor
    total: Tensor
    among_channels: Tensor
    among_places: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean patch, (g, c·k²), in the order of the weight's columns."""
        return (self.shift[..., None] + self._offset).flatten(1)

    @property
    def channels(self) -> Tensor:
        """C_c: covariance of the channels at one place, the mean of all places, (g, c, c)."""
        covariance = self.among_channels / self.count - self._offset @ self._offset.mT
        return covariance / self.total.shape[-1]

    @property
    def places(self) -> Tensor:
        """C_s: covariance of the places, the sum over all channels, (g, k², k²). Its trace is that of C_xx."""
        return self.among_places / self.count - self._offset.mT @ self._offset

    @property
    def _offset(self) -> Tensor:
        return self.total / self.count

    def moved(self, shift: Tensor) -> PatchMoments:
        """The same sums about another shift (g, c); exact."""
        step = self.shift - shift
        ones = self.total.new_ones(self.total.shape[-1])
        total = self.total + self.count * step[..., None]
        crossed = self.total.sum(-1)[..., None] * step[:, None]
        channels = crossed + crossed.mT + len(ones) * self.count * step[..., None] * step[:, None]
        along = (step[:, None] @ self.total).mT * ones
        places = along + along.mT + (self.count * step.square().sum(-1))[:, None, None]
        return PatchMoments(self.count, shift, total, self.among_channels + channels, self.among_places + places)


def white(site: Site, device: torch.device) -> PatchMoments:
    """Of patches whose inputs vary alike and independently, about zero: where nothing is known of the data."""
    places = site.kernel[0] * site.kernel[1]
    total = torch.zeros(site.groups, site.channels, places, dtype=torch.float64, device=device)
    channels = torch.eye(site.channels, dtype=torch.float64, device=device).expand(site.groups, -1, -1)
    among = torch.eye(places, dtype=torch.float64, device=device).expand(site.groups, -1, -1)
    count = total.new_ones(())
    return PatchMoments(count, total.sum(-1), total, places * channels, site.channels * among)


class PatchAccumulator:
    """Adds the input of one convolution to its patch moments, batch after batch; nothing waits for the device."""

    def __init__(self, site: Site, device: torch.device) -> None:
        places = site.kernel[0] * site.kernel[1]
        channels = site.inputs // places
        self.kernel = site.kernel
        self.count = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(site.groups, channels, places, dtype=torch.float64, device=device)
        self.channels = self.total.new_zeros(site.groups, channels, channels)
        self.places = self.total.new_zeros(site.groups, places, places)

    @torch.no_grad()
    def add(self, module: nn.Conv2d, x: Tensor, size: torch.Size) -> None:
        """Add the patches of an input.

        Args:
            module: the convolution, which knows stride, dilation and padding.
            x: what it was given, (N, in, H, W).
            size: height and width of what it gave.
        """
        if not x.numel():
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        if self.shift is None:
            self.shift = x.mean((0, 2, 3)).reshape(self.total.shape[:2])
        windows = _Windows(module, size)
        for some in torch.split(
            x, max(1, (GPU_CHUNK if x.is_cuda else CHUNK) // (x[0].numel() * x.element_size()))
        ):
            # Padding is zero before the shift, not after.
            shifted = padded(module, some)
            shifted = shifted.view(len(some), *self.shift.shape, *shifted.shape[2:]) - self.shift[..., None, None]
            self._add(windows, windows.reached(shifted))
            self.count += len(some) * size.numel()

    def _add(self, windows: _Windows, x: Tensor) -> None:
        """Of the chunk (N, g, c, H, W), padded and shifted."""
        height, width = self.kernel
        places = [(i, j) for i in range(height) for j in range(width)]
        weighted = (x * windows.counts(self.kernel, x).sqrt()).permute(1, 2, 0, 3, 4).flatten(2)
        self.channels += weighted @ weighted.mT
        total = x.sum(0).double()
        self.total += torch.stack([windows.at(total, i, j).sum((-2, -1)) for i, j in places], -1)
        if windows.apart:
            patches = torch.stack([windows.at(x, i, j) for i, j in places], 2)
            patches = patches.permute(1, 2, 0, 3, 4, 5).flatten(2)
            self.places += patches @ patches.mT
            return
        for down, right in _distances(height, width):
            products = windows.times_moved(x, down, right)
            for i, j in places:
                if i + down < height and 0 <= j + right < width:
                    first, second = i * width + j, (i + down) * width + j + right
                    value = windows.at(products, i, j + min(0, right)).sum((-2, -1))
                    self.places[:, first, second] += value
                    if first != second:
                        self.places[:, second, first] += value

    def state_dict(self) -> dict[str, Tensor]:
        """See `moments.Sums`."""
        sums = {"total": self.total, "count": torch.tensor(self.count)}
        sums |= lower_panels("channels", self.channels) | lower_panels("places", self.places)
        return sums if self.shift is None else sums | {"shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `moments.Sums`."""
        self.count = int(state["count"])
        self.shift = state["shift"].to(self.total.device) if "shift" in state else None
        self.total.copy_(state["total"])
        load_lower_panels_(self.channels, "channels", state)
        load_lower_panels_(self.places, "places", state)

    def moments(self) -> PatchMoments:
        """The sums so far."""
        mirror_(self.channels)  # of a product that was rounded differently on both sides, the one that is saved
        mirror_(self.places)
        shift = self.total.new_zeros(self.total.shape[:2]) if self.shift is None else self.shift.double()
        return PatchMoments(self.total.new_tensor(self.count), shift, self.total, self.channels, self.places)


def _distances(height: int, width: int) -> Iterator[tuple[int, int]]:
    """How far two places of a kernel can lie apart, down and right, each pair once."""
    for down in range(height):
        for right in range(1 - width if down else 0, width):
            yield down, right


@dataclass(frozen=True)
class _Windows:
    """Which positions of a padded input a convolution reads."""

    module: nn.Conv2d
    size: torch.Size

    @property
    def apart(self) -> bool:
        """Whether no position is in two patches."""
        how = zip(self.module.kernel_size, self.module.dilation, self.module.stride, strict=True)
        return all(stride > dilation * (kernel - 1) for kernel, dilation, stride in how)

    def at(self, maps: Tensor, i: int, j: int) -> Tensor:
        """Of maps (…, H, W), what all patches have at the place (i, j): (…, size)."""
        rows, columns = (
            slice(place * d, place * d + (n - 1) * s + 1, s)
            for place, d, n, s in zip((i, j), self.module.dilation, self.size, self.module.stride, strict=True)
        )
        return maps[..., rows, columns]

    def reached(self, maps: Tensor) -> Tensor:
        """Without the last rows and columns, if a stride leaves them out."""
        ends = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(
                self.size, self.module.stride, self.module.kernel_size, self.module.dilation, strict=True
            )
        ]
        return maps[..., : ends[0], : ends[1]]

    def counts(self, kernel: tuple[int, int], like: Tensor) -> Tensor:
        """How many patches contain each position, (H, W)."""
        counts = like.new_zeros(like.shape[-2:])
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                self.at(counts, i, j).add_(1)
        return counts

    def times_moved(self, x: Tensor, down: int, right: int) -> Tensor:
        """Σ over images and channels of x(q)·x(q + δ), (g, …), float64, δ in places, `down` ≥ 0.

        Its columns begin where both are inside.
        """
        down, right = down * self.module.dilation[0], right * self.module.dilation[1]
        height, width = x.shape[-2:]
        here = x[..., : height - down, max(0, -right) : width - max(0, right)]
        there = x[..., down:, max(0, right) : width - max(0, -right)]
        return (here * there).sum((0, 2)).double()


@contextmanager
def accumulating_patches(
    model: nn.Module, sites: Iterable[Site], device: torch.device
) -> Iterator[dict[str, PatchAccumulator]]:
    """While open, every forward pass adds to the patch moments of the convolutions larger than 1×1."""
    accumulators: dict[str, PatchAccumulator] = {}
    with ExitStack() as stack:
        for site in sites:
            if site.kernel != (1, 1):
                accumulators[site.name] = PatchAccumulator(site, device)
                module = model.get_submodule(site.name)
                hook = _feed(site, accumulators[site.name])
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield accumulators


def _feed(site: Site, accumulator: PatchAccumulator) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        x, y = call_of(site, args, kwargs, output)
        with torch.autocast(y.device.type, enabled=False):
            accumulator.add(module, x.detach(), y.shape[-2:])

    return hook


def sum_patches(local: Mapping[str, PatchMoments], world: World) -> dict[str, PatchMoments]:
    """Add every rank's sums; rank 0's shift becomes everybody's.

    Raises:
        StatisticsError: NaN or infinity, or no patches at all (site named).
    """
    shifts = [m.shift.clone() for m in local.values()]
    world.broadcast_(*shifts)
    summed = {name: m.moved(shift) for (name, m), shift in zip(local.items(), shifts, strict=True)}
    world.sum_(*(t for m in summed.values() for t in (m.count, m.total, m.among_channels, m.among_places)))
    for name, m in summed.items():
        if not m.count:
            raise StatisticsError(f"{name}: no patches were seen; are there images in the statistics split?")
        if not torch.isfinite(m.among_channels.sum() + m.among_places.sum()):
            raise StatisticsError(
                f"{name}: its patches hold NaN or infinity; check the weights and the normalisation"
            )
    return summed
