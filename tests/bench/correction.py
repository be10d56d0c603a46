"""What correction costs against one forward pass over its images and the matrix products it cannot do without.

    uv run python -m tests.bench.correction [--device cuda] [--rounds N] [--quick]

resnet18 with random weights at half the ranks of all convolutions; images are noise: time does not depend on them.
All sites are solved, with the settings that a run has by default. With fewer images than a run's, the part that
does not depend on them, solving, looks larger than it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.images import ImageSpec
from dist_prune.correction.calibration import Calibration
from dist_prune.correction.correct import correct
from dist_prune.data.loader import normalise
from dist_prune.distributed.world import World, joined
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import rebuild
from dist_prune.network.sites import survey
from dist_prune.statistics import symmetric
from tests.bench.speed import Setting, forward, network, run
from tests.bench.timing import Row, seconds, synchronise
from tests.ranks import run_ranks

RESULT = Path(__file__).parent / "results" / "correction.json"
CPU = Setting(images=16, batches=16, rounds=1)
FORWARDS = 12  # a correction may take as long as so many forward passes, besides the products


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole correction, of one forward pass over its images, and of the products of rows alone."""

    total: float
    forward: float
    products: float

    def text(self) -> str:
        """For people."""
        rest = (self.total - self.products) / self.forward
        return (
            f"{self.total:.4g} s; one forward pass {self.forward:.4g} s, products of rows {self.products:.4g} s: "
            f"{rest:.3g} forward passes besides them"
        )


def cost_alone(setting: Setting) -> Row:
    """The correction against twelve forward passes and its products, on one rank."""
    with joined(setting.device) as world:
        costs = [cost(world, setting) for _ in range(setting.rounds)]
    ratios = sorted(c.total / (FORWARDS * c.forward + c.products) for c in costs)
    middle = costs[len(costs) // 2]
    detail = f"{setting.describe(setting.forward_size)}; {middle.text()} ({setting.clock()} clock)"
    name = f"correction ÷ ({FORWARDS} forward passes + products)"
    return Row(name, ratios[len(ratios) // 2], ratios[0], ratios[-1], 1.0, detail)


def cost_two_ranks(setting: Setting) -> Row:
    """The same images shared by two gloo processes against one; the slower rank counts, without what it waits."""
    setting = replace(setting, device="cpu")
    alone, shared = ([_slowest(setting, ranks) for _ in range(setting.rounds)] for ranks in (1, 2))
    ratios = sorted(two / one for one, two in zip(alone, shared, strict=True))
    detail = (
        f"{setting.describe(setting.forward_size)}; {min(shared):.4g} against {min(alone):.4g} {setting.clock()} s"
    )
    return Row("correction: 2 ranks ÷ 1 rank", ratios[len(ratios) // 2], ratios[0], ratios[-1], 0.6, detail)


def _slowest(setting: Setting, ranks: int) -> float:
    costs: list[Cost] = run_ranks(cost, ranks, setting, deadline_s=3600, timeout_s=3000)
    return max(c.total for c in costs)


def cost(world: World, setting: Setting) -> Cost:
    """Correct once, on this rank's share of the images."""
    clock = setting.clock()
    dense = network(setting).eval()
    compressed, everything = halved(dense, setting), survey(dense, noise(setting, 1).to(setting.place))
    images = calibration(setting, world)
    settings, copied = CorrectionConfig(), copy.deepcopy(compressed)
    taken: list[float] = []
    with timed_products(taken, world.device, clock):
        work = partial(correct, dense, copied, everything, images, settings, 0, world)
        total = seconds(work, world.device, clock)
    batches = [batch.images for batch in images.prepared()]
    whole = partial(forward, dense, batches)
    per_image = seconds(whole, world.device, clock) / sum(map(len, batches))
    return Cost(total, per_image * len(images.pixels), sum(taken))


@contextmanager
def timed_products(taken: list[float], device: torch.device, clock: str) -> Iterator[None]:
    """While open, the seconds of every product of rows are noted."""
    plain: Callable[[Tensor, Tensor, int], None] = symmetric.add_lower_product

    def timed(product: Tensor, columns: Tensor, panel: int) -> None:
        taken.append(seconds(partial(plain, product, columns, panel), device, clock))

    symmetric.add_lower_product = timed
    try:
        yield
    finally:
        symmetric.add_lower_product = plain
        synchronise(device)


def halved(dense: nn.Module, setting: Setting) -> nn.Module:
    """All convolutions at half their rank, with untrained factors."""
    sites = survey(dense, noise(setting, 1).to(setting.place)).select("@conv").sites
    torch.manual_seed(1)
    return rebuild(dense, Plan(tuple(Choice(site.name, site.outputs // 2) for site in sites))).eval()


def noise(setting: Setting, count: int) -> Tensor:
    return torch.zeros(count, 3, setting.forward_size, setting.forward_size)


def calibration(setting: Setting, world: World) -> Calibration:
    """This rank's share of noise images."""
    count, size = setting.images * setting.batches, setting.forward_size
    mine = torch.arange(world.rank, count, world.size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    own, indices = pixels[mine].to(world.device), mine.to(world.device)
    return Calibration(own, indices, partial(normalise, spec=ImageSpec(0, size)), setting.images)


MEASUREMENTS: tuple[Callable[[Setting], Row], ...] = (cost_alone, cost_two_ranks)

if __name__ == "__main__":
    run(__doc__, "tests.bench.correction", MEASUREMENTS, RESULT, CPU)
