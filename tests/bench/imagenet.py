"""ImageNet networks with real weights, compressed without labels and without training: ours against others.

    uv run python -m tests.bench.imagenet --photos DIR [--arch NAME --weights WEIGHTS] [--budgets 0.8 …]

DIR has two folders of JPEGs, calibrate/ and val/, whose names begin with the class's index in the usual order:
`123-….jpg`. NAME is a network of torchvision or timm, or FILE.py:FUNCTION; the default is EfficientNet-Lite0 from
a Python package. All ways see the photos of calibrate/ alone; figures are of those of val/. Rows are added to the
results of other networks, which stay.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dist_prune import Compression, compress
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import Rule
from dist_prune.config.images import ImageSpec
from dist_prune.correction.calibration import Calibration
from dist_prune.data.dataset import list_unlabelled
from dist_prune.data.loader import evaluation_stream
from dist_prune.data.pretrained_images import spec_of
from dist_prune.data.views import Views
from dist_prune.distributed.world import joined
from dist_prune.factorization.plan import PlanError, cost, make_plan
from dist_prune.network import models
from dist_prune.network.models import is_timms
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating, survey
from dist_prune.utils.tables import table
from tests.bench import peers
from tests.bench.timing import heading, write_json

RESULT = Path(__file__).parent / "results" / "imagenet.json"
COMMAND = "uv run python -m tests.bench.imagenet --photos DIR"
LITE = f"{Path(__file__).parent / 'efficientnet_lite.py'}:lite0"
BUDGETS = (0.8, 0.65, 0.5)
LITE_SIDES = {"efficientnet_lite.py:lite0": 224, "efficientnet_lite.py:lite1": 240}

Batches = list[tuple[Tensor, Tensor]]  # images (n, 3, H, W) and their classes (n,)


@dataclass(frozen=True)
class Row:
    """One way at one budget; `macs` a share of the dense network's, `predicted` and `kl` in nats per image."""

    network: str
    way: str
    budget: float
    macs: float
    top1: float
    top5: float
    kl: float
    predicted: float | None = None
    held_out: float | None = None


def by_budget(budget: float, network: nn.Module, image: Tensor) -> str:
    """Ranks, and perhaps widths, by budget over all layers."""
    return f"budget:macs={budget}"


def uniform(budget: float, network: nn.Module, image: Tensor, step: float = 0.005) -> str:
    """The same share of every layer's outputs: the largest multiple of `step` that meets the budget."""
    found = survey(network, image)
    for count in range(int(1 / step), 0, -1):
        plan = make_plan(Rule("uniform", count * step), found, 1)
        if plan.ranks and cost(found, plan).macs <= budget * found.macs:
            return f"uniform:{count * step}"
    raise PlanError(f"no share of ranks meets a budget of {budget}")


@dataclass(frozen=True)
class Made:
    """A compressed network: asked for, and got, shares of the MACs; KL predicted, and that of its holdout."""

    budget: float
    model: nn.Module
    macs: float
    predicted: float | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class Way:
    """Arguments of `compress`, and how a share of the MACs becomes its `ranks`."""

    how: dict[str, Any] = field(default_factory=dict)
    ranks: Callable[[float, nn.Module, Tensor], str] = by_budget

    def networks(self, network: nn.Module, images: list[Tensor], budgets: Sequence[float]) -> Iterator[Made]:
        """One at each budget that can be met, all from one set of statistics."""
        found: Compression | None = None
        for budget in budgets:
            try:
                ranks = self.ranks(budget, network, images[0][:1])
                found = found.replan(ranks) if found else compress(network, images, ranks, **self.how)
            except PlanError as error:
                print(f"{self.how}, {budget}: {error}", flush=True)
                continue
            print(found, flush=True)
            predicted = found.predicted if found.unit == "KL" else None
            yield Made(budget, found.model, found.compressed.macs / found.dense.macs, predicted, found.kl)


@dataclass(frozen=True)
class Pruned:
    """Channels removed by Torch-Pruning's magnitude; what is left is solved again as ours, mirror images, too."""

    def networks(self, network: nn.Module, images: list[Tensor], budgets: Sequence[float]) -> Iterator[Made]:
        """One at each budget."""
        pixels, pair = torch.cat(images), torch.zeros_like(images[0][:2])
        settings = CorrectionConfig(calibrate_images=len(pixels), mirrored=True)
        seen = Calibration(pixels, torch.arange(len(pixels)), torch.clone, len(images[0]), Views(mirrored=True))
        for budget in budgets:
            pruned = peers.pruned_to(network, pair, "magnitude", budget)
            with joined("cpu") as world:
                found = peers.solved(network, pruned, pair, seen, settings, 0, world)
            share = survey(found, pair[:1]).macs / survey(network, pair[:1]).macs
            yield Made(budget, found, share)


