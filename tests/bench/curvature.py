"""What curvature costs: one pass for all sites against forward + backward, and against one site at a time.

    uv run python -m tests.bench.curvature [--device cuda] [--rounds N] [--quick]

Synthetic images, random weights. The one-site-at-a-time way (`hessian-local --sampled`: forward and double
backward for each site and batch) is measured on three sites and extrapolated to all, as its time is one term a
site. Its error and the closed form's are measured against a reference over many images with exact expectations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World, joined
from dist_prune.network.models import build
from dist_prune.network.sites import Survey, View, survey
from dist_prune.statistics.curvature import STEPS, Objective, collect_curvature
from dist_prune.statistics.moments import collect_moments
from dist_prune.statistics.probes import LOSSES, Probing, collect_sampled
from tests.bench.speed import CPU, Setting, bytes_so_far, forward, images_of, network, run
from tests.bench.timing import Row, interleaved, seconds
from tests.ranks import run_alone

RESULT = Path(__file__).parent / "results" / "curvature.json"
SITES = ("layer1.0.conv2", "layer2.1.conv1", "layer3.1.conv2")  # of ResNet-18, one of each width but the last
TARGETS = {"fisher": 1.2, "gradient": 1.2, "hessian-local": 1.4}


def against_backward(setting: Setting, kind: str) -> Row:
    """One curvature pass over all sites against forward + backward of the same batches."""
    with joined(setting.device) as world:
        data = batch_of(setting, setting.forward_size)
        ours, plain = both_passes(world, network(setting), [data] * max(1, setting.batches // 2), kind)
        taken = interleaved(ours, plain, setting.rounds, setting.place, setting.clock())
    return taken.row(f"{kind} ÷ forward + backward", TARGETS[kind], setting.describe(setting.forward_size))


def both_passes(
    world: World, model: nn.Module, batches: list[Batch], kind: str, bf16: bool = False
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A curvature pass over all sites, and forward + backward; of the same batches."""
    views = _views(model.eval(), batches[0])
    means = _means(model, views, batches[0], world)
    objective = Objective("task" if kind == "gradient" else "kl")
    ours = partial(collect_curvature, model, views, batches, world, STEPS[kind], objective, means, bf16=bf16)
    return ours, partial(_forward_backward, model, batches, bf16)


def against_one_site_at_a_time(setting: Setting) -> Row:
    """All sites in closed form against all sites one by one, at the same images."""
    with joined(setting.device) as world:
        model, data = network(setting).eval(), batch_of(setting, setting.forward_size)
        views = _views(model, data)
        means = _means(model, views, data, world)
        few = [view for view in views if view.site.name in SITES]
        closed = partial(
            collect_curvature, model, views, [data], world, STEPS["hessian-local"], Objective("kl"), means
        )
        sampled = partial(collect_sampled, model, few, [data], world, Probing(LOSSES["kl"]), means)
        pair = interleaved(closed, sampled, max(2, setting.rounds // 3), setting.place, setting.clock())
    row = pair.row("hessian-local ÷ one site at a time", 1 / 20, setting.describe(setting.forward_size))
    scale = len(few) / len(views)
    detail = f"{row.detail}; {len(few)} sites measured, extrapolated to {len(views)}"
    return replace(row, ratio=row.ratio * scale, low=row.low * scale, high=row.high * scale, detail=detail)


def at_equal_error(setting: Setting) -> Row:
    """The same at equal error of M: both errors fall as 1/√n, so time goes with the square of their ratio."""
    with joined(setting.device) as world:
        model = build("resnet20", 10).eval().to(setting.place)
        count = 32 * setting.images
        pool = _small(setting, 8 * count, 0)
        views = _views(model, pool)
        means = _means(model, views, pool, world)
        chosen = [
            view for view in views if view.site.name in ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2")
        ]
        step = STEPS["hessian-local"]
        exact = collect_curvature(model, chosen, [pool], world, step, Objective("kl", draws=0), means)
        part = Batch(pool.images[:count], pool.labels[:count], pool.indices[:count])
        closed = collect_curvature(model, chosen, [part], world, step, Objective("kl"), means)
        sampled = collect_sampled(model, chosen, [part], world, Probing(LOSSES["kl"]), means)
        closed_s = seconds(
            lambda: collect_curvature(model, views, [part], world, step, Objective("kl"), means),
            setting.place,
            setting.clock(),
        )
        sampled_s = seconds(
            lambda: collect_sampled(model, chosen, [part], world, Probing(LOSSES["kl"]), means),
            setting.place,
            setting.clock(),
        )
    images = [(_error(closed[n], exact[n]) / _error(sampled[n], exact[n])) ** 2 for n in exact]
    times = closed_s / (sampled_s * len(views) / len(chosen))
    ratios = sorted(times * share for share in images)
    detail = f"resnet20 at 32², {count} of {8 * count} images; sites {', '.join(exact)}"
    return Row("… at equal error of M", ratios[len(ratios) // 2], ratios[0], ratios[-1], 1 / 100, detail)


def patches_memory(setting: Setting) -> Row:
    """Peak memory that the input side's moments add to the forward pass, GiB; at most 1."""
    ours, plain = (run_alone(partial(_peak, setting, collect)) for collect in (True, False))
    extra = (ours - plain) / 2**30
    detail = f"{setting.describe(setting.forward_size)}; GiB above the forward pass, Gram matrices included"
    return Row("input side: extra memory", extra, extra, extra, 1.0, detail)


def _peak(setting: Setting, collect: bool) -> int:
    torch.set_num_threads(1)
    with joined(setting.device) as world:
        model, images = network(setting), images_of(setting, setting.forward_size)
        views = [View(site, "input") for site in _survey(model, images).sites]
        before = bytes_so_far(world.device)
        if collect:
            collect_moments(model, views, [images], world)
        else:
            forward(model, [images])
        return bytes_so_far(world.device) - before


def _forward_backward(model: nn.Module, batches: list[Batch], bf16: bool) -> None:
    for data in batches:
        with torch.autocast(data.images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(data.images)
        torch.autograd.backward(F.cross_entropy(logits.float(), data.labels))
        model.zero_grad()


def batch_of(setting: Setting, size: int) -> Batch:
    images = images_of(setting, size)
    index = torch.arange(len(images), device=images.device)
    return Batch(images, index, index)


def _small(setting: Setting, count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(setting.place)
    index = torch.arange(count, device=setting.place)
    return Batch(images, index % 10, index)


def _survey(model: nn.Module, images: Tensor) -> Survey:
    return survey(model, images[:1]).select("@conv")


def _views(model: nn.Module, data: Batch) -> list[View]:
    return [View(site) for site in _survey(model, data.images).sites]


def _means(model: nn.Module, views: list[View], data: Batch, world: World) -> Mapping[str, Tensor]:
    return {name: m.mean for name, m in collect_moments(model, views, [data.images], world).items()}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


MEASUREMENTS: tuple[Callable[[Setting], Row], ...] = (
    *(partial(against_backward, kind=kind) for kind in TARGETS),
    against_one_site_at_a_time,
    at_equal_error,
    patches_memory,
)


if __name__ == "__main__":
    run(__doc__, "tests.bench.curvature", MEASUREMENTS, RESULT, replace(CPU, images=8, batches=4, rounds=5))
