"""What a run costs at any number of ranks: a small model, and how well it foretells runs of one and two ranks.

    uv run python -m tests.bench.scaling [--quick]

Volumes follow from the network alone and are exact. Seconds are sums of measured constants: per image, per solve,
per byte. Both sides of a ratio are taken in turns in the same processes, in seconds of rank 0's processor, as the
machine may be shared; waiting is not in them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import PANEL, World
from dist_prune.factorization.bases import principal, solve, spread
from dist_prune.network.sites import Site, View, evaluating, survey
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.moments import Moments, accumulating, collect_moments
from dist_prune.training.trainer import Trainer
from dist_prune.utils.tables import table
from tests.bench.timing import Row, command_line, report, write_json
from tests.bench.timing import table as comparison
from tests.ranks import run_ranks

RESULT = Path(__file__).parent / "results" / "scaling.json"
FLOAT64, FLOAT32 = 8, 4
TRAIN_IMAGES, VAL_IMAGES, IMAGE_BYTES = 1_281_167, 50_000, 110_000  # ImageNet; bytes a file: its mean, rounded
RANKS = (8, 64, 512)
BATCH = 128  # images per rank and step, as in the recipe


# ── the model ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Volume:
    """Bytes that every rank hands to collectives, by phase; method pca, side output."""

    statistics_summed: int  # once
    shifts_sent: int  # once, by rank 0
    bases_sent: int  # once, each by the rank that solved it
    gradients_summed: int  # each step
    weights_sent: int  # once, by rank 0
    widths: tuple[int, ...]  # of the matrices that are solved, shared out over the ranks


def volume(model: nn.Module, sites: Sequence[Site]) -> Volume:
    """From shapes alone; gradients are those of the dense network, an upper bound for the compressed one."""
    squares = [(site.groups, View(site).width) for site in sites]
    vectors = sum(g * k for g, k in squares)
    panels = sum(g * sum(min(PANEL, k - i) * (k - i) for i in range(0, k, PANEL)) for g, k in squares)
    return Volume(
        FLOAT64 * (panels + vectors + len(squares)),
        FLOAT64 * vectors,
        FLOAT64 * sum(g * (2 * k * k + 2 * k) for g, k in squares),
        FLOAT32 * sum(p.numel() for p in model.parameters()),
        sum(t.nbytes for t in model.state_dict().values()),
        tuple(k for g, k in squares for _ in range(g)),
    )


@dataclass(frozen=True)
class Constants:
    """Measured seconds: per image, per solve of each width, per byte summed over two ranks."""

    moments: float
    step: float
    solve: dict[int, float]
    byte: float


def seconds(
    volume: Volume, constants: Constants, ranks: int, images: int, steps: int, batch: int
) -> dict[str, float]:
    """Rank 0's seconds by phase: its share of the images, its solves, its part in collectives.

    A ring moves 2(n−1)/n of a summed buffer through each rank: nothing for one, and the measured constant for two.
    What is broadcast passes each rank once.
    """
    per_byte = constants.byte * 2 * (ranks - 1) / ranks
    return {
        "statistics": constants.moments * images / ranks + per_byte * volume.statistics_summed,
        "bases": solving(volume.widths, constants.solve, ranks)[0]
        + (ranks > 1) * constants.byte * volume.bases_sent,
        "finetune": steps * (batch * constants.step + per_byte * volume.gradients_summed),
    }


def solving(widths: Sequence[int], solve: Mapping[int, float], ranks: int) -> list[float]:
    """Seconds that each rank solves matrices, when one of width k takes `solve[k]`."""
    taken = [0.0] * ranks
    for width, rank in zip(widths, spread([k**3 for k in widths], ranks), strict=True):
        taken[rank] += solve[width]
    return taken


# ── held against runs ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Setting:
    """A ResNet-18 on noise; `images` over all ranks, `steps` of `batch` images per rank, `rounds` of all."""

    pixels: int = 64
    images: int = 64
    steps: int = 6
    batch: int = 8
    rounds: int = 5


QUICK = Setting(pixels=32, images=8, steps=1, batch=2, rounds=1)


Rounds = list[tuple[dict[str, float], dict[str, float]]]  # seconds by phase: predicted, measured


class Counting(World):
    """Adds up the bytes handed to it; as `World` else."""

    def __init__(self, world: World) -> None:
        self.__dict__ = world.__dict__
        self.summed = self.sent = 0

    def sum_(self, *tensors: Tensor) -> None:
        """As `World.sum_`."""
        self.summed += sum(t.nbytes for t in tensors)
        super().sum_(*tensors)

    def broadcast_(self, *tensors: Tensor, source: int = 0) -> None:
        """As `World.broadcast_`."""
        self.sent += sum(t.nbytes for t in tensors)
        super().broadcast_(*tensors, source=source)


def clocked(function: Callable[[], object]) -> float:
    """Seconds of this process's processor."""
    began = time.process_time()
    function()
    return time.process_time() - began


