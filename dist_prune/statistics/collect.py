"""The statistics of a method, collected once, saved to disk, and reused where they fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_prune.config.compression import DATA_FREE, MethodConfig
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
    sum_moments,
    unwatched,
)
from dist_prune.statistics.patches import PatchMoments, accumulating_patches, sum_patches
from dist_prune.statistics.probes import LOSSES, Probing, collect_global, collect_sampled
from dist_prune.utils.files import CheckpointError, replacing, require_intact, seal

T = TypeVar("T")

IMAGE_COUNT = "image_count"  # of what statistics were made of, for people

ONE_PASS = ("pca", "whitened-svd", "fisher")

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
        """Keep it for `finished`."""


@dataclass(frozen=True)
class Statistics:
    """Of each site over all images: the moments of its rows, and, if the method has one, a (g, k, k) matrix.

    `patches` are of the convolutions larger than 1×1, where they were asked for.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    curvature: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Mapping[str, PatchMoments] = field(default_factory=dict)


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches,
    world: World,
    method: MethodConfig,
    seed: int,
    passes: Passes | None = None,
    patches: bool = False,
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
        patches: whether patch moments are wanted, too; only from methods that make one pass.

    Raises:
        StatisticsError: see `collect_moments`, `collect_curvature`, `collect_global`.
    """
    if method.method in DATA_FREE:
        return Statistics()
    views = [View(site, method.side, method.chunk_mb << 20) for site in sites]
    passes = passes or Passes()
    watch, bf16 = passes.watch, runs_bf16(method, world.device) and _is_float32(model)
    if method.method in ONE_PASS:
        with accumulating_patches(model, sites if patches else (), world.device) as places:
            sums: dict[str, Sums] = {f"patches/{name}": each for name, each in places.items()}
            both, images = partial(_watched_together, watch, sums), batches(0)
            if method.method == "fisher":  # its metric needs no mean
                with accumulating(model, views, world.device) as accumulators:
                    sums |= {f"moments/{name}": each for name, each in accumulators.items()}
                    step, objective = STEPS["fisher"], _objective(method, seed)
                    curvature = collect_curvature(model, views, images, world, step, objective, None, both, bf16)
                moments = sum_moments({name: each.moments() for name, each in accumulators.items()}, world)
            else:
                rows, curvature = (batch.images for batch in images), {}
                moments = collect_moments(model, views, rows, world, both, bf16)
        return Statistics(moments, curvature, sum_patches({n: p.moments() for n, p in places.items()}, world))
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


def runs_bf16(method: MethodConfig, device: torch.device) -> bool:
    """Whether the network runs in bfloat16 autocast for the statistics: on GPUs that compute in it, by default.

    What is tried along random directions is a difference of outputs, and stays float32.
    """
    if device.type != "cuda" or method.statistics_float32 or method.probing:
        return method.statistics_bf16
    return method.statistics_bf16 or torch.cuda.is_bf16_supported(including_emulation=False)


def _is_float32(model: nn.Module) -> bool:
    """Whether autocast is meant for it: of a float16 network it would feed layers two kinds of numbers."""
    return all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


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
    widths = {site: View(site, method.side).width for site in sites}
    rows = {site: int(statistics.moments[site.name].count) for site in sites if site.name in statistics.moments}
    probes = {site: min(method.probes, images) // site.groups for site in sites if method.probing}
    return [
        f"fewer {what} than dimensions in {len(few)} layers ({', '.join(few)}): "
        f"their {matrices} are rank-deficient; raise {flag}"
        for what, counts, matrices, flag in (
            ("rows", rows, "covariances", "--statistics-images"),
            ("probes", probes, "Hessians", "--probes"),
        )
        if (few := [f"{s.name}: {n:,} for {widths[s]:,}" for s, n in counts.items() if n < widths[s]])
    ]


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────


def save(path: Path, statistics: Statistics, made_of: Mapping[str, Any]) -> None:
    """Write the sums, with what they were made of, and a checksum file."""
    tensors = {f"curvature/{name}": matrix for name, matrix in statistics.curvature.items()}
    for name, m in statistics.moments.items():
        parts = {"count": m.count, "shift": m.shift, "total": m.total, "outer": m.outer}
        tensors |= {f"moments/{part}/{name}": tensor for part, tensor in parts.items()}
    for name, patches in statistics.patches.items():
        tensors |= {f"patches/{part}/{name}": tensor for part, tensor in vars(patches).items()}
    with replacing(path) as aside:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, aside, {"made_of": json.dumps(made_of)})
    seal(path)


def require_fitting(path: Path, sites: Sequence[Site], made_of: Mapping[str, Any], patches: bool = False) -> None:
    """Look whether statistics are whole, and were made of what a run needs; with `patches`, of patches, too.

    Raises:
        CheckpointError: absent or damaged.
        StatisticsError: made of something else (what differs is said), or a site is not in it.
    """
    if not path.is_file():
        raise CheckpointError(f"--statistics {path}: there is no such file")
    require_intact(path)
    try:
        with safe_open(path, "pt") as file:
            before, names = json.loads(file.metadata()["made_of"]), set(file.keys())
    except Exception as error:
        raise StatisticsError(f"--statistics {path}: not a statistics file ({error})") from error
    differing = [key for key in made_of if key != IMAGE_COUNT and before.get(key) != made_of[key]]
    if differing:
        text = "; ".join(_difference(key, before, made_of) for key in differing)
        raise StatisticsError(f"--statistics {path} does not fit this run: {text}; leave the flag out")
    for site in sites:
        if f"moments/count/{site.name}" not in names:
            raise StatisticsError(
                f"--statistics {path} has no {site.name}; collect again, or choose fewer --sites"
            )
        if patches and site.kernel != (1, 1) and f"patches/{_PATCH_PARTS[0]}/{site.name}" not in names:
            raise StatisticsError(
                f"--statistics {path} has no patch moments of {site.name}, which other forms than output need; "
                f"collect again, or use --forms output"
            )


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, where digests would say nothing."""
    there, here = before.get(key), now[key]
    if key == "images":
        counts = [found.get(IMAGE_COUNT) for found in (before, now)]
        known = None not in counts and counts[0] != counts[1]
        return f"{counts[0]:,} images there, {counts[1]:,} here" if known else "other images there than here"
    if key == "model":
        return "another network there, or other weights"
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        parts = sorted(part for part in {*there, *here} if there.get(part) != here.get(part))
        return ", ".join(f"{part}: {there.get(part)} there, {here.get(part)} here" for part in parts)
    return f"{key}: {there} there, {here} here"