VIEWS = {"mirrored": True, "statistics_views": True}
WAYS: dict[str, Way | Pruned] = {
    "ours": Way(),
    "ours, width and forms": Way({"width": "on"}),
    "ours, width and forms, mirror images": Way({"width": "on", "mirrored": True}),
    "ours, width and forms, mirror images, in statistics, too": Way({"width": "on", **VIEWS}),
    "ours, width and forms, a crop, too, in both": Way({"width": "on", "crops": 1, **VIEWS}),
    "ours, width and forms, mirror images and a crop": Way({"width": "on", "mirrored": True, "crops": 1}),
    "ours, width alone": Way({"width": "on", "forms": "dense"}),
    "ours, width and forms, not corrected": Way({"width": "on", "correct": "none"}),
    "ours, output form only": Way({"forms": "output"}),
    "ours, not corrected": Way({"correct": "none"}),
    "PCA, uniform": Way({"method": "pca", "correct": "none"}, uniform),
    "weight SVD, by budget": Way({"method": "weight-svd", "correct": "none"}),
    "BALF: whitened SVD, by budget": Way({"method": "whitened-svd", "correct": "none"}),
    "Torch-Pruning, magnitude, solved again": Pruned(),
}


def read(folder: Path, spec: ImageSpec, count: int) -> Batches:
    """The photos of a folder as the network takes them; 0: all. The class stands in the file's name."""
    split = list_unlabelled(folder)
    split = split.subset(count, 0) if count else split
    with joined("cpu") as world:
        stream = evaluation_stream(split, spec, world, 10, 2)  # each with its graph in memory
        names = [Path(name).name for name in split.files]
        classes = torch.tensor([int(name.partition("-")[0]) for name in names])
        return [(batch.images.cpu(), classes[batch.indices.cpu()]) for batch in stream if len(batch.images)]


@torch.no_grad()
def answers(network: nn.Module, batches: Batches) -> Tensor:
    """Logits of all images, float64."""
    with evaluating(network):
        return torch.cat([logits_of(network(images)).double() for images, _ in batches])


def measure(logits: Tensor, dense: Tensor, classes: Tensor) -> tuple[float, float, float]:
    """Top-1 and top-5 in per cent, and KL to the dense network."""
    best = logits.topk(min(5, logits.shape[1])).indices == classes[:, None]
    p, q = dense.log_softmax(1), logits.log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean()
    return 100 * float(best[:, 0].double().mean()), 100 * float(best.any(1).double().mean()), float(kl)


def rows(name: str, network: nn.Module, options: argparse.Namespace, spec: ImageSpec) -> Iterator[Row]:
    """The dense network, then every way at every budget, each way from one set of statistics."""
    seen = [images for images, _ in read(options.photos / "calibrate", spec, options.images)]
    val = read(options.photos / "val", spec, options.images)
    classes, dense = torch.cat([labels for _, labels in val]), answers(network, val)
    yield Row(name, "dense", 1.0, 1.0, *measure(dense, dense, classes))
    for way in options.ways:
        for made in WAYS[way].networks(network, seen, options.budgets):
            found = measure(answers(made.model, val), dense, classes)
            yield Row(name, way, made.budget, made.macs, *found, made.predicted, made.held_out)


def show(found: Sequence[Row]) -> str:
    """The table."""
    cells = [
        [
            r.network,
            r.way,
            *(f"{v:.3f}" for v in (r.budget, r.macs)),
            f"{r.top1:.1f} / {r.top5:.1f}",
            f"{r.kl:.3f}",
        ]
        for r in found
    ]
    return table(["network", "way", "budget", "MACs", "top-1 / top-5 %", "KL to dense"], cells)


def images_of(options: argparse.Namespace) -> ImageSpec:
    """What the network takes: said, timm's, the weights' or the usual."""
    if side := LITE_SIDES.get(Path(options.arch).name):
        return ImageSpec(0, side, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    if is_timms(options.arch):
        return spec_of(options.arch)
    if options.weights.isupper() or options.weights.startswith("IMAGENET"):
        found = torchvision.models.get_model_weights(options.arch)[options.weights].transforms()
        kind = "bicubic" if "bicubic" in str(found.interpolation) else "bilinear"
        return ImageSpec(found.resize_size[0], found.crop_size[0], tuple(found.mean), tuple(found.std), kind)
    return ImageSpec(options.resize, options.crop)


def main() -> None:
    """Measure, print, write."""
    options = parsed()
    network = models.load(options.arch, options.classes, options.weights)
    name = Path(options.arch).name.rpartition(":")[2]
    found: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows(name, network, options, images_of(options)):
            found.append(row)
            print(show(found), flush=True)
            keep(options.output, row)


def keep(output: Path, row: Row) -> None:
    """Write the row beside those of other networks, ways and budgets."""
    before = json.loads(output.read_text())["rows"] if output.is_file() else []
    same = row.network, row.way, row.budget
    kept = [other for other in before if (other["network"], other["way"], other["budget"]) != same]
    write_json(output, heading(COMMAND) | {"rows": [*kept, asdict(row)]})


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with calibrate/ and val/")
    parser.add_argument("--arch", default=LITE, help="torchvision's or timm's name, or FILE.py:FUNCTION")
    parser.add_argument(
        "--weights", default="none", help="file, torchvision's name, or none: as the function gives it"
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--resize", type=int, default=0, help="shorter side, where the weights do not say; 0: as it is"
    )
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--images", type=int, default=0, help="of each folder; 0: all")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
