"""Each factored site alone: its time against its MACs, and what was measured to make the difference."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import median

import torch
from torch import Tensor, nn

from dist_prune.factorization.latency import input_shapes, sample_calls
from dist_prune.network.sites import Factored, Site

NEAR = 0.1  # a time ratio within so much of the MACs' ratio needs no reason
DOUBTFUL = 0.3  # the pair and its two layers, timed apart, may differ by so much of the pair's time


@dataclass(frozen=True)
class SiteSpeed:
    """One factored site alone, at its real shape: milliseconds of a batch, and why they are not as its MACs.

    `reduce` and `expand` are the two layers of the pair, `pair` both in a row. `reason` is empty where time
    follows MACs.
    """

    site: str
    rank: int
    macs_ratio: float
    dense: float
    pair: float
    reduce: float
    expand: float
    reason: str

    @property
    def time_ratio(self) -> float:
        """Pair ÷ dense."""
        return self.pair / self.dense


@dataclass(frozen=True)
class _Times:
    """Seconds of one call of a site: dense, as a pair, its two layers, and moving the data of these two alone."""

    dense: float
    pair: float
    reduce: float
    expand: float
    reduce_moves: float
    expand_moves: float

    def __add__(self, other: _Times) -> _Times:
        return _Times(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def time_pairs(
    dense: nn.Module, compressed: nn.Module, sites: Sequence[Site], images: Tensor
) -> tuple[SiteSpeed, ...]:
    """Each factored site alone, at the shapes that it has for these images; equal layers are timed once."""
    factored = {site: compressed.get_submodule(site.name) for site in sites}
    pairs = {site: pair for site, pair in factored.items() if isinstance(pair, Factored)}
    shapes = input_shapes(dense, list(pairs), images)
    call = _seconds_of_a_call(images)
    known: dict[tuple[str, ...], _Times] = {}
    found = []
    for site, pair in pairs.items():
        layer, times = dense.get_submodule(site.name), []
        for shape in shapes[site.name]:
            key = (repr(layer), repr(pair), str(shape))
            if key not in known:
                known[key] = _time_pair(layer, pair, images.new_empty(shape).normal_())
            times.append(known[key])
        found.append(_site_speed(site, pair, functools.reduce(operator.add, times), call * len(times)))
    return tuple(found)


def _seconds_of_a_call(like: Tensor) -> float:
    """What a layer takes that has next to nothing to compute."""
    layer = nn.Conv2d(1, 1, 1, device=like.device, dtype=like.dtype)
    x = like.new_ones(1, 1, 1, 1)
    with torch.no_grad():
        return median(sample_calls([lambda: layer(x)], like.device)[0])


def _time_pair(dense: nn.Module, pair: Factored, x: Tensor) -> _Times:
    with torch.no_grad():
        h = pair.reduce(x)
        y = pair.expand(h)
        moves = [_move(x, layer, z) for x, layer, z in ((x, pair.reduce, h), (h, pair.expand, y))]
        calls: list[Callable[[], object]] = [lambda: dense(x), lambda: pair(x)]
        calls += [lambda: pair.reduce(x), lambda: pair.expand(h), *moves]
        return _Times(*map(median, sample_calls(calls, x.device)))


def _move(x: Tensor, layer: nn.Module, y: Tensor) -> Callable[[], object]:
    """A copy that reads and writes as many bytes as the layer must: its input, weights and output."""
    numbers = x.numel() + y.numel() + sum(p.numel() for p in layer.parameters())
    source = x.new_ones(max(1, numbers // 2))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _site_speed(site: Site, pair: Factored, times: _Times, call: float) -> SiteSpeed:
    rank = next(pair.reduce.parameters()).shape[0]
    share = [rank * inputs / site.dense_weights for inputs in (site.inputs, site.width)]
    ratio = sum(share)
    parts = [
        _Part("reduce", times.reduce, times.reduce_moves, share[0]),
        _Part("expand", times.expand, times.expand_moves, share[1]),
    ]
    dense, both, reduce, expand = (1e3 * t for t in (times.dense, times.pair, times.reduce, times.expand))
    return SiteSpeed(site.name, rank, ratio, dense, both, reduce, expand, _reason(times, ratio, parts, call))


def _reason(times: _Times, ratio: float, parts: Sequence[_Part], call: float) -> str:
    excess = times.pair / times.dense - ratio
    if abs(excess) <= NEAR:
        return ""
    if excess < 0:
        return "faster than its MACs"
    if abs(times.reduce + times.expand - times.pair) > DOUBTFUL * times.pair:
        return "unclear: the machine is busy, or the layers gain from one another's cache"
    return max(parts, key=lambda part: part.excess(times.dense)).reason(times.dense, call)


@dataclass(frozen=True)
class _Part:
    """One layer of a pair: its seconds, those of moving its data, and its share of the dense layer's MACs."""

    name: str
    seconds: float
    moves: float
    share: float

    def excess(self, dense: float) -> float:
        """Seconds beyond its share of the dense layer's."""
        return self.seconds - self.share * dense

    def reason(self, dense: float, call: float) -> str:
        """Why it takes longer than that share: what was measured to be most of it."""
        if call >= self.excess(dense) / 2:
            return f"{self.name}: a call more"
        if self.moves >= self.seconds / 2:
            return f"{self.name}: moves data, {self.moves / self.seconds:.0%} of its time"
        return f"{self.name}: {self.share * dense / self.seconds:.0%} of the dense layer's MACs a second"
