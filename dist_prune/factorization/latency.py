"""How long each site takes, dense and factored: measured on this device, at the real shapes, kept on disk.

The pass as a whole is measured too; what is no site takes the time that it took. All is measured in the precision
that passes will have, see `Execution`.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.factorization.execution import PLAIN, Execution
from dist_prune.factorization.forms import FORMS, Ranks
from dist_prune.factorization.knapsack import Floats, Ints
from dist_prune.network.memory_format import layout_of
from dist_prune.network.sites import Site, evaluating, given_to
from dist_prune.utils.files import cache_folder, name_of, require_writable, write_text
from dist_prune.utils.text import read_text

Calls = Sequence[Callable[[], object]]

CANDIDATES = 8  # ranks measured for each site; those between are interpolated
WARM_UP = 3  # calls before any is timed
SAMPLE_S = 1e-3  # seconds of one sample at least, of as many calls as needed
SHAPE_S = 1.0  # seconds of all samples of one shape together, about
ROUNDS = (3, 15)  # samples of each call, at least and at most


class LayerInput(NamedTuple):
    """What a layer is given in one of its calls."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """One site in one form: nanoseconds of one batch when dense, and of the chain at each of `ranks`.

    Of a form with two ranks, `ranks` are all combinations of some first and some second ones, in order.
    """

    dense: int
    ranks: tuple[Ranks, ...] = ()
    chains: tuple[int, ...] = ()

    def at(self, columns: Sequence[Ints]) -> Floats:
        """At other ranks, an array for each rank of the form: on straight lines between measured ones."""
        if not len(columns[0]):
            return np.zeros(0)
        if len(columns) == 1:
            return np.interp(columns[0], [r for (r,) in self.ranks], self.chains)
        first, second = (sorted({ranks[i] for ranks in self.ranks}) for i in (0, 1))
        grid = np.reshape(self.chains, (len(first), len(second)))
        rows = np.stack([np.interp(columns[1], second, row) for row in grid])  # at each first rank
        places = np.interp(columns[0], first, np.arange(len(first)))
        low = np.minimum(places.astype(int), max(0, len(first) - 2))
        high, every = np.minimum(low + 1, len(first) - 1), np.arange(len(places))
        found: Floats = rows[low, every] + (places - low) * (rows[high, every] - rows[low, every])
        return found


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of one batch: of the `whole` dense network, and of each site in each form, site → form → timing.

    Layers timed alone may sum to more than the pass they are part of; then all are scaled down to it.
    """

    whole: int
    sites: Mapping[str, Mapping[str, Timing]]

    @property
    def _scale(self) -> float:
        return min(1.0, self.whole / max(1, sum(self._dense(site) for site in self.sites)))

    def _dense(self, site: str) -> int:
        return next(iter(self.sites[site].values())).dense

    def dense(self, site: str) -> int:
        """Of the dense layer."""
        return math.floor(self._scale * self._dense(site))

    def option(self, site: str, form: str, columns: Sequence[Ints]) -> Ints:
        """Of the chain at these ranks, an array for each rank of the form.

        Each form was timed beside the dense layer: what the machine's pace was then is divided out.
        """
        timing = self.sites[site][form]
        pace = self._dense(site) / max(1, timing.dense)
        return np.ceil(self._scale * pace * timing.at(columns)).astype(np.int64)

    def predicted(self, chosen: Mapping[str, tuple[str, Ranks]]) -> int:
        """Of the whole network when these sites are factored: site → form and ranks."""
        saved = (
            self.dense(name) - int(self.option(name, form, [np.array([r]) for r in ranks])[0])
            for name, (form, ranks) in chosen.items()
        )
        return self.whole - sum(saved)


def format_time(nanoseconds: int) -> str:
    """For people: `0.41 ms`."""
    return f"{nanoseconds / 1e6:.3g} ms"


def candidates(columns: Sequence[Ints]) -> tuple[Ranks, ...]:
    """Of a form's ranks the ones to measure: the first, the last, and some evenly between, of each rank."""
    each = CANDIDATES if len(columns) == 1 else CANDIDATES // 2
    axes = []
    for column in columns:
        every = np.unique(column)
        places = np.linspace(0, len(every) - 1, min(each, len(every)))
        axes.append([int(every[i]) for i in places.round().astype(int)])
    return tuple(itertools.product(*axes))


def measure(
    model: nn.Module,
    options: Mapping[Site, Mapping[str, Sequence[Ints]]],
    images: Tensor,
    folder: Path | None = None,
    execution: Execution = PLAIN,
) -> LatencyTable:
    """Time the network, and each site in each form at some of its ranks, on this process's device.

    Layers of equal shape are measured once. What was measured before, with the same shapes, batch, types,
    precision, device, threads and version of torch, is read from `folder` (by default in `files.cache_folder`).

    Args:
        model: the dense network, its kernels in the memory format to be timed; left as it was.
        options: of each site its forms, and of each form the ranks that may be chosen, an array for each rank.
        images: (N, 3, H, W): the batch to time, on the network's device.
        folder: of the cache.
        execution: the precision; nothing is compiled.
    """
    like = _like(model, images.device, execution)
    folder, images = folder or cache_folder() / "latency", like.laid_out(images)
    given = inputs_of(model, list(options), images, execution)
    key = [repr(model), str(tuple(images.shape)), str(images.dtype), *like.key]
    whole = _kept(folder, key, lambda: Timing(_time_whole(model, images, execution)))
    timings = {}
    for site, forms in options.items():
        module, found = model.get_submodule(site.name), dict[str, Timing]()
        for form, columns in (forms or {"output": []}).items():  # the dense layer is timed in any case
            chosen = candidates(columns) if columns else ()
            calls = [_timing(folder, module, form, chosen, like, each) for each in given[site.name]]
            chains = tuple(sum(column) for column in zip(*(c.chains for c in calls), strict=True))
            found[form] = Timing(sum(c.dense for c in calls), chosen, chains)
        timings[site.name] = found
    return LatencyTable(whole.dense, timings)


