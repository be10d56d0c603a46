"""Where the time of each phase goes: the operators that take most of it, without what they call.

    uv run python -m tests.bench.profiles [--device cuda] [--quick]

resnet18, synthetic images, random weights, one rank; the network at half the ranks of all convolutions where it is
corrected and tuned. Nothing runs before it is profiled: what a first call costs is in. Shares are of the sum over
all operators, so of what torch sees: Python in between is not in them. Seconds are of the clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dist_prune.config.compression import MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.training import TrainingConfig
from dist_prune.correction.correct import correct
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World, joined
from dist_prune.network.sites import survey
from dist_prune.statistics import collect as statistics
from dist_prune.training.trainer import Trainer
from dist_prune.utils.tables import table
from tests.bench.correction import calibration, halved
from tests.bench.speed import CPU, CUDA, QUICK, Setting, images_of, network
from tests.bench.timing import command_line, heading, write_json

RESULT = Path(__file__).parent / "results" / "profiles.json"
TOP = 5
Work = Callable[[], object]


@dataclass(frozen=True)
class Operator:
    """What torch spent in one operator during a phase."""

    phase: str
    name: str
    share: float
    seconds: float
    calls: int


# ── the phases, ready to run ───────────────────────────────────────────────────────────────────────────────


def collecting(method: str, setting: Setting, world: World) -> Work:
    """The statistics pass of a method over all sites."""
    model, batches = network(setting).eval(), [_batch(setting, setting.forward_size)] * setting.batches
    sites = survey(model, batches[0].images[:1]).sites
    return partial(statistics.collect, model, sites, lambda _: batches, world, MethodConfig(method), 0)


def correcting(setting: Setting, world: World) -> Work:
    """All sites solved again, in place."""
    dense = network(setting).eval()
    compressed, images = halved(dense, setting).to(setting.place), calibration(setting, world)
    everything = survey(dense, images_of(setting, setting.forward_size)[:1])
    return lambda: correct(dense, compressed, everything, images, CorrectionConfig(), 0, world)


def tuning(setting: Setting, world: World) -> Work:
    """An epoch of the compressed network."""
    batches = [_batch(setting, setting.train_size)] * setting.batches
    settings = TrainingConfig(epochs=1, batch_size=setting.images, lr=0.01, warmup=0)
    trainer = Trainer(halved(network(setting), setting).to(setting.place), settings, setting.batches, world)
    return lambda: list(trainer.epoch(batches))


def _batch(setting: Setting, size: int) -> Batch:
    images = images_of(setting, size)
    index = torch.arange(len(images), device=images.device)
    return Batch(images, index, index)


PHASES: Mapping[str, Callable[[Setting, World], Work]] = {
    "statistics, pca": partial(collecting, "pca"),
    "statistics, fisher": partial(collecting, "fisher"),
    "correction": correcting,
    "fine-tuning": tuning,
}


# ── what they spend ────────────────────────────────────────────────────────────────────────────────────────


def operators(phase: str, setting: Setting) -> list[Operator]:
    """Those that take most of the phase, most first."""
    on_gpu = setting.place.type == "cuda"
    with joined(setting.device) as world:
        work = PHASES[phase](setting, world)
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
            work()
    events = found.key_averages()
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    total, calls = sum(spent.values()), {e.key: e.count for e in events}
    most = sorted(spent, key=spent.__getitem__, reverse=True)[:TOP]
    return [Operator(phase, name, spent[name] / total, spent[name] / 1e6, calls[name]) for name in most]


def format_table(found: list[Operator]) -> str:
    """For people."""
    cells = [[o.phase, o.name, f"{100 * o.share:.1f} %", f"{o.seconds:.3g}", str(o.calls)] for o in found]
    return table(["phase", "operator", "share", "seconds", "calls"], cells)


def content(setting: Setting, found: list[Operator]) -> dict[str, Any]:
    """For programs."""
    rows = {"setting": asdict(setting), "rows": [asdict(operator) for operator in found]}
    return heading(command_line("tests.bench.profiles")) | rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--output", type=Path, help=f"default: results/{RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = CUDA if options.device == "cuda" else replace(CPU, batches=4)
    setting = replace(QUICK, device=options.device) if options.quick else full
    found = [operator for phase in PHASES for operator in operators(phase, setting)]
    print(format_table(found))
    if output := options.output or (None if options.quick else RESULT):
        write_json(output, content(setting, found))


if __name__ == "__main__":
    main()
