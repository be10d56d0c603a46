"""What planning and solving with all forms cost, at the image counts of a run.

    uv run python -m tests.bench.planning [--arch NAME] [--images N] [--rounds N] [--quick]

Random weights and images that are noise: time does not depend on them. Some work goes with the images, some does
not, as eigendecompositions. Both are timed on few images, and added up for `RUN`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import parse_rule
from dist_prune.config.images import ImageSpec
from dist_prune.correction.calibration import Calibration
from dist_prune.correction.correct import correct
from dist_prune.data.loader import Batch, normalise
from dist_prune.distributed.world import World, joined
from dist_prune.factorization.bases import solve
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import make_plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import spectra_of
from dist_prune.network.models import build
from dist_prune.network.sites import Survey, survey
from dist_prune.statistics.collect import collect
from tests.bench.speed import forward
from tests.bench.timing import Row, command_line, report, seconds, table, write_json

RESULT = Path(__file__).parent / "results" / "planning.json"
RUN = 512  # images that statistics, exact losses and correction see
METHOD = MethodConfig(method="fisher", loss_images=RUN)
BUDGET = 0.5
CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """CPU seconds of the parts: each image's, and once."""

    each: float
    once: float = 0.0

    def of(self, images: int) -> float:
        return self.each * images + self.once


@dataclass(frozen=True)
class Bench:
    """A network and its images."""

    world: World
    model: nn.Module
    images: Tensor

    @cached_property
    def found(self) -> Survey:
        return survey(self.model, self.images[:1])

    def batches(self, _count: int = 0) -> list[Batch]:
        indices = torch.arange(len(self.images))
        return [Batch(self.images[i], -torch.ones_like(i), i) for i in indices.split(16)]


def measure(arch: str, images: int, size: int, rounds: int) -> list[Row]:
    """Both rows of one network."""
    with joined("cpu") as world:
        torch.manual_seed(0)
        bench = Bench(world, build(arch, 1000).eval(), torch.randn(images, 3, size, size))
        taken = [one_round(bench) for _ in range(rounds)]
    planning = [sum(part.of(RUN) for part in parts[1:4]) / parts[0].of(RUN) for parts in taken]
    solving = [(parts[5].of(RUN) - 2 * 60) / parts[4].of(RUN) for parts in taken]
    shares = [
        statistics.median(part) for part in zip(*([p.of(RUN) for p in parts] for parts in taken), strict=True)
    ]
    names = ("statistics pass", "exact losses", "decompositions", "choice", "forward pass", "correction")
    listed = ", ".join(f"{name} {seconds:.4g}" for name, seconds in zip(names, shares, strict=True))
    detail = f"{arch} at {size}², {images} images, for {RUN}: CPU seconds: {listed}"
    return [
        Row("planning ÷ statistics pass", statistics.median(planning), min(planning), max(planning), 3, detail),
        Row(
            "(correction − 120 CPU s) ÷ forward pass",
            statistics.median(solving),
            min(solving),
            max(solving),
            8,
            detail,
        ),
    ]


def one_round(bench: Bench) -> tuple[Work, ...]:
    """Statistics pass, exact losses, decompositions, choice, forward pass, correction."""
    model, world, images, sites = bench.model, bench.world, len(bench.images), bench.found.sites
    passed, kept = clocked(lambda: collect(model, sites, bench.batches, world, METHOD, 0, patches=True))
    solved, bases = clocked(lambda: solve(model, sites, kept, METHOD, 0, world))
    chained, nested = clocked(lambda: nested_of(model, sites, FORMS, bases, kept, METHOD.damping, world))
    spectra = spectra_of(bases, METHOD, nested)
    measured, losses = clocked(
        lambda: with_exact_losses(spectra, model, sites, bases, nested, kept, bench.batches, world, METHOD, 0)
    )
    rule, forms = parse_rule(f"budget:macs={BUDGET}"), tuple(FORMS.values())
    planned, plan = clocked(lambda: make_plan(rule, bench.found, 1, spectra=losses, repair=2, forms=forms))
    forwarded, _ = clocked(lambda: forward(model, [batch.images for batch in bench.batches()]))
    compressed = project(model, sites, bases, plan, METHOD.side, nested)
    half, whole = (corrected(bench, compressed, count) for count in (images // 2, images))
    slope = (whole - half) / (images - images // 2)
    return (
        Work(passed / images),
        Work(measured / images),
        Work(0, solved + chained),
        Work(0, planned),
        Work(forwarded / images),
        Work(slope, max(0.0, whole - slope * images)),
    )


def corrected(bench: Bench, compressed: nn.Module, count: int) -> float:
    """CPU seconds of a correction from so many of the images."""
    spec = ImageSpec(0, bench.images.shape[-1])
    pixels = torch.randint(0, 256, (count, *bench.images.shape[1:]), dtype=torch.uint8)
    calibration = Calibration(pixels, torch.arange(count), partial(normalise, spec=spec), 16)
    copied, everything = copy.deepcopy(compressed), bench.found
    return clocked(
        lambda: correct(bench.model, copied, everything, calibration, CorrectionConfig(), 0, bench.world)
    )[0]


def clocked(function: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of one call, and what it returned."""
    kept = list[T]()
    return seconds(lambda: kept.append(function()), CPU, "cpu"), kept[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument(
        "--images", type=int, default=64, help="that are measured; fewer rows than this say little"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--output", type=Path, help=f"default: results/{RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, images = (32, 16) if options.quick else (224, options.images)
    arches = ["resnet20"] if options.quick else options.arch
    rows = [row for arch in arches for row in measure(arch, images, size, options.rounds)]
    print(table(rows))
    output = options.output or (None if options.quick else RESULT)
    if output:
        write_json(output, report(rows, command_line("tests.bench.planning")))


if __name__ == "__main__":
    main()
