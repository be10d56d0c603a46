"""Each factored site alone: its time against its MACs, and what was measured to make the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from dist_prune.factorization.execution import PLAIN, Execution
from dist_prune.factorization.forms import FORMS, format_ranks
from dist_prune.factorization.latency import LayerInput, inputs_of, sample_calls
from dist_prune.network.factored import Factored
from dist_prune.network.sites import Site

NEAR = 0.1  # a time ratio within so much of the MACs' ratio needs no reason
DOUBTFUL = 0.3  # all layers and each of them, timed apart, may differ by so much of the former


@dataclass(frozen=True)
class SiteSpeed:
    """One factored site alone, at its real shape: milliseconds of a batch, and why they are not as its MACs.

    Attributes:
        site: its name.
        rank: the smallest of its ranks.
        macs_ratio: factored ÷ dense.
        dense: the dense layer.
        pair: all layers in a row.
        reduce: the first of them.
        expand: the last.
        reason: empty where time follows MACs.
        core: the layer in the middle, where the form has one.
        label: form and ranks.
    """

    site: str
    rank: int
    macs_ratio: float
    dense: float
    pair: float
    reduce: float
    expand: float
    reason: str
    core: float = 0.0
    label: str = ""

    @property
    def time_ratio(self) -> float:
        """Factored ÷ dense."""
        return self.pair / self.dense


@dataclass(frozen=True)
class _Times:
    """Seconds of a site: dense, factored, each of its layers, and moving the data of each alone."""

    dense: float
    pair: float
    layers: tuple[float, ...]
    moves: tuple[float, ...]

    @staticmethod
    def total(calls: Sequence[_Times]) -> _Times:
        """Of all calls of one forward pass."""
        layers, moves = (
            tuple(map(sum, zip(*each, strict=True)))
            for each in ([c.layers for c in calls], [c.moves for c in calls])
        )
        return _Times(sum(c.dense for c in calls), sum(c.pair for c in calls), layers, moves)


def time_pairs(
    dense: nn.Module,
    compressed: nn.Module,
    sites: Sequence[Site],
    images: Tensor,
    execution: Execution = PLAIN,
) -> tuple[SiteSpeed, ...]:
    """Each factored site alone, at the shapes that it has for these images; equal layers are timed once.

    A pair is given what it is given in the compressed network, whose channels may be fewer.
    """
    factored = {site: compressed.get_submodule(site.name) for site in sites}
    pairs = {site: pair for site, pair in factored.items() if isinstance(pair, Factored)}
    wide, narrow = (inputs_of(network, list(pairs), images, execution) for network in (dense, compressed))
    call = _seconds_of_a_call(images)
    known: dict[tuple[str, ...], _Times] = {}
    found = []
    for site, pair in pairs.items():
        layer, times = dense.get_submodule(site.name), []
        for both in zip(wide[site.name], narrow[site.name], strict=True):
            key = (repr(layer), repr(pair), str(both))
            if key not in known:
                with torch.no_grad(), execution.autocast(images.device):
                    known[key] = _time_pair(layer, pair, *(_random(each, images) for each in both))
            times.append(known[key])
        found.append(_site_speed(site, pair, _Times.total(times), call * len(times)))
    return tuple(found)


def _seconds_of_a_call(like: Tensor) -> float:
    """What a layer takes that has next to nothing to compute."""
    layer = nn.Conv2d(1, 1, 1, device=like.device, dtype=like.dtype)
    x = like.new_ones(1, 1, 1, 1)
    with torch.no_grad():
        return median(sample_calls([lambda: layer(x)], like.device)[0])


def _random(given: LayerInput, like: Tensor) -> Tensor:
    return like.new_empty(given.shape, dtype=given.dtype).normal_()


def _time_pair(dense: nn.Module, pair: Factored, wide: Tensor, x: Tensor) -> _Times:
    maps = [x]
    for layer in pair:
        maps.append(layer(maps[-1]))
    each = list(zip(maps, pair, maps[1:], strict=False))
    calls: list[Callable[[], object]] = [lambda: dense(wide), lambda: pair(x)]
    calls += [partial(layer, given) for given, layer, _ in each]
    calls += [_move(given, layer, made) for given, layer, made in each]
    whole, both, *rest = map(median, sample_calls(calls, x.device))
    return _Times(whole, both, tuple(rest[: len(each)]), tuple(rest[len(each) :]))


def _move(x: Tensor, layer: nn.Module, y: Tensor) -> Callable[[], object]:
    """A copy that reads and writes as many bytes as the layer must: its input, weights and output."""
    numbers = x.numel() + y.numel() + sum(p.numel() for p in layer.parameters())
    source = x.new_ones(max(1, numbers // 2))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _as_compressed(site: Site, pair: Factored) -> Site:
    """The site as the pair has it: channels may have been removed before it was factored."""
    first, last = (layer.get_parameter("weight").shape for layer in (pair[0], pair[-1]))
    return replace(site, inputs=first[1] * site.kernel[0] * site.kernel[1], outputs=last[0])


def _site_speed(site: Site, pair: Factored, times: _Times, call: float) -> SiteSpeed:
    form = FORMS[pair.form]
    ranks = tuple(layer.get_parameter("weight").shape[0] for layer in list(pair)[:-1])
    shares = [macs / site.macs for macs in form.layer_macs(_as_compressed(site, pair), ranks)]
    ratio = sum(shares)
    parts = [_Part(*each) for each in zip(form.layers, times.layers, times.moves, shares, strict=True)]
    dense, both, first, *core, last = (1e3 * t for t in (times.dense, times.pair, *times.layers))
    label = format_ranks(ranks) if form.name == "output" else f"{form.name} {format_ranks(ranks)}"
    return SiteSpeed(
        site.name,
        min(ranks),
        ratio,
        dense,
        both,
        first,
        last,
        _reason(times, ratio, parts, call),
        sum(core),
        label,
    )


def _reason(times: _Times, ratio: float, parts: Sequence[_Part], call: float) -> str:
    excess = times.pair / times.dense - ratio
    if abs(excess) <= NEAR:
        return ""
    if excess < 0:
        return "faster than its MACs"
    if abs(sum(times.layers) - times.pair) > DOUBTFUL * times.pair:
        return "unclear: the machine is busy, or the layers gain from one another's cache"
    return max(parts, key=lambda part: part.excess(times.dense)).reason(times.dense, call)


@dataclass(frozen=True)
class _Part:
    """One layer of a factored site: its seconds, those of moving its data, its share of the dense MACs."""

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
