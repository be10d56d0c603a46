"""What planning and solving with all forms cost, at the image counts of a run.

    uv run python -m tests.bench.planning [--arch NAME] [--images N] [--rounds N] [--quick]

Random weights and images that are noise: time does not depend on them. Some work goes with the images, some does
not, as eigendecompositions. Both are timed on few images, and added up for `RUN`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import parse_rule
from dist_prune.config.run import ImageSpec, MethodConfig
from dist_prune.correction.correct import Calibration, correct
from dist_prune.data.loader import Batch, normalise
from dist_prune.distributed.world import World, joined
from dist_prune.factorization.bases import solve
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Plan, make_plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import spectra_of
from dist_prune.network.models import build
from dist_prune.network.sites import Survey, survey
from dist_prune.statistics.collect import Statistics, collect
from tests.bench.speed import forward
from tests.bench.timing import Row, command_line, report, seconds, table, write_json

RESULT = Path(__file__).parent / "results" / "planning.json"
RUN = 512  # images that statistics, exact losses and correction see
METHOD = MethodConfig(method="fisher", loss_images=RUN)
BUDGET = 0.5
CPU = torch.device("cpu")


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

    @property
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
    told = ", ".join(f"{name} {seconds:.4g}" for name, seconds in zip(names, shares, strict=True))
    detail = f"{arch} at {size}², {images} images, for {RUN}: CPU seconds: {told}"
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
    model, world, images = bench.model, bench.world, len(bench.images)
    found, kept = bench.found, list[Statistics]()
    whole = clocked(
        lambda: kept.append(collect(model, found.sites, bench.batches, world, METHOD, 0, patches=True))
    )
    bases = solve(model, found.sites, kept[0], METHOD, 0, world)
    bases_s = clocked(lambda: solve(model, found.sites, kept[0], METHOD, 0, world))
    nested = nested_of(model, found.sites, FORMS, bases, kept[0], METHOD.damping, world)
    nested_s = clocked(lambda: nested_of(model, found.sites, FORMS, bases, kept[0], METHOD.damping, world))
    spectra = spectra_of(bases, METHOD, nested)
    exact = partial(
        with_exact_losses, spectra, model, found.sites, bases, nested, kept[0], bench.batches, world, METHOD, 0
    )
    losses_s, losses = clocked(exact), exact()
    rule, plans = parse_rule(f"budget:macs={BUDGET}"), list[Plan]()
    choice_s = clocked(
        lambda: plans.append(make_plan(rule, found, 1, spectra=losses, repair=2, forms=tuple(FORMS.values())))
    )
    forward_s = clocked(lambda: forward(model, [batch.images for batch in bench.batches()]))
    compressed = project(model, found.sites, bases, plans[0], METHOD.side, nested)
    correction = [corrected(bench, compressed, count) for count in (images // 2, images)]
    slope = (correction[1] - correction[0]) / (images - images // 2)
    return (
        Work(whole / images),
        Work(losses_s / images),
        Work(0, bases_s + nested_s),
        Work(0, choice_s),
        Work(forward_s / images),
        Work(slope, max(0.0, correction[1] - slope * images)),
    )


def corrected(bench: Bench, compressed: nn.Module, count: int) -> float:
    """CPU seconds of a correction from so many of the images."""
    spec = ImageSpec(0, bench.images.shape[-1])
    pixels = torch.randint(0, 256, (count, *bench.images.shape[1:]), dtype=torch.uint8)
    calibration = Calibration(pixels, torch.arange(count), partial(normalise, spec=spec), 16, mirrored=False)
    copied = copy.deepcopy(compressed)
    return clocked(
        lambda: correct(bench.model, copied, bench.found, calibration, CorrectionConfig(), 0, bench.world)
    )


def clocked(function: object) -> float:
    """CPU seconds of one call."""
    assert callable(function)
    return seconds(function, CPU, "cpu")


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
