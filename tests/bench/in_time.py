"""What a network loses at a measured time: all forms against `output` alone, by budgets of latency.

    uv run python -m tests.bench.in_time --data DIR --weights FILE [--shares 0.7 …] [--bf16]

DIR is a folder of JPEGs of 32² and ten classes, FILE a state dict of `--arch`, a ResNet-20. Networks are
compressed as `compress` does it, from unlabelled training images, on one thread of the CPU; dense and compressed
then run in turns. Two networks take different times, so `output` alone is read off between its shares, at the time
that all forms took. Rows of other networks stay. `--bf16` plans and times in bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dist_prune import compress
from dist_prune.distributed.world import joined
from dist_prune.export.speed import timed_passes
from dist_prune.factorization.execution import Execution
from dist_prune.factorization.plan import PlanError
from dist_prune.network.memory_format import channels_last
from dist_prune.utils.tables import table
from tests.bench.ground import Ground, ground
from tests.bench.timing import heading, write_json

RESULT = Path(__file__).parent / "results" / "in_time.json"
FORMS = ("auto", "output")
COMMAND = "uv run python -m tests.bench.in_time --data DIR --weights FILE"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
BATCH = 64  # images of a pass: `--eval-batch-size`'s default, which budgets are timed with


@dataclass(frozen=True)
class Row:
    """One plan: the share of the time asked for, what it took, `low` and `high` by round, and what it lost.

    `bf16`: planned and timed in bfloat16 autocast; what it lost was measured in float32 always.
    """

    network: str
    forms: str
    asked: float
    time: float
    low: float
    high: float
    macs: float
    top1: float
    kl: float
    bf16: bool = False


def rows(
    at: Ground, arch: str, forms: str, shares: Sequence[float], images: int, seed: int, bf16: bool
) -> Iterator[Row]:
    """The networks at all shares that can be reached, from one set of statistics."""
    dense = channels_last(at.dense)
    batches = [channels_last_batch(batch.images) for batch in at.stream(at.training(images, seed), BATCH)]
    found, options = None, {"forms": forms, "seed": seed, "bf16": bf16}
    for share in shares:
        rule = f"budget:latency={share}"
        try:
            found = compress(dense, batches, rule, **options) if found is None else found.replan(rule)
        except PlanError as error:
            print(f"{forms}, {share}: {error}", flush=True)
            continue
        (taken,) = timed_passes("channels-last", dense, found.model, [batches[0]], Execution(bf16))
        lost = at.measure(found.model)
        times = (1 / taken.speedup, 1 / taken.fastest, 1 / taken.slowest)
        macs = found.compressed.macs / found.dense.macs
        yield Row(arch, forms, share, *times, macs, lost.top1, lost.kl or 0.0, bf16)


def channels_last_batch(images: Tensor) -> Tensor:
    """The same images, NHWC in memory."""
    return images.contiguous(memory_format=torch.channels_last)


def at_time(rows: Sequence[Row], time: float) -> float | None:
    """KL between the two networks whose times are next to this one, by linear interpolation; None beyond them."""
    known = sorted({row.time: row.kl for row in [*rows, Row("", "dense", 1, 1, 1, 1, 1, 0, 0)]}.items())
    for (before, more), (after, less) in pairwise(known):
        if before <= time <= after:
            return more + (less - more) * (time - before) / (after - before)
    return None


def show(found: Sequence[Row]) -> str:
    """The table."""
    plain = [row for row in found if row.forms == "output"]
    cells = []
    for row in found:
        other = at_time(plain, row.time) if row.forms != "output" and plain else None
        cells.append(
            [
                row.forms,
                f"{row.asked:.2f}",
                f"{row.time:.3f} ({row.low:.3f}–{row.high:.3f})",
                f"{row.macs:.3f}",
                f"{row.top1:.2f}",
                f"{row.kl:.3g}",
                "" if other is None else f"{other:.3g}",
            ]
        )
    heads = ["forms", "asked", "measured time (range)", "MACs", "top-1, %", "KL", "KL of output in this time"]
    return table(heads, cells)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the network")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    with joined("cpu") as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at = ground(options.data, options.weights, options.arch, world)
        for forms in FORMS:
            for row in rows(at, options.arch, forms, options.shares, options.images, options.seed, options.bf16):
                found.append(row)
                print(show(found), flush=True)
    known = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    others = [row for row in known if (row["network"], row.get("bf16", False)) != (options.arch, options.bf16)]
    write_json(options.output, heading(COMMAND) | {"rows": [*others, *map(asdict, found)]})


if __name__ == "__main__":
    main()