def load(
    path: Path, sites: Sequence[Site], made_of: Mapping[str, Any], device: torch.device, patches: bool = False
) -> Statistics:
    """Read statistics that fit; errors as `require_fitting`."""
    require_fitting(path, sites, made_of, patches)
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    moments = {}
    for site in sites:
        parts = [f"moments/{part}/{site.name}" for part in ("count", "shift", "total", "outer")]
        moments[site.name] = Moments(*(tensors[part] for part in parts))
    found = {site.name: tensors.get(f"curvature/{site.name}") for site in sites}
    curvature = {name: matrix for name, matrix in found.items() if matrix is not None}
    return Statistics(moments, curvature, _patches(sites, tensors) if patches else {})


_PATCH_PARTS = [part.name for part in fields(PatchMoments)]


def _patches(sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, PatchMoments]:
    spatial = [site.name for site in sites if site.kernel != (1, 1)]
    return {name: PatchMoments(*(tensors[f"patches/{part}/{name}"] for part in _PATCH_PARTS)) for name in spatial}


def origin(
    method: MethodConfig,
    model_digest: str,
    data_digest: str,
    image: Any,  # noqa: ANN401
    seed: int,
    bf16: bool = False,
    views: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What statistics depend on, beyond rounding: plain types, to be compared.

    `bf16` as `runs_bf16` says, `views` as `Views.described`.
    """
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
        "bf16": bf16 or None,
        "views": views,
        "seed": seed if random else None,
    }