def time_share(dense: nn.Module, compressed: nn.Module, images: Tensor, execution: Execution = PLAIN) -> float:
    """What part of the dense network's time the compressed one takes, (N, …) `images` through both in turns."""
    device = images.device
    images = _like(dense, device, execution).laid_out(images)
    if execution.compiled:
        torch.compiler.reset()  # what is compiled counts by function, not by network, and after eight runs eagerly
    with evaluating(dense), evaluating(compressed), execution.autocast(device):
        calls = [partial(execution.network(network), images) for network in (dense, compressed)]
        taken = sample_calls(calls, device, ROUNDS[1])
    ratios = [after / before for before, after in zip(*taken, strict=True)]
    return float(median(ratios))


@dataclass(frozen=True)
class _Like:
    """Device, type, memory format and precision of layers: those of the network that is timed."""

    dtype: torch.dtype
    device: torch.device
    layout: torch.memory_format
    execution: Execution

    def laid_out(self, x: Tensor) -> Tensor:
        """The same, if it has height and width, in the network's memory format."""
        return x.contiguous(memory_format=self.layout) if x.dim() == 4 else x

    @property
    def key(self) -> list[str]:
        """What a time depends on, besides the layer and its input."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"{platform.node()} {platform.processor()} {torch.get_num_threads()} threads"
        precision = "bfloat16 autocast" if self.execution.bf16 else "no autocast"
        return [str(self.layout), str(self.dtype), precision, "eager", device, torch.__version__]


def _like(model: nn.Module, device: torch.device, execution: Execution) -> _Like:
    return _Like(next(model.parameters()).dtype, device, layout_of(model), execution)


def _time_whole(model: nn.Module, images: Tensor, execution: Execution) -> int:
    with evaluating(model), execution.autocast(images.device):
        return time_calls([lambda: model(images)], images.device)[0]


def _timing(
    folder: Path, module: nn.Module, form: str, ranks: tuple[Ranks, ...], like: _Like, given: LayerInput
) -> Timing:
    """One call of a site in a form with an input like this one."""

    def timed() -> Timing:
        x = like.laid_out(torch.randn(given.shape, device=like.device).to(given.dtype))
        layers = [module, *(FORMS[form].build(module, each) for each in ranks)]
        with torch.no_grad(), like.execution.autocast(like.device):
            dense, *times = time_calls([partial(layer, x) for layer in layers], like.device)
        return Timing(dense, ranks, tuple(times))

    key = [repr(module), str(given.shape), str(given.dtype), form, str(ranks), *like.key]
    return _kept(folder, key, timed)


def inputs_of(
    model: nn.Module, sites: Sequence[Site], images: Tensor, execution: Execution = PLAIN
) -> dict[str, list[LayerInput]]:
    """What each site is given, one for each of its calls in a forward pass."""
    given: dict[str, list[LayerInput]] = {site.name: [] for site in sites}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = given_to(args, kwargs)
            given[name].append(LayerInput(tuple(x.shape), x.dtype))

        return hook

    modules = {name: model.get_submodule(name) for name in given}
    hooks = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with evaluating(model), execution.autocast(images.device):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return given


# ── the clock ──────────────────────────────────────────────────────────────────────────────────────────────


def time_calls(calls: Calls, device: torch.device) -> list[int]:
    """Nanoseconds of each call: the median of its samples, see `sample_calls`."""
    return [round(1e9 * median(samples)) for samples in sample_calls(calls, device)]


def sample_calls(calls: Calls, device: torch.device, least: int = ROUNDS[0]) -> list[list[float]]:
    """Seconds of each call, several samples, taken in turn, so that a slow moment strikes all alike.

    Args:
        calls: what to time.
        device: whose work to wait for.
        least: rounds, at least.
    """
    for call in calls:
        _sample(call, WARM_UP, device)
    once = [_sample(call, 1, device) for call in calls]
    times = [max(1, math.ceil(SAMPLE_S / seconds)) for seconds in once]
    one_round = sum(n * seconds for n, seconds in zip(times, once, strict=True))
    rounds = max(least, min(ROUNDS[1], int(SHAPE_S / one_round)))
    samples = [[_sample(call, n, device) for call, n in zip(calls, times, strict=True)] for _ in range(rounds)]
    return [list(column) for column in zip(*samples, strict=True)]


def _sample(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call, averaged over a few in a row; on CUDA until the device is done."""
    started = now(device)
    for _ in range(times):
        call()
    return max((now(device) - started) / times, 1e-9)


def now(device: torch.device) -> float:
    """Seconds, of no fixed beginning, when the device has done what it was given.

    On the CPU with one thread they are this thread's own, so that others on the machine matter less: of wall
    seconds, long calls would lose more to them than short ones.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(folder: Path, key: list[str], measured: Callable[[], Timing]) -> Timing:
    """Read the timing of this key, or measure and keep it."""
    path = folder / f"{name_of(key)}.json"
    known = _read(path, key)
    if known is None:
        require_writable(folder, "name another place with DIST_PRUNE_CACHE")
        known = measured()
        content = {"key": key, "dense": known.dense, "ranks": known.ranks, "chains": known.chains}
        write_text(path, json.dumps(content, indent=1) + "\n")
    return known


def _read(path: Path, key: list[str]) -> Timing | None:
    """None where there is none, or not one of this key."""
    try:
        content = json.loads(read_text(path))
        if content["key"] != key:
            return None
        return Timing(int(content["dense"]), tuple(map(tuple, content["ranks"])), tuple(content["chains"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
