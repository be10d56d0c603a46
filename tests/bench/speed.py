"""What the statistics pass and a fine-tuning step cost against the plain forward pass and a bare DDP loop.

    uv run python -m tests.bench.speed [--device cuda] [--rounds N] [--quick]

Synthetic images, random weights: speed does not depend on them. Both sides of a ratio run in turns in one
process. To add a comparison, write a function Setting → Row and name it in `MEASUREMENTS`.
"""

from __future__ import annotations

import argparse
import copy
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World, joined
from dist_prune.network.memory_format import channels_last
from dist_prune.network.sites import View, evaluating, survey
from dist_prune.statistics.moments import collect_moments
from dist_prune.training.trainer import Trainer
from tests.bench.timing import Pair, Row, command_line, interleaved, report, table, write_json
from tests.ranks import run_alone, run_ranks

RESULT = Path(__file__).parent / "results" / "speed.json"
Work = Callable[[], object]
Sides = Callable[[nn.Module, Sequence[Tensor], World], tuple[Work, Work]]  # of a comparison, and of what on


@dataclass(frozen=True)
class Setting:
    """How much is measured: resnet18, `images` at a time, `batches` or steps in each of `rounds` rounds."""

    device: str = "cpu"
    images: int = 16
    forward_size: int = 224  # pixels, of the statistics pass
    train_size: int = 112  # pixels, of the fine-tuning step
    batches: int = 10
    rounds: int = 9
    channels_last: bool = False

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    def clock(self, ranks: int = 1) -> str:
        """Which seconds are true, see `interleaved`."""
        return "cpu" if self.device == "cpu" and ranks == 1 else "wall"

    def describe(self, size: int) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"resnet18 at {size}², {self.batches} × {self.images} images, {self.device}{layout}"


CPU = Setting()
CUDA = Setting("cuda", images=256, train_size=224, batches=20)
QUICK = Setting(images=2, forward_size=32, train_size=32, batches=2, rounds=2)


def statistics_time(setting: Setting) -> Row:
    """Collecting moments of all sites against the forward pass alone."""
    return _in_turns(setting, "statistics pass ÷ forward: time", 1.10, _against_forward)


def statistics_time_channels_last(setting: Setting) -> Row:
    """The same where network and images are laid out NHWC, on both sides."""
    return _in_turns(replace(setting, channels_last=True), "… both channels last", 1.10, _against_forward)


def forward_layouts(setting: Setting) -> Row:
    """A forward pass of the network laid out NHWC against NCHW, of images as a run has them: NCHW."""

    def sides(model: nn.Module, batches: Sequence[Tensor], _: World) -> tuple[Work, Work]:
        return partial(forward, channels_last(model), batches), partial(forward, model, batches)

    return _in_turns(setting, "forward: channels last ÷ first", 1.0, sides)


def statistics_layouts(setting: Setting) -> Row:
    """The same of the statistics pass."""

    def sides(model: nn.Module, batches: Sequence[Tensor], world: World) -> tuple[Work, Work]:
        return _collector(channels_last(model), batches, world), _collector(model, batches, world)

    return _in_turns(setting, "statistics pass: channels last ÷ first", 1.0, sides)


def _against_forward(model: nn.Module, batches: Sequence[Tensor], world: World) -> tuple[Work, Work]:
    return _collector(model, batches, world), partial(forward, model, batches)


def _in_turns(setting: Setting, name: str, target: float, sides: Sides) -> Row:
    with joined(setting.device) as world:
        batches = [images_of(setting, setting.forward_size)] * setting.batches
        ours, plain = sides(network(setting), batches, world)
        taken = interleaved(ours, plain, setting.rounds, setting.place, setting.clock())
    return taken.row(name, target, setting.describe(setting.forward_size))


def statistics_memory(setting: Setting) -> Row:
    """Peak memory of the same two, above network and images; each in a process of its own."""
    ours, plain = (run_alone(partial(_peak_bytes, setting, collect)) for collect in (True, False))
    ratio = ours / plain
    detail = f"{setting.describe(setting.forward_size)}; {ours / 2**20:.0f} MiB against {plain / 2**20:.0f} MiB"
    return Row("statistics pass ÷ forward: memory", ratio, ratio, ratio, 1.3, detail)


