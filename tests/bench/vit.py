"""A vision transformer on CIFAR-10, compressed in closed form with and without dimensions of its heads.

    uv run python -m tests.bench.vit --data DIR --weights FILE

DIR is a CIFAR-10 folder of JPEGs (train/ and val/), FILE a state dict of `tiny_vit.py`. All ways see the same
training images without labels; figures are of the whole validation set.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_prune.distributed.world import joined
from dist_prune.network.attention import opened
from dist_prune.network.channels import Group, KeptChannels
from dist_prune.utils.tables import table
from dist_prune.width.costs import width_costs
from dist_prune.width.groups import find_groups
from dist_prune.width.moments import channel_weights
from dist_prune.width.narrowing import narrowed
from tests.bench.ground import SPEC, Ground, ground
from tests.bench.imagenet import Way
from tests.bench.timing import heading, write_json

RESULT = Path(__file__).parent / "results" / "vit.json"
COMMAND = "uv run python -m tests.bench.vit --data DIR --weights FILE"
ARCH = f"{Path(__file__).parent / 'tiny_vit.py'}:vit"
BUDGETS = (0.7, 0.5, 0.25)
STEPS = 100  # shares of a group that are tried
WAYS = {
    "forms, widths and heads": Way({"width": "on"}),
    "forms and widths, attention left alone": Way({"width": "on", "ignored": ["*.attn"]}),
    "forms alone": Way({"width": "off"}),
    "forms, widths and heads, not corrected": Way({"width": "on", "correct": "none"}),
    "SVD of the weights, by budget": Way({"method": "weight-svd", "correct": "none"}),
}


MAGNITUDE = "whole dimensions and hidden channels by magnitude, nothing solved again"


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
    if MAGNITUDE in options.ways:
        yield from removals(at, options.budgets)
    seen = [b.images.cpu() for b in at.stream(at.training(options.images, options.seed), 64) if len(b.images)]
    dense = at.measure(at.dense)
    print(f"dense: top-1 {dense.top1:.2f} %", flush=True)
    for name in (name for name in options.ways if name in WAYS):
        for budget, found in WAYS[name].compressions(at.dense, seen, options.budgets):
            reached = at.measure(found.model)
            share = found.compressed.macs / found.dense.macs
            predicted = found.predicted if found.unit == "KL" else None
            yield Row(name, budget, share, dense.top1 - reached.top1, reached.kl, predicted)


def removals(at: Ground, budgets: Sequence[float]) -> Iterator[Row]:
    """The same share of all groups, the channels of the smallest weights; what is left keeps its values."""
    dense, pair = at.measure(at.dense), torch.zeros(2, 3, SPEC.crop, SPEC.crop)
    network = opened(at.dense, pair[:1]).network
    groups = find_groups(network, pair).groups
    costs, order = width_costs(network, groups, pair[:1]), [magnitudes(network, g).argsort() for g in groups]
    for budget in budgets:
        shares = (step / STEPS for step in range(STEPS, 0, -1))
        widths = ([max(1, round(share * group.width)) for group in groups] for share in shares)
        found = next((each for each in widths if costs.at(each) <= budget * costs.total), None)
        if found is None:
            print(f"{MAGNITUDE}, {budget}: out of reach", flush=True)
            continue
        left = [tuple(sorted(o[-width:].tolist())) for o, width in zip(order, found, strict=True)]
        reached = at.measure(narrowed(network, map(KeptChannels, groups, left)))
        yield Row(MAGNITUDE, budget, costs.at(found) / costs.total, dense.top1 - reached.top1, reached.kl, None)


def magnitudes(network: nn.Module, group: Group) -> Tensor:
    """The squares of all weights that go with each channel, (width,)."""
    every = range(group.width)
    made = [network.get_submodule(name).get_parameter("weight").detach() for name in group.producers]
    rows = torch.stack([w.flatten(1).square().sum(1)[group.outputs(every)] for w in made])
    total = rows.sum(0).view(group.times, -1).sum(0)
    for consumer in group.solved:
        columns = channel_weights(network.get_submodule(consumer.name), consumer).square().sum((0, 2))
        total = total + columns[consumer.channels(group.width, every)].view(consumer.times, -1).sum(0)
    return total


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
    parser.add_argument("--ways", nargs="+", default=[*WAYS, MAGNITUDE], choices=[*WAYS, MAGNITUDE])
    parser.add_argument("--images", type=int, default=512, help="training images that all ways see")
    parser.add_argument("--seed", type=int, default=0, help="which images these are")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
