"""What compression costs in accuracy at a measured time: networks of `tests.bench.quality` beside the dense one.

    uv run python -m tests.bench.over_time --data DIR --weights FILE [--runs DIR] [--budgets 0.584 …]

Each way's network of seed 0 that results/quality.json has a row of, as it is before fine-tuning; accuracy is that
row's. What is not in `--runs` is compressed now. Batches of 64 images on one thread, in its own seconds, the dense
network and the other in turns: shares of the dense network's time, and of the turns with the least and the most.
Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.export.speed import Engine, timed_passes
from dist_prune.network import models
from dist_prune.network.sites import evaluating
from dist_prune.utils.tables import table
from tests.bench import quality
from tests.bench.ground import CLASSES, SPEC, macs_of
from tests.bench.timing import heading, write_json
from tests.bench.ways import BUDGETS, ways

RESULT = Path(__file__).parent / "results" / "over_time.json"
ENGINES: tuple[Engine, ...] = ("onnxruntime", "channels-last")
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One network: the share of the MACs, points of top-1 lost, and by engine the ratio of times, low and high."""

    way: str
    macs: float
    drop: float
    drop_std: float
    times: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def timed(dense: nn.Module, network: nn.Module, images: Tensor) -> dict[str, tuple[float, float, float]]:
    """Share of the dense network's time that the other one takes, by engine."""
    found = dict[str, tuple[float, float, float]]()
    with evaluating(dense), evaluating(network):
        for engine in ENGINES:
            (one,) = timed_passes(engine, dense, network, [images])
            found[engine] = (1 / one.speedup, 1 / one.fastest, 1 / one.slowest)
    return found


def accuracy(rows: list[dict[str, Any]], way: str, macs: float) -> dict[str, Any] | None:
    """The row of quality.json for this way and share of the MACs."""
    fitting = (row for row in rows if row["way"] == way and abs(row["macs"] - macs) < 0.01)
    return next(fitting, None)


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each way and budget that has figures."""
    known = json.loads(quality.RESULT.read_text())["rows"]
    dense = models.load(options.arch, CLASSES, str(options.weights))
    whole, images = macs_of(dense), torch.randn(BATCH, 3, SPEC.crop, SPEC.crop)
    for budget in options.budgets:
        for way in ways(budget, options):
            stages = [row for name in way.stages.values() if (row := accuracy(known, name, budget))]
            if not stages or not any(part in stages[-1]["way"] for part in options.only):
                continue
            quality.results(way, options)
            network = quality.network_in(quality.folder_of(way, 0, options)).eval()
            name, drop, deviation = (stages[-1][key] for key in ("way", "drop", "drop_std"))
            yield Row(name, macs_of(network) / whole, drop, deviation, timed(dense, network, images))


def show(rows: list[Row]) -> str:
    """For people."""

    def share(row: Row, engine: str) -> str:
        ratio, low, high = row.times[engine]
        return f"{ratio:.2f} ({low:.2f}–{high:.2f})"

    cells = [[r.way, f"{r.macs:.3f}", f"{r.drop:.2f}", *(share(r, engine) for engine in ENGINES)] for r in rows]
    return table(["way", "MACs", "points lost", *(f"time, {engine}" for engine in ENGINES)], cells)


def main() -> None:
    """Time all, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the ResNet-20")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/quality"), help="where the runs of the bench are kept"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", nargs="+", default=[""], help="only ways whose name holds one of these")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.set_defaults(arch="resnet20", ranks=1, seeds=(0,), more=[], distilled=False, searched=False, peers=True)
    options = parser.parse_args()
    for name in ("data", "weights", "runs"):
        setattr(options, name, getattr(options, name).resolve())
    torch.set_num_threads(1)
    found = list(rows_of(options))
    print(show(found))
    command = "uv run python -m tests.bench.over_time --data DIR --weights FILE"
    only = " ".join(["", "--only", *map(repr, options.only)]) if any(options.only) else ""
    write_json(options.output, heading(command + only) | {"batch": BATCH, "rows": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
