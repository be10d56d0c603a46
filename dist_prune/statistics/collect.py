"""What a method needs to know of a network, collected once, kept on disk, and reused where it fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_prune.config.run import DATA_FREE, MethodConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import Site, View
from dist_prune.statistics.curvature import STEPS, Objective, collect_curvature
from dist_prune.statistics.moments import (
    Moments,
    StatisticsError,
    Sums,
    Watch,
    accumulating,
    collect_moments,
    full_float32,
    sum_moments,
    unwatched,
)
from dist_prune.statistics.probes import LOSSES, Probing, collect_global, collect_sampled
from dist_prune.utils.files import replacing, require_intact, seal

T = TypeVar("T")

Batches = Callable[[int], Iterable[Batch]]  # at most so many images (0: all) → this rank's share of them


class Passes:
    """How the passes over the images are made: here, one after another, from beginning to end."""

    def watch(self, batches: Iterable[T], sums: Mapping[str, Sums]) -> Iterable[T]:
        """Hand a pass its batches; see `moments.Watch`."""
        return unwatched(batches, sums)

    def finished(self) -> dict[str, Moments] | None:
        """The moments of a pass that another follows, if it was finished before."""
        return None

    def keep(self, moments: dict[str, Moments]) -> None:
        """Take note of what `finished` is to give."""


@dataclass(frozen=True)
class Statistics:
    """Of each site over all images: the moments of its rows, and, if the method has one, a (g, k, k) matrix."""

    moments: Mapping[str, Moments] = field(default_factory=dict)
    curvature: Mapping[str, Tensor] = field(default_factory=dict)


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    world: World,
    method: MethodConfig,
    seed: int,
    passes: Passes | None = None,
) -> Statistics:
    """Run the passes that the method needs: none, one forward, or one more with a backward.

    Args:
        model: the dense network, on the world's device.
        sites: where to look.
        batches: opens the statistics' images.
        world: the ranks to sum over.
        method: which statistics.
        seed: of random draws, which are keyed by image.
        passes: how they are made.

    Raises:
        StatisticsError: see `collect_moments`, `collect_curvature`, `collect_global`.
    """
    if method.method in DATA_FREE:
        return Statistics()
    views = [View(site, method.side, method.chunk_mb << 20) for site in sites]
    passes = passes or Passes()
    watch, bf16 = passes.watch, method.statistics_bf16
    if method.method == "fisher":
        # Moments and gradients from one pass: this metric needs no mean.
        step, objective = STEPS["fisher"], _objective(method, seed)
        with accumulating(model, views, world.device) as accumulators, full_float32():
            both = partial(_watched_together, watch, {f"moments/{name}": a for name, a in accumulators.items()})
            curvature = collect_curvature(model, views, batches(0), world, step, objective, None, both, bf16)
        return Statistics(sum_moments({n: a.moments() for n, a in accumulators.items()}, world), curvature)
    moments = passes.finished() or collect_moments(
        model, views, (batch.images for batch in batches(0)), world, watch, bf16
    )
    passes.keep(moments)
    means = {name: m.mean for name, m in moments.items()}
    if method.probing:
        gather = collect_sampled if method.sampled else collect_global
        probing = Probing(LOSSES[method.loss], seed, method.rank_loss)
        return Statistics(moments, gather(model, views, batches(method.probes), world, probing, means, watch))
    if method.method in STEPS:
        step, objective = STEPS[method.method], _objective(method, seed)
        curvature = collect_curvature(model, views, batches(0), world, step, objective, means, watch, bf16)
        return Statistics(moments, curvature)
    return Statistics(moments)


def _objective(method: MethodConfig, seed: int) -> Objective:
    if method.method == "gradient":
        return Objective("task")
    return Objective(method.loss.removesuffix("-reverse"), method.draws, seed)  # both KLs have one Hessian


def _watched_together(
    watch: Watch, others: Mapping[str, Sums], batches: Iterable[T], sums: Mapping[str, Sums], /
) -> Iterable[T]:
    return watch(batches, {**sums, **others})


def warnings(statistics: Statistics, sites: Sequence[Site], method: MethodConfig, images: int) -> list[str]:
    """What leaves directions undetermined: fewer rows, or fewer probes, than dimensions; sites named."""
    text = []
    for site in sites:
        width = View(site, method.side).width
        rows = int(statistics.moments[site.name].count) if site.name in statistics.moments else width
        if rows < width:
            text.append(
                f"{site.name}: {rows} rows for {width} dimensions, the covariance is rank-deficient; "
                f"raise --statistics-images"
            )
        probes = min(method.probes, images) // site.groups
        if method.probing and probes < width:
            text.append(
                f"{site.name}: {probes} probes for {width} dimensions, the Hessian is rank-deficient; "
                f"raise --probes"
            )
    return text


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, statistics: Statistics, made_of: Mapping[str, Any]) -> None:
    """Write the sums, with what they were made of, and a checksum beside the file."""
    tensors = {f"curvature/{name}": matrix for name, matrix in statistics.curvature.items()}
    for name, m in statistics.moments.items():
        parts = {"count": m.count, "shift": m.shift, "total": m.total, "outer": m.outer}
        tensors |= {f"moments/{part}/{name}": tensor for part, tensor in parts.items()}
    with replacing(path) as aside:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, aside, {"made_of": json.dumps(made_of)})
    seal(path)


def load(path: Path, sites: Sequence[Site], made_of: Mapping[str, Any], device: torch.device) -> Statistics:
    """Read statistics that fit.

    Raises:
        CheckpointError: absent or damaged.
        StatisticsError: made of something else (what differs is text), or a site is not in it.
    """
    require_intact(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            before = json.loads(file.metadata()["made_of"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except Exception as error:
        raise StatisticsError(f"--statistics {path}: not a statistics file ({error})") from error
    differing = [key for key in made_of if before.get(key) != made_of[key]]
    if differing:
        text = "; ".join(f"{key}: {before.get(key)} there, {made_of[key]} here" for key in differing)
        raise StatisticsError(f"--statistics {path} does not fit this run: {text}; leave the flag out")
    moments = {}
    for site in sites:
        parts = [f"moments/{part}/{site.name}" for part in ("count", "shift", "total", "outer")]
        if parts[0] not in tensors:
            raise StatisticsError(
                f"--statistics {path} has no {site.name}; collect again, or choose fewer --sites"
            )
        moments[site.name] = Moments(*(tensors[part] for part in parts))
    found = {site.name: tensors.get(f"curvature/{site.name}") for site in sites}
    return Statistics(moments, {name: matrix for name, matrix in found.items() if matrix is not None})


def origin(method: MethodConfig, model_digest: str, data_digest: str, image: Any, seed: int) -> dict[str, Any]:  # noqa: ANN401
    """What statistics depend on, beyond rounding: plain types, to be compared."""
    random = method.method not in ("pca", "whitened-svd", "gradient")
    return {
        "model": model_digest,
        "images": data_digest,
        "image": image,
        "method": method.method,
        "side": method.side,
        "loss": method.loss if random else None,
        "sampled": method.sampled,
        "rank_loss": method.rank_loss,
        "draws": method.draws if random and not method.probing else None,
        "probes": method.probes if method.probing else None,
        "bf16": method.statistics_bf16 or None,
        "seed": seed if random else None,
    }
