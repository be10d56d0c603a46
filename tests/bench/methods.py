"""Every method at two uniform ratios, without retraining: top-1, divergence from the dense network, seconds.

    uv run torchrun --standalone --nproc-per-node 2 -m tests.bench.methods --data DIR --weights FILE

DIR is a CIFAR-10 folder of JPEGs (train/ and val/), FILE a ResNet-20 state dict. Statistics come from training
images, figures from the whole validation set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import Rule
from dist_prune.config.recipes import RECIPES
from dist_prune.data.dataset import Dataset, Split, open_dataset
from dist_prune.data.loader import Stream, evaluation_stream
from dist_prune.distributed.world import World, joined
from dist_prune.factorization.bases import solve
from dist_prune.factorization.plan import cost, make_plan
from dist_prune.factorization.project import project, rebuild
from dist_prune.network import models
from dist_prune.network.sites import Survey, survey
from dist_prune.statistics import collect as statistics
from dist_prune.statistics.collect import Statistics
from dist_prune.training.evaluate import Metrics, Predictions, predict, score
from dist_prune.utils.tables import table
from tests.bench.timing import machine, write_json

RESULT = Path(__file__).parent / "results" / "methods.json"
RATIOS = (0.5, 0.3)

METHODS: dict[str, MethodConfig] = {
    "pca": MethodConfig("pca"),
    "pca, input side": MethodConfig("pca", side="input"),
    "fisher": MethodConfig("fisher"),
    "fisher, mse": MethodConfig("fisher", loss="mse"),
    "fisher, damping 0.1": MethodConfig("fisher", damping=0.1),
    "gradient": MethodConfig("gradient"),
    "gradient, input side": MethodConfig("gradient", side="input"),
    "gradient, greedy": MethodConfig("gradient", greedy=True),
    "hessian-local, kl": MethodConfig("hessian-local"),
    "hessian-local, mse": MethodConfig("hessian-local", loss="mse"),
    "hessian-local, input side": MethodConfig("hessian-local", side="input"),
    "hessian-local, sampled": MethodConfig("hessian-local", sampled=True),
    "hessian-global, kl": MethodConfig("hessian-global"),
    "hessian-global, kl-reverse": MethodConfig("hessian-global", loss="kl-reverse"),
    "hessian-global, mse": MethodConfig("hessian-global", loss="mse"),
    "hessian-global, rank loss": MethodConfig("hessian-global", rank_loss=True),
    "hessian-global, input side": MethodConfig("hessian-global", side="input"),
    "weight-svd": MethodConfig("weight-svd"),
    "random": MethodConfig("random"),
    "random-init": MethodConfig("random-init"),
}


@dataclass(frozen=True)
class Row:
    """One method at one ratio; `seconds` for statistics and bases, which both share; `drop` in points."""

    method: str
    ratio: float
    macs: float
    top1: float
    drop: float
    kl: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What all methods share."""

    world: World
    dataset: Dataset
    dense: nn.Module
    survey: Survey
    reference: Predictions
    baseline: Metrics
    images: int
    seed: int


def prepare(data: Path, weights: str, images: int, seed: int, world: World) -> Bench:
    """Load everything and evaluate the dense network."""
    dataset = open_dataset(data)
    dense = models.load("resnet20", 10, weights).to(world.device)
    found = survey(dense, torch.zeros(1, 3, 32, 32, device=world.device)).select("@stride1")
    reference = predict(dense, stream(dataset.val, world))
    baseline = score(reference, len(dataset.val), world)
    return Bench(world, dataset, dense, found, reference, baseline, images, seed)


def stream(split: Split, world: World) -> Stream:
    """Images as validation sees them."""
    return evaluation_stream(split, RECIPES["cifar10"].images.image, world, 64, 1)


def measure(bench: Bench, name: str, method: MethodConfig) -> Iterator[Row]:
    """Collect once, then project at each ratio."""
    world, sites = bench.world, bench.survey.sites
    base = bench.dataset.train.subset(bench.images, bench.seed)
    began = time.perf_counter()
    trained = method.method != "random-init"
    found = Statistics()
    if trained:
        found = statistics.collect(
            bench.dense,
            sites,
            lambda n: stream(base.subset(min(n, len(base)), bench.seed) if n else base, world),
            world,
            method,
            bench.seed,
        )
    bases = solve(bench.dense, sites, found, method, bench.seed, world) if trained else {}
    seconds = time.perf_counter() - began
    for ratio in RATIOS:
        plan = make_plan(Rule("uniform", ratio), bench.survey, 1, method.side)
        torch.manual_seed(bench.seed)
        untrained = rebuild(models.build("resnet20", 10), plan).to(world.device)
        model = project(bench.dense, sites, bases, plan, method.side) if trained else untrained
        found_here = predict(model, stream(bench.dataset.val, world))
        metrics = score(found_here, len(bench.dataset.val), world, bench.reference)
        share = cost(bench.survey, plan).macs / bench.survey.macs
        yield Row(name, ratio, share, metrics.top1, bench.baseline.top1 - metrics.top1, metrics.kl or 0.0, seconds)


def show(rows: Sequence[Row], baseline: Metrics) -> str:
    """The table, in the order measured."""
    shown = (("ratio", "g"), ("macs", ".3f"), ("top1", ".2f"), ("drop", ".2f"), ("kl", ".3f"), ("seconds", ".1f"))
    cells = [[row.method, *(format(getattr(row, name), how) for name, how in shown)] for row in rows]
    headers = ["method", "ratio", "MACs", "top-1 %", "drop pp", "KL", "seconds"]
    return f"dense: top-1 {baseline.top1:.2f} %\n" + table(headers, cells)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", required=True, help="state dict of the ResNet-20")
    parser.add_argument("--images", type=int, default=8192, help="training images for the statistics")
    parser.add_argument("--methods", default="", help="only methods whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with joined("auto") as world:
        bench = prepare(options.data, options.weights, options.images, options.seed, world)
        chosen = {name: m for name, m in METHODS.items() if options.methods in name}
        rows = []
        for name, method in chosen.items():
            rows += measure(bench, name, method)
            if world.is_first:
                print(show(rows[-len(RATIOS) :], bench.baseline), flush=True)
        if world.is_first:
            print(show(rows, bench.baseline))
            settings = {"images": options.images, "seed": options.seed, "world_size": world.size}
            content = {"machine": machine(), "settings": settings, "dense": asdict(bench.baseline)}
            write_json(options.output, content | {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
