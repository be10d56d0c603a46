"""Attention's heads turned so that their dimensions are in order of what they are worth.

A head compares its queries q and keys k by qᵀk. Softmax takes no notice of what all keys have in common, so with M
the second moment of q and C the covariance of k, both over tokens, leaving out dimensions after replacing q by Aq
and k by Bk with AᵀB = I loses E[(qᵀ(I − A_rᵀB_r)k)²] = ‖M^½(I − A_rᵀB_r)C^½‖², which is least where A and B are
the singular vectors of LᵀR, M = LLᵀ, C = RRᵀ: A = Σ^½UᵀL⁻¹, B = Σ^½VᵀR⁻¹. Then AMAᵀ = BCBᵀ = Σ, and leaving out
a dimension loses σ². Values v and the columns O of the output layer that take the head's answer are the same with
C the covariance of the answers and M = OᵀGO in the output's metric G: attention's weights sum to 1, so that Bv,
mixed, is B of what was mixed, and O becomes OAᵀ.

All that is a change of basis: the turned network computes what it did, and leaving out the last dimensions of
every head, equally many so that shapes stay regular, is a matter of outputs and inputs that are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.network.channels import QUERIES, Group
from dist_prune.network.replacing import with_replaced
from dist_prune.statistics.moments import Moments
from dist_prune.utils.decompositions import eigh, svd
from dist_prune.width.elimination import Elimination
from dist_prune.width.moments import ChannelMoments

RIDGE = 1e-6  # of the mean variance: directions in which nothing varies have a place, too


def directions(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with AᵀB = I, and A·first·Aᵀ = B·second·Bᵀ diagonal, descending; all (heads, d, d), float64."""
    (left, over_left), (right, over_right) = _root(first), _root(second)
    u, s, vt = svd(left.mT @ right)
    root = s.clamp(min=torch.finfo(s.dtype).tiny).sqrt()[..., None]
    return root * (u.mT @ over_left), root * (vt @ over_right)


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L of LLᵀ with a ridge, and its inverse; eigenvalues that rounding left below zero are none."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    values, vectors = eigh((matrix + matrix.mT) / 2)
    root = (values.clamp(min=0) + torch.where(mean > 0, RIDGE * mean, 1)).sqrt()[:, None]
    return vectors * root, (vectors / root).mT


def turned(
    model: nn.Module,
    groups: Iterable[Group],
    moments: Mapping[str, ChannelMoments],
    metrics: Mapping[str, Tensor],
    world: World,
) -> tuple[nn.Module, dict[str, ChannelMoments]]:
    """The network with the heads of these groups turned, and the moments of it; equal on all ranks.

    Args:
        model: left as it is.
        groups: of it; only those of attention matter.
        moments: of their consumers.
        metrics: of the output layers, (1, o, o).
        world: the ranks.
    """
    heads = [group for group in groups if group.part]
    if not heads:
        return model, dict(moments)
    names = {name for group in heads for name in (*group.producers, *(c.name for c in group.solved))}
    network = with_replaced(model, (), _shared(model, names))
    found = dict(moments)
    for group in heads:
        name = group.consumers[0].name
        turn = _turn_queries if group.part == QUERIES else _turn_values
        found[name] = turn(network, group, moments[name], metrics)
    layers = [network.get_submodule(name) for name in sorted(names)]
    world.broadcast_(*(tensor for layer in layers for tensor in layer.state_dict().values()))
    sums = (found[group.consumers[0].name].channels for group in heads)
    world.broadcast_(*(tensor for each in sums for tensor in (each.shift, each.total, each.outer)))
    return network, found


def _shared(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """All tensors but those of these layers."""
    own = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]