@dataclass(frozen=True)
class Bench:
    """What a rank works on."""

    world: World
    setting: Setting
    model: nn.Module
    sites: list[Site]

    def images(self, count: int) -> Iterator[Tensor]:
        """Noise in batches."""
        for start in range(0, count, self.setting.batch):
            size = min(self.setting.batch, count - start)
            yield torch.randn(size, 3, self.setting.pixels, self.setting.pixels)

    def moments(self, count: int) -> Statistics:
        """The statistics of this many images on this rank."""
        views = [View(site) for site in self.sites]
        return Statistics(collect_moments(self.model, views, self.images(count), self.world))

    def alone(self, count: int) -> None:
        """Forward passes and sums, without the others: what an image costs."""
        views = [View(site) for site in self.sites]
        with accumulating(self.model, views, self.world.device), evaluating(self.model):
            for images in self.images(count):
                self.model(images)

    def train(self, trainer: Trainer, steps: int) -> None:
        """Steps of the trainer."""
        labels = torch.zeros(self.setting.batch, dtype=torch.long)
        batch = next(self.images(self.setting.batch))
        list(trainer.epoch([Batch(batch, labels, labels)] * steps))


def bench(world: World, setting: Setting) -> Bench:
    """The network and its sites."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return Bench(world, setting, model, survey(model, torch.zeros(1, 3, setting.pixels, setting.pixels)).sites)


def compare(world: World, setting: Setting) -> Rounds:
    """Rounds of constants, what they foretell, and what was then measured: (predicted, measured) by phase."""
    work = bench(world, setting)
    found = volume(work.model, work.sites)
    settings = TrainingConfig(epochs=3 * setting.rounds + 3, batch_size=setting.batch, lr=1e-3, warmup=0)
    trainer = Trainer(work.model, settings, setting.steps, world)
    pairs = []
    for turn in range(setting.rounds + 1):
        constants = calibrate(work, trainer, found)
        predicted = seconds(found, constants, world.size, setting.images, setting.steps, setting.batch)
        measured = measure(work, trainer)
        if turn:  # the first warms up
            pairs.append((predicted, measured))
    return pairs


def calibrate(work: Bench, trainer: Trainer, found: Volume) -> Constants:
    """The constants, each from a piece of work of its own."""
    setting, world = work.setting, work.world
    buffer = torch.zeros(2**20)
    byte = clocked(lambda: [world.sum_(buffer) for _ in range(4)]) / (4 * buffer.nbytes)
    count, steps = max(setting.batch, setting.images // 4), max(1, setting.steps // 3)
    step = clocked(lambda: work.train(trainer, steps)) / (steps * setting.batch)
    solves = clocked_solves(found.widths)
    if world.size > 1:  # the gradients' sums are in the steps already
        step -= byte * found.gradients_summed / setting.batch
    return Constants(clocked(lambda: work.alone(count)) / count, step, solves, byte if world.size > 1 else 0.0)


def clocked_solves(widths: Iterable[int]) -> dict[int, float]:
    """Seconds of one solve of each width."""
    place = torch.device("cpu")
    return {k: clocked(partial(principal, falling(k, place))) for k in sorted(set(widths))}


def falling(width: int, device: torch.device) -> Moments:
    """Statistics whose covariance has eigenvalues of about 1/i, as those of layers do."""
    rows = torch.randn(2 * width, width, dtype=torch.float64, device=device)
    mix = torch.randn(width, width, dtype=torch.float64, device=device) / width**0.5
    rows = rows / torch.arange(1, width + 1, device=device).sqrt() @ mix
    count, zero = rows.new_tensor(2.0 * width), rows.new_zeros(1, width)
    return Moments(count, zero, rows.sum(0)[None], (rows.mT @ rows)[None])


def measure(work: Bench, trainer: Trainer) -> dict[str, float]:
    """The run itself, phase by phase."""
    setting, gathered = work.setting, Statistics()

    def collect() -> None:
        nonlocal gathered
        gathered = work.moments(setting.images // work.world.size)

    return {
        "statistics": clocked(collect),
        "bases": clocked(lambda: solve(work.model, work.sites, gathered, MethodConfig(), 0, work.world)),
        "finetune": clocked(lambda: work.train(trainer, setting.steps)),
    }


def rows(setting: Setting) -> list[Row]:
    """Each phase's efficiency, then measured ÷ predicted: the whole run, and each phase, of one and two ranks."""
    alone, two = (run_ranks(compare, size, setting, deadline_s=1500, timeout_s=600)[0] for size in (1, 2))
    found = [efficiency(phase, alone, two) for phase in alone[0][0]]
    return found + [foretold(size, p, t) for size, t in ((1, alone), (2, two)) for p in ("all", *alone[0][0])]


