"""Second moments of the patches of every convolution, as far as planning needs them: never a (k²c)² matrix.

A patch x is seen as c channels × k² places. Planning takes its covariance as a product, C_xx ≈ C_c ⊗ C_s, made of
the two block traces: C_c, between channels, averaged over places, and C_s, between places, summed over channels.
Both are exact, for any stride, dilation and padding:

- an input position that n patches contain counts n times in C_c: one product of channels, with weights n;
- C_s is the sum over images and channels of products of (k² × positions) matrices with themselves, which are
  copied once, for a few images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.sites import Site, call_of
from dist_prune.network.windows import padded, patches
from dist_prune.statistics.moments import StatisticsError
from dist_prune.statistics.symmetric import SymmetricSum, load_lower_panels_, lower_panels, mirror_

CHUNK, GPU_CHUNK = 1 << 22, 1 << 29  # bytes of patches that are multiplied at once: on a GPU, few large kernels


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


def few_at_once(x: Tensor, copies: float) -> Sequence[Tensor]:
    """Images (N, …), as many at a time as may be copied `copies` times at once."""
    image_bytes = max(1, int(x[0].numel() * x.element_size() * copies))
    return torch.split(x, max(1, (GPU_CHUNK if x.is_cuda else CHUNK) // image_bytes))


class PatchAccumulator:
    """Adds the input of one convolution to its patch moments, batch after batch; nothing waits for the device."""

    def __init__(self, site: Site, device: torch.device) -> None:
        places = site.kernel[0] * site.kernel[1]
        channels = site.inputs // places
        self.count = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(site.groups, channels, places, dtype=torch.float64, device=device)
        self.channels = SymmetricSum(site.groups, channels, device)
        self.places = self.total.new_zeros(site.groups, places, places)
        self._weights: dict[torch.Size, Tensor] = {}  # by size of the input

    @torch.no_grad()
    def add(self, module: nn.Conv2d, x: Tensor) -> None:
        """Add the patches of an input.

        Args:
            module: the convolution, which knows stride, dilation and padding.
            x: what it was given, (N, in, H, W).
        """
        if not x.numel():
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
        if self.shift is None:
            self.shift = x.mean((0, 2, 3)).view(self.total.shape[:2])
        groups, channels, places = self.total.shape
        summed = x.new_zeros((), dtype=torch.float64)  # over images
        for some in few_at_once(x, places / math.prod(module.stride)):
            # Padding is zero before the shift, not after.
            shifted = padded(module, some) - self.shift.view(-1, 1, 1)
            self._add_products(module, shifted)
            summed = summed + shifted.sum(0)
        rows = patches(module, summed[None]).view(groups, channels, places, -1)
        self.total += rows.sum(-1)
        self.count += len(x) * rows.shape[-1]
        self.channels.close_batch()

    def _add_products(self, module: nn.Conv2d, x: Tensor) -> None:
        """Of a few images (N, in, H, W), padded and shifted."""
        groups, channels, places = self.total.shape
        rows = patches(module, x).view(len(x), groups, channels, places, -1)
        if rows.shape[-1] < places:  # fewer positions, as behind a transformer's first layer: one large product
            rows = rows.permute(1, 3, 0, 2, 4).flatten(2)
            self.places += rows @ rows.mT
        else:
            self.places += (rows @ rows.mT).sum((0, 2), dtype=torch.float64)
        self.channels.add_square((x * self._weighted(module, x)).transpose(0, 1).reshape(groups, channels, -1))

    def _weighted(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        """The root of how many patches contain a position, (1, 1, H, W)."""
        size = x.shape[-2:]
        if size not in self._weights:
            ones = patches(module, torch.ones(1, 1, *size, dtype=torch.float64))
            how = {"dilation": module.dilation, "stride": module.stride}
            self._weights[size] = F.fold(ones, size, module.kernel_size, **how).sqrt().to(x)
        return self._weights[size]

    def state_dict(self) -> dict[str, Tensor]:
        """See `moments.Sums`."""
        sums = {"total": self.total, "count": torch.tensor(self.count)}
        sums |= self.channels.state_dict("channels") | lower_panels("places", self.places)
        return sums if self.shift is None else sums | {"shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `moments.Sums`."""
        self.count = int(state["count"])
        self.shift = state["shift"].to(self.total.device) if "shift" in state else None
        self.total.copy_(state["total"])
        self.channels.load_state_dict("channels", state)
        load_lower_panels_(self.places, "places", state)

    def moments(self) -> PatchMoments:
        """The sums so far."""
        mirror_(self.places)
        shift = self.total.new_zeros(self.total.shape[:2]) if self.shift is None else self.shift.double()
        return PatchMoments(
            self.total.new_tensor(self.count), shift, self.total, self.channels.matrix(), self.places
        )


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
            accumulator.add(module, x.detach())

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