def _turn_queries(
    network: nn.Module, group: Group, moments: ChannelMoments, _metrics: Mapping[str, Tensor]
) -> ChannelMoments:
    queries, covariance = group.times // 2, moments.channels.covariance
    mean = moments.channels.mean[..., None]
    second = covariance[:queries] + mean[:queries] @ mean[:queries].mT
    maps = torch.cat(directions(second, covariance[queries:]))
    _turn_outputs(network.get_submodule(group.producers[0]), group, maps)
    return ChannelMoments(_mapped(moments.channels, maps), moments.places)


def _turn_values(
    network: nn.Module, group: Group, moments: ChannelMoments, metrics: Mapping[str, Tensor]
) -> ChannelMoments:
    heads, name = group.times, group.consumers[0].name
    layer = network.get_submodule(name)
    grams = gram_blocks(layer, metrics[name], heads)
    back, maps = directions(grams, blocks(moments.channels.covariance[0], heads))
    _turn_outputs(network.get_submodule(group.producers[0]), group, maps)
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        by_head = weight.double().view(len(weight), heads, -1)
        weight.copy_(torch.einsum("ohd,hed->ohe", by_head, back).flatten(1))
    return ChannelMoments(_mapped(moments.channels, _on_diagonal(maps)[None]), moments.places)


@torch.no_grad()
def _turn_outputs(layer: nn.Module, group: Group, maps: Tensor) -> None:
    """Apply (times, d, d) maps to the outputs of a layer that belong to the group."""
    chosen = slice(group.start, group.start + group.times * group.width)
    for parameter in layer.parameters():
        part = parameter[chosen].double().reshape(group.times, group.width, -1)
        parameter[chosen] = (maps @ part).view_as(parameter[chosen]).to(parameter.dtype)


def _mapped(sums: Moments, maps: Tensor) -> Moments:
    """Of rows that were mapped, (g, k, k)."""
    shift, total = (maps @ sums.shift[..., None])[..., 0], (maps @ sums.total[..., None])[..., 0]
    return Moments(sums.count, shift, total, maps @ sums.outer @ maps.mT)


def blocks(matrix: Tensor, heads: int) -> Tensor:
    """The blocks on the diagonal of (heads · d, heads · d), (heads, d, d)."""
    size = len(matrix) // heads
    return matrix.view(heads, size, heads, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _on_diagonal(maps: Tensor) -> Tensor:
    """The reverse: zeros elsewhere."""
    heads, size, _ = maps.shape
    whole = maps.new_zeros(heads, size, heads, size)
    whole.diagonal(dim1=0, dim2=2).copy_(maps.permute(1, 2, 0))
    return whole.view(heads * size, heads * size)


def gram_blocks(layer: nn.Module, metric: Tensor, heads: int) -> Tensor:
    """OᵀGO of each head's columns, (heads, d, d)."""
    weight = layer.get_parameter("weight").detach().double()
    weight = weight.view(len(weight), heads, -1)
    return torch.einsum("ohd,op,phe->hde", weight, metric[0], weight)


def elimination_of(
    model: nn.Module, group: Group, moments: Mapping[str, ChannelMoments], metrics: Mapping[str, Tensor]
) -> Elimination:
    """The last dimensions first, each of which loses ½ Σ σ² over the heads.

    Of queries and keys that is half the squared change of qᵀk, a token's mean: a curve up to its scale.

    Args:
        model: turned.
        group: of it.
        moments: of it.
        metrics: of the output layers.
    """
    sums = moments[group.consumers[0].name].channels
    if group.part == QUERIES:
        half = group.times // 2
        first = sums.covariance[:half].diagonal(dim1=1, dim2=2) + sums.mean[:half].square()
        second = sums.covariance[half:].diagonal(dim1=1, dim2=2)
    else:
        name = group.consumers[0].name
        grams = gram_blocks(model.get_submodule(name), metrics[name], group.times)
        first = grams.diagonal(dim1=1, dim2=2)
        second = sums.covariance[0].diagonal().view(group.times, -1)
    lost = (first * second).sum(0).flip(0).cumsum(0).flip(0) / 2
    return Elimination(tuple(reversed(range(group.width))), np.append(lost.cpu().numpy(), 0.0))
