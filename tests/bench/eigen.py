"""What solving for the bases takes beside the pass that collects their statistics, on each of many ranks.

    uv run python -m tests.bench.eigen [--device cuda] [--rounds N] [--quick]

The default method, `pca` for all layers, at 224². Both are measured alone: the pass by image, and one solve of
every width that the network has, of a covariance whose spectrum falls as 1/i. Their seconds are then added up as
ranks share them: images evenly, each layer to one rank. `before` is what it was while rank 0 solved all layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torchvision

from dist_prune.distributed.world import joined
from dist_prune.factorization.bases import principal
from dist_prune.network.sites import View, survey
from dist_prune.statistics.moments import collect_moments
from tests.bench.scaling import TRAIN_IMAGES, falling, solving
from tests.bench.speed import CPU, Setting, images_of, run
from tests.bench.timing import Row, seconds

RESULT = Path(__file__).parent / "results" / "eigen.json"
ARCHS = ("resnet18", "resnet50", "vgg16")
FEW = 10_000  # images from which directions are taken where not all are
GOAL = 0.05


@dataclass(frozen=True)
class Turn:
    """Seconds of one image of the pass, and of one solve of each width."""

    image: float
    solve: dict[int, float]


@cache
def turns(arch: str, setting: Setting) -> tuple[tuple[int, ...], list[Turn]]:
    """The widths of the network's layers, and what was measured in each round."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None).eval().to(setting.place)
    images = images_of(setting, setting.forward_size)
    views = [View(site) for site in survey(model, images[:1]).sites]
    widths = tuple(view.width for view in views)
    batches = [images] * setting.batches
    with joined(setting.device) as world:
        collecting = partial(collect_moments, model, views, batches, world)
        solves = {k: partial(principal, falling(k, setting.place)) for k in sorted(set(widths))}

        def turn() -> Turn:
            timed = partial(seconds, device=world.device, clock=setting.clock())
            return Turn(timed(collecting) / sum(map(len, batches)), {k: timed(f) for k, f in solves.items()})

        collecting(), solves[min(widths)]()  # libraries load their code
        return widths, [turn() for _ in range(setting.rounds)]


def share(setting: Setting, arch: str, ranks: int, images: int) -> Row:
    """The solves of the rank that has most of them ÷ its part of the pass."""
    widths, taken = turns(arch, setting)
    passes = [turn.image * images / ranks for turn in taken]
    found, before = ([max(solving(widths, t.solve, n)) for t in taken] for n in (ranks, 1))
    ratios = [solves / one for solves, one in zip(found, passes, strict=True)]
    one, busiest, all_ = map(statistics.median, (passes, found, before))
    image = statistics.median(t.image for t in taken)
    detail = (
        f"{busiest:.3g} s of solves (before {all_:.3g} s: {all_ / one:.2g} of the pass) beside {one:.4g} s of "
        f"pass, {1e3 * image:.3g} ms an image; {len(widths)} layers up to {max(widths)}, {setting.device}, "
        f"{setting.clock()} s, {len(taken)} rounds"
    )
    name = f"{arch}, {ranks} ranks, {images:,} images: solves ÷ pass"
    return Row(name, statistics.median(ratios), min(ratios), max(ratios), GOAL, detail)


def measurements(archs: tuple[str, ...]) -> list[Callable[[Setting], Row]]:
    """ImageNet's recipe on a node and on eight, and fewer images on a node."""
    cases = ((8, TRAIN_IMAGES), (64, TRAIN_IMAGES), (8, FEW))
    return [partial(share, arch=arch, ranks=ranks, images=images) for arch in archs for ranks, images in cases]


if __name__ == "__main__":
    cpu = replace(CPU, images=8, batches=2, rounds=3)
    run(__doc__, "tests.bench.eigen", measurements(ARCHS), RESULT, cpu, quick=measurements(ARCHS[:1]))
