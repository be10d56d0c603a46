"""What elimination needs of every consumer: the covariance of its channels, and of the places in its kernel."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.channels import Consumer
from dist_prune.network.head_attention import HeadMixing
from dist_prune.network.layers import LAYERS
from dist_prune.network.sites import evaluating, given_to
from dist_prune.network.windows import padded, patches
from dist_prune.statistics.moments import (
    Accumulator,
    Moments,
    Tally,
    sum_moments,
)
from dist_prune.statistics.patches import few_at_once
from dist_prune.statistics.precision import full_float32
from dist_prune.width.elimination import Term


@dataclass(frozen=True)
class ChannelMoments:
    """Of one consumer's input: over its `channels` (1, c, c), and over the places (s, s) that each channel has.

    Of what mixes the tokens of an attention, `channels` are (2 heads, c, c): of each head's queries, then keys.

    Places are those of the kernel, or the consecutive inputs after a flattening. `places` is the covariance of a
    patch, summed over channels, and scaled to a mean variance of 1.
    """

    channels: Moments
    places: Tensor


def collect_channel_moments(
    model: nn.Module,
    consumers: Iterable[Consumer],
    batches: Iterable[Tensor],
    world: World,
) -> dict[str, ChannelMoments]:
    """Moments of all consumers' channels from one forward pass over this rank's batches, summed over the ranks.

    Args:
        model: the dense network, on the world's device.
        consumers: of all groups.
        batches: images (N, …) of this rank; N may be 0 and may differ between ranks.
        world: the ranks to sum over.

    Returns:
        consumer's name → moments, equal on all ranks.

    Raises:
        StatisticsError: NaN or infinity, or no rows at all.
    """
    watching = {c.name: _Watching(model.get_submodule(c.name), c, world.device) for c in consumers}
    with ExitStack() as stack, evaluating(model), full_float32():
        for each in watching.values():
            stack.callback(each.module.register_forward_pre_hook(each.hook, with_kwargs=True).remove)
        for images in batches:
            if len(images):
                model(images)
    summed = sum_moments({name: each.channels.moments() for name, each in watching.items()}, world)
    world.sum_(*(tensor for each in watching.values() for tensor in each.places.tensors.values()))
    return {name: ChannelMoments(summed[name], _covariance(each.places)) for name, each in watching.items()}


def _covariance(places: Tally) -> Tensor:
    """From raw sums; the identity where the channels are constant."""
    count, total, outer = (places.tensors[name] for name in ("count", "total", "outer"))
    mean = total / count
    covariance = outer / count - mean.T @ mean
    scale = covariance.diagonal().mean().nan_to_num()  # of a single place nothing is summed
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.where(scale > 0, covariance / torch.where(scale > 0, scale, 1), identity)


class _Watching:
    """Adds one consumer's input to its sums."""

    def __init__(self, module: nn.Module, consumer: Consumer, device: torch.device) -> None:
        self.module, self.consumer = module, consumer
        if isinstance(module, HeadMixing):
            blocks, width, places = consumer.times, module.qk, 1
        else:
            blocks, (_, width, places) = 1, channel_weights(module, consumer).shape
        self.width = width
        self.channels = Accumulator(blocks, width, device)
        shapes = {"count": (), "total": (self.width, places), "outer": (places, places)}
        self.places = Tally({n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()})

    @torch.no_grad()
    def hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the consumer."""
        x = given_to(args, kwargs).detach()
        with torch.autocast(x.device.type, enabled=False):  # the network's, not ours
            self.channels.add(self._channels(x))
            if len(self.places.tensors["outer"]) > 1 and x.numel():
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                for some in few_at_once(x, len(self.places.tensors["outer"]) / self.consumer.repeat):
                    self._add_places(self._patches(some))

    def _channels(self, x: Tensor) -> Tensor:
        """As columns, (c, images, positions)."""
        if isinstance(self.module, nn.Conv2d):
            return x.flatten(2).transpose(0, 1)
        if isinstance(self.module, HeadMixing):
            x = x[..., : self.consumer.times * self.width]
            return x.reshape(len(x), -1, x.shape[-1]).permute(2, 0, 1)
        return x.reshape(len(x), -1, self.width, self.consumer.repeat).permute(2, 0, 1, 3).flatten(2)

    def _patches(self, x: Tensor) -> Tensor:
        """What each channel has at the places of the kernel, (channels, images, s, positions)."""
        if not isinstance(self.module, nn.Conv2d):
            return x.reshape(-1, self.width, self.consumer.repeat).transpose(0, 1)[..., None]
        found = patches(self.module, _padded(self.module, x))
        return found.view(len(x), self.width, -1, found.shape[-1]).transpose(0, 1)

    def _add_places(self, patches: Tensor) -> None:
        rows = patches.transpose(1, 2).flatten(2)  # (c, s, images · positions)
        self.places.tensors["outer"].add_((rows @ rows.mT).sum(0, dtype=torch.float64))
        self.places.tensors["total"].add_(rows.sum(-1))
        self.places.tensors["count"].add_(rows.shape[-1])


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with its padding; a convolution of a class of its own is taken as one that keeps its size."""
    if type(module) in LAYERS:
        return padded(module, x)
    height, width = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return F.pad(x, (width, width, height, height))


def channel_weights(module: nn.Module, consumer: Consumer) -> Tensor:
    """The consumer's weight by channel, (outputs, c, s)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 4:
        return weight.detach().flatten(2)
    return weight.detach().reshape(len(weight), -1, consumer.repeat)


def term_of(module: nn.Module, consumer: Consumer, moments: ChannelMoments, metric: Tensor) -> Term:
    """What a consumer adds to the greedy order.

    Args:
        module: the dense layer.
        consumer: which it is.
        moments: of its input.
        metric: of its output, (1, o, o), summed over positions.
    """
    weight = channel_weights(module, consumer).double()
    right = (metric[0] @ weight.flatten(1)).view_as(weight)
    gram = torch.einsum("ocs,ods->cd", weight @ moments.places, right)
    return Term(moments.channels.covariance[0], (gram + gram.T) / 2)
