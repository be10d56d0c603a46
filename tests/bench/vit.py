"""A vision transformer on CIFAR-10, compressed in closed form with and without dimensions of its heads.

    uv run python -m tests.bench.vit --data DIR --weights FILE

DIR is a CIFAR-10 folder of JPEGs (train/ and val/), FILE a state dict of `tiny_vit.py`. All ways see the same
training images without labels; figures are of the whole validation set.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dist_prune.distributed.world import joined
from dist_prune.utils.tables import table
from tests.bench.ground import Ground, ground
from tests.bench.imagenet import Way
from tests.bench.timing import heading, write_json

RESULT = Path(__file__).parent / "results" / "vit.json"
COMMAND = "uv run python -m tests.bench.vit --data DIR --weights FILE"
ARCH = f"{Path(__file__).parent / 'tiny_vit.py'}:vit"
BUDGETS = (0.7, 0.5, 0.25)
WAYS = {
    "forms, widths and heads": Way({"width": "on"}),
    "forms and widths, attention left alone": Way({"width": "on", "ignored": ["*.attn"]}),
    "forms alone": Way({"width": "off"}),
    "forms, widths and heads, not corrected": Way({"width": "on", "correct": "none"}),
    "SVD of the weights, by budget": Way({"method": "weight-svd", "correct": "none"}),
}


@dataclass(frozen=True)
class Row:
    """One way at one budget; `macs` a share of the dense network's, `drop` in points of top-1, `kl` in nats."""

    way: str
    budget: float
    macs: float
    drop: float
    kl: float | None
    predicted: float | None


def rows(at: Ground, options: argparse.Namespace) -> Iterator[Row]:
    """Every way at every budget, each way from one set of statistics."""
    seen = [b.images.cpu() for b in at.stream(at.training(options.images, options.seed), 64) if len(b.images)]
    dense = at.measure(at.dense)
    print(f"dense: top-1 {dense.top1:.2f} %", flush=True)
    for name in options.ways:
        for budget, found in WAYS[name].compressions(at.dense, seen, options.budgets):
            reached = at.measure(found.model)
            share = found.compressed.macs / found.dense.macs
            predicted = found.predicted if found.unit == "KL" else None
            yield Row(name, budget, share, dense.top1 - reached.top1, reached.kl, predicted)


def show(found: list[Row]) -> str:
    """The table."""
    cells = [[r.way, f"{r.budget:g}", f"{r.macs:.3f}", f"{r.drop:.2f}", f"{r.kl or 0:.4f}"] for r in found]
    return table(["way", "budget", "MACs", "top-1 drop, pp", "KL to dense"], cells)


def main() -> None:
    """Measure, print, write."""
    options = parsed()
    torch.manual_seed(options.seed)
    found: list[Row] = []
    with joined("cpu") as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows(ground(options.data, options.weights, ARCH, world), options):
            found.append(row)
            print(show(found), flush=True)
    settings = {"images": options.images, "seed": options.seed}
    write_json(options.output, heading(COMMAND) | settings | {"rows": list(map(asdict, found))})


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of tiny_vit.py")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--images", type=int, default=512, help="training images that all ways see")
    parser.add_argument("--seed", type=int, default=0, help="which images these are")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