def efficiency(phase: str, alone: Rounds, two: Rounds) -> Row:
    """Seconds of two ranks ÷ those of one for the same work: 1 ÷ the efficiency, which is in the detail."""
    work = 1 if phase == "finetune" else 2  # every rank has batches of its own, but a share of images and layers
    ratios = [work * b[phase] / a[phase] for (_, a), (_, b) in zip(alone, two, strict=True)]
    text = [work * b[phase] / a[phase] for (a, _), (b, _) in zip(alone, two, strict=True)]
    median = statistics.median(ratios)
    detail = f"efficiency {1 / median:.2f}, foretold {1 / statistics.median(text):.2f}"
    return Row(f"2 ranks ÷ 1 rank, {phase}: seconds for the same", median, min(ratios), max(ratios), 1.2, detail)


def foretold(size: int, phase: str, rounds: Rounds) -> Row:
    """Measured ÷ predicted seconds of a phase."""
    ours = [_of(measured, phase) for _, measured in rounds]
    text = [_of(predicted, phase) for predicted, _ in rounds]
    ratios = [a / b for a, b in zip(ours, text, strict=True)]
    detail = f"{statistics.median(ours):.3g} s of processor, foretold {statistics.median(text):.3g} s"
    name = f"{size} rank(s), {phase}: measured ÷ predicted"
    return Row(name, statistics.median(ratios), min(ratios), max(ratios), 1.2, detail)


def _of(phases: dict[str, float], phase: str) -> float:
    return sum(phases.values()) if phase == "all" else phases[phase]


# ── past one cluster job ───────────────────────────────────────────────────────────────────────────────────


def outlook(arch: str, rate: float) -> str:
    """Volumes at 8, 64 and 512 GPUs, at `rate` training images per second and GPU."""
    model = torchvision.models.get_model(arch, weights=None).eval()
    found = volume(model, survey(model, torch.zeros(1, 3, 224, 224)).sites)
    solves = clocked_solves(found.widths)
    cells = []
    for n in RANKS:
        ring = 2 * (n - 1) / n
        steps = TRAIN_IMAGES // (n * BATCH)
        cells.append(
            [
                str(n),
                f"{ring * found.statistics_summed / 1e6:.0f} MB",
                f"{found.bases_sent / 1e6:.0f} MB",
                f"{max(solving(found.widths, solves, n)):.1f} s",
                str(steps),
                f"{ring * found.gradients_summed / 1e6:.0f} MB",
                f"{n * rate * IMAGE_BYTES / 1e9:.1f} GB/s",
                f"{(TRAIN_IMAGES + VAL_IMAGES) / n:.0f}",
            ]
        )
    headers = [
        "GPUs",
        "statistics",
        "bases",
        "solves",
        "steps/epoch",
        "gradients/step",
        "reading",
        "files opened/rank",
    ]
    return f"{arch}, {len(found.widths)} matrices up to {max(found.widths)}\n{table(headers, cells)}"


def main() -> None:
    """Compare, show the outlook, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes nothing")
    parser.add_argument("--rate", type=float, default=2500, help="training images per second and GPU, assumed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(QUICK if options.quick else Setting())
    print(comparison(found))
    text = [outlook(arch, options.rate) for arch in ("resnet18", "resnet50")]
    print("\n\n".join(["", *text]))
    if not options.quick:
        write_json(RESULT, report(found, command_line("tests.bench.scaling")) | {"outlook": text})


if __name__ == "__main__":
    main()
