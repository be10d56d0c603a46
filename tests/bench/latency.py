"""Compressed network against the dense one: what part of the saved MACs is saved in time.

    uv run python -m tests.bench.latency [--device cuda] [--arch NAME] [--side PIXELS] [--rules RULE …] [--quick]

Synthetic images, random weights: speed does not depend on them. Ranks by `uniform:` and by `budget:latency=`, with
the spectra of the weights; a budget that cannot be reached here is noted. Each engine runs both networks in turns,
in one process; see `dist_prune.export.speed`.

On the CPU one thread is used, and its own seconds are taken, see `dist_prune.factorization.latency.now`.

`saving` is (1 − time ratio) ÷ (1 − MACs ratio): 1 where time follows MACs, 0 where nothing is gained. `low` and
`high` are of the turns with the least and the greatest speed-up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import parse_rule
from dist_prune.export.speed import Engine, Speed, TimedPass, measure_speed
from dist_prune.factorization import latency
from dist_prune.factorization.bases import by_weight
from dist_prune.factorization.budget import options_of
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.plan import Plan, PlanError, make_plan
from dist_prune.factorization.planner import usual_step
from dist_prune.factorization.project import rebuild
from dist_prune.factorization.spectra import spectra_of
from dist_prune.network.memory_format import channels_last
from dist_prune.network.models import build
from dist_prune.network.sites import View, bias_of, evaluating, survey, weight_of
from dist_prune.utils.tables import table
from tests.bench.timing import command_line, heading, write_json

RESULT = Path(__file__).parent / "results" / "latency.json"
ENGINES: tuple[Engine, ...] = ("eager", "channels-last", "compile", "onnxruntime", "onnxruntime-int8")


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    arch: str = "resnet18"
    side: int = 112
    batches: tuple[int, ...] = (1, 8, 64)
    engines: tuple[Engine, ...] = ENGINES
    rules: tuple[str, ...] = ("uniform:0.5", "budget:latency=0.7", "budget:latency=0.5")
    device: str = "cpu"


CPU = Setting()
CUDA = Setting(side=224, batches=(1, 8, 64, 256), engines=ENGINES[:3], device="cuda")
QUICK = Setting("resnet20", 16, (1, 2), ("eager",), ("uniform:0.5", "uniform:0.25"))


@dataclass(frozen=True)
class Row:
    """One engine and batch under one rule."""

    rule: str
    engine: str
    batch: int
    macs_ratio: float
    time_ratio: float
    saving: float
    low: float
    high: float


def planned(rule: str, dense: nn.Module, images: Tensor) -> Plan:
    """The plan that a run with `--method weight-svd --channels-last` would make on this device."""
    parsed, found = parse_rule(rule), survey(dense, images[:1])
    round_to = usual_step(parsed, images.device, found)
    weights = {site: dense.get_submodule(site.name) for site in found.sites}
    bases = {
        s.name: by_weight(weight_of(m, s).double(), bias_of(m, s).double(), "output") for s, m in weights.items()
    }
    times = None
    if parsed.of == "latency":
        options = {site: options_of(View(site), round_to, (FORMS["output"],)) for site in found.sites}
        with tempfile.TemporaryDirectory() as fresh:
            times = latency.measure(channels_last(dense), options, images, Path(fresh))
    return make_plan(parsed, found, round_to, "output", spectra_of(bases, MethodConfig("weight-svd")), times)


def measure(setting: Setting, rule: str) -> Speed:
    """Dense and compressed by this rule, side by side."""
    torch.manual_seed(0)
    dense = build(setting.arch, 1000).to(setting.device)
    image = torch.randn(1, 3, setting.side, setting.side, device=setting.device)
    images = image.expand(max(setting.batches), -1, -1, -1).contiguous()
    with evaluating(dense):
        plan = planned(rule, dense, images)
    return measure_speed(dense, rebuild(dense, plan), image, setting.batches, setting.engines)


def row(rule: str, speed: Speed, found: TimedPass) -> Row:
    """A pass beside the MACs."""
    macs = speed.macs.ratio

    def saving(speedup: float) -> float:
        return (1 - 1 / speedup) / (1 - macs)

    bounds = saving(found.speedup), saving(found.slowest), saving(found.fastest)
    return Row(rule, found.engine, found.batch, macs, 1 / found.speedup, *bounds)


def format_table(rows: Sequence[Row]) -> str:
    """For people."""
    cells = [
        [
            f"{r.rule}, {r.engine}, batch {r.batch}",
            f"{r.macs_ratio:.3f}",
            f"{r.time_ratio:.3f}",
            f"{r.saving:.2f} ({r.low:.2f}–{r.high:.2f})",
        ]
        for r in rows
    ]
    return table(["", "MACs ratio", "time ratio", "saving (range)"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arch", help="torchvision name")
    parser.add_argument("--side", type=int, help="pixels")
    parser.add_argument("--engines", nargs="+", choices=ENGINES)
    parser.add_argument("--rules", nargs="+", help="as for --ranks")
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--output", type=Path, help=f"default: results/{RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = QUICK if options.quick else CUDA if options.device == "cuda" else CPU
    given = {n: v for n in ("arch", "side", "engines", "rules") if (v := getattr(options, n)) is not None}
    setting = Setting(**asdict(setting) | {"device": options.device} | given)
    found, notes = {}, []
    for rule in setting.rules:
        try:
            found[rule] = measure(setting, rule)
        except PlanError as error:
            notes.append(str(error))
    rows = [row(rule, speed, one) for rule, speed in found.items() for one in speed.passes]
    notes += [f"{rule}: {note}" for rule, speed in found.items() for note in speed.notes]
    print(format_table(rows), *notes, sep="\n")
    if output := options.output or (None if options.quick else RESULT):
        write_json(output, content(setting, found, rows) | {"notes": notes})


def content(setting: Setting, found: dict[str, Speed], rows: Sequence[Row]) -> dict[str, Any]:
    """For programs: the rows, and below them each site with the reason for its time."""
    return heading(command_line("tests.bench.latency")) | {
        "setting": asdict(setting),
        "rows": [asdict(row) for row in rows],
        "sites": {rule: [asdict(site) for site in speed.sites] for rule, speed in found.items()},
    }


if __name__ == "__main__":
    main()