def _peak_bytes(setting: Setting, collect: bool) -> int:
    torch.set_num_threads(1)
    with joined(setting.device) as world:
        model, images = network(setting), images_of(setting, setting.forward_size)
        batches = [images] * setting.batches
        function = _collector(model, batches, world) if collect else partial(forward, model, batches)
        forward(model, [images[:1]])  # libraries load their code
        before = bytes_so_far(world.device)
        function()
        return bytes_so_far(world.device) - before


def bytes_so_far(device: torch.device) -> int:
    """Most memory this process ever used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_alone(setting: Setting) -> Row:
    """The trainer against a bare DDP loop, in a world of one."""
    with joined(setting.device) as world:
        taken = train_both(world, setting)
    return taken.row("fine-tuning ÷ bare DDP, 1 rank", 1.03, setting.describe(setting.train_size))


def step_two_ranks(setting: Setting) -> Row:
    """The same in two gloo processes, on the CPU whatever the device; images per rank."""
    size, images = min(setting.train_size, CPU.train_size), min(setting.images, CPU.images)
    on_cpu = replace(setting, device="cpu", train_size=size, images=images)
    pairs: list[Pair] = run_ranks(train_both, 2, on_cpu, deadline_s=1800, timeout_s=600)
    return pairs[0].row("fine-tuning ÷ bare DDP, 2 ranks", 1.03, on_cpu.describe(on_cpu.train_size))


def train_both(world: World, setting: Setting) -> Pair:
    """Seconds of an epoch of `batches` steps, ours and bare."""
    images = images_of(setting, setting.train_size)
    labels = torch.arange(len(images), device=images.device)
    batches = [Batch(images, labels, labels)] * setting.batches
    settings = TrainingConfig(epochs=setting.rounds + 1, batch_size=setting.images, lr=0.01, warmup=0)
    model = network(setting)
    trainer = Trainer(copy.deepcopy(model), settings, setting.batches, world)
    bare = Bare(model, settings, trainer.steps)
    ours, plain = partial(_consume, trainer, batches), partial(bare.epoch, batches)
    return interleaved(ours, plain, setting.rounds, world.device, setting.clock(world.size))


def _consume(trainer: Trainer, batches: Sequence[Batch]) -> None:
    list(trainer.epoch(batches))


class Bare:
    """What one writes without this project: DDP, SGD, a cosine, cross-entropy; nothing reported or checked."""

    def __init__(self, model: nn.Module, settings: TrainingConfig, steps: int) -> None:
        self.replica, self.bf16 = DistributedDataParallel(model.train()), settings.bf16
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def epoch(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.replica(batch.images)
            loss = F.cross_entropy(logits.float(), batch.labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.scheduler.step()


def network(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18().to(setting.place)
    return channels_last(model) if setting.channels_last else model


def images_of(setting: Setting, size: int) -> Tensor:
    images = torch.randn(setting.images, 3, size, size, device=setting.place)
    return images.contiguous(memory_format=torch.channels_last) if setting.channels_last else images


def forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with evaluating(model):
        for images in batches:
            model(images)


def _collector(model: nn.Module, batches: Sequence[Tensor], world: World) -> Work:
    views = [View(site) for site in survey(model, batches[0][:1]).sites]
    return partial(collect_moments, model, views, batches, world)


MEASUREMENTS: tuple[Callable[[Setting], Row], ...] = (
    statistics_time,
    statistics_time_channels_last,
    forward_layouts,
    statistics_layouts,
    statistics_memory,
    step_alone,
    step_two_ranks,
)


Measurements = Sequence[Callable[[Setting], Row]]


def run(
    doc: str | None,
    module: str,
    measurements: Measurements,
    result: Path,
    cpu: Setting,
    quick: Measurements | None = None,
) -> None:
    """A benchmark's command line: measure, print the table, write it to `result`; `quick` may be fewer."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="of both sides of every comparison")
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--output", type=Path, help=f"default: results/{result.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = CUDA if options.device == "cuda" else cpu
    setting = replace(QUICK, device=options.device) if options.quick else full
    setting = replace(setting, rounds=options.rounds or setting.rounds)
    chosen = quick if options.quick and quick else measurements
    rows = [measure(setting) for measure in chosen]
    print(table(rows))
    output = options.output or (None if options.quick else result)
    if output:
        write_json(output, report(rows, command_line(module)))


if __name__ == "__main__":
    run(__doc__, "tests.bench.speed", MEASUREMENTS, RESULT, CPU)
