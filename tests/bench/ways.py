"""Ways to compress to a share of the MACs: runs of this project's program, and methods of others."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dist_prune.distributed.world import joined
from tests.bench import peers
from tests.bench.ground import Ground, ground, macs_of
from tests.bench.timing import write_json

ROOT = Path(__file__).parents[2]
UNTUNED = ("--epochs", "0")
SEEN = 512  # images that every way sees before it is tuned, if it needs any
NETWORK = "network.pt"


@dataclass(frozen=True)
class Way:
    """Flags that compress to a share of the MACs; which stages of result.json are shown, under which names.

    The network after the last of them is the one that is tuned.
    """

    flags: tuple[str, ...]
    stages: dict[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        """What its runs are named by."""
        return self.flags

    def make(self, seed: int, folder: Path, options: argparse.Namespace) -> None:
        """One run of the program, in processes of its own."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = ["--nproc-per-node", str(options.ranks), "launch/local.py", "cifar10"]
        given = ["--data", str(options.data), "--weights", str(options.weights)]
        where = ["--seed", str(seed), "--run-dir", str(folder), "--overwrite"]
        words = [*launcher, *program, *given, *where, *UNTUNED, *self.flags, *options.more]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Peer:
    """A method of others, within a share of the MACs; measured, and kept as a run of the program would be."""

    name: str
    share: float
    compressed: Callable[[Ground, int], nn.Module]  # the dense network's ground, a seed → the network

    @property
    def stages(self) -> dict[str, str]:
        """See `Way`."""
        return {"projected": self.name}

    @property
    def key(self) -> tuple[str, ...]:
        """See `Way`."""
        return self.name, str(self.share)

    def make(self, seed: int, folder: Path, options: argparse.Namespace) -> None:
        """Compress, measure, and write what a run of the program would, as far as it is shown."""
        with joined("cpu") as world:
            at = ground(options.data, options.weights, options.arch, world)
            network = self.compressed(at, seed)
            dense, found = asdict(at.measure(at.dense)), asdict(at.measure(network))
            macs = {"dense": macs_of(at.dense), "compressed": macs_of(network)}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network, folder / NETWORK)
        write_json(folder / "result.json", {"dense": dense, "projected": found, "macs": macs})


def pruning(importance: str, share: float, repair: str) -> Peer:
    """Torch-Pruning with one of its criteria, and one of `peers.REPAIRS`."""

    def compressed(at: Ground, seed: int) -> nn.Module:
        return peers.prune(at, importance, share, SEEN, seed, repair)

    return Peer(f"Torch-Pruning, {importance}, {repair}", share, compressed)


def tucker(share: float) -> Peer:
    """Tucker-2 of the weights."""
    name = "Tucker-2 of the weights, uniform, batch norm re-estimated"
    return Peer(name, share, lambda at, seed: peers.tucker(at, share, SEEN, seed))


def forms_by_weight(share: float) -> Peer:
    """Every layer's form by the error of its weights."""
    name = "all forms by the weights' error, by budget, batch norm re-estimated"
    return Peer(name, share, lambda at, seed: peers.forms_by_weight(at, share, SEEN, seed))


def seed_way(ratio: float) -> Way:
    """PCA, the same share of every stride-1 convolution's ranks, nothing corrected."""
    flags = ("--method", "pca", "--sites", "@stride1", "--ranks", f"uniform:{ratio}", "--correct", "none")
    return Way(flags, {"projected": "PCA, uniform, stride-1 convolutions"})


def plain_way(method: str, share: float, name: str) -> Way:
    """Ranks by budget over all layers from the method's own spectra, nothing corrected."""
    budget = ("--sites", "*", "--method", method, "--ranks", f"budget:macs={share}", "--correct", "none")
    return Way((*budget, "--statistics-images", str(SEEN)), {"projected": name})


def own_way(share: float, images: int, options: str, *more: str) -> Way:
    """What `OPTIONS` allows, by budget, closed-form correction, perhaps label-free distillation."""
    budget = ("--sites", "*", "--method", "fisher", "--draws", "0", "--ranks", f"budget:macs={share}")
    seen = ("--statistics-images", str(SEEN), "--calibrate-images", str(images))
    stages = {"projected": "by budget", "corrected": "corrected", "distilled": "distilled"}
    named = {stage: f"{options}, {what}, {images} images" for stage, what in stages.items()}
    return Way((*budget, *seen, *OPTIONS[options], "--mirrored", "--eval-batch-size", "64", *more), named)


def searched_way(share: float) -> Way:
    """The best of several plans, tried on the images that the correction sees."""
    way = own_way(share, SEARCH_IMAGES, "all forms", "--search", str(PLANS))
    return replace(way, stages={stage: f"{name}, best of {PLANS} plans" for stage, name in way.stages.items()})


PLANS, SEARCH_IMAGES = 32, 4096
DISTILLED = (
    *("--distill-steps", "4000", "--distill-lr", "0.01", "--distill-images", "8192"),
    *("--pad", "0", "--bf16", "--channels-last"),
)
RATIOS = {0.584: 0.5, 0.346: 0.28}  # share of the MACs → uniform ratio that costs as much or less
BUDGETS = (*RATIOS, 0.2)
OPTIONS = {  # what the budget is spent on → flags
    "all forms and widths": ("--forms", "all", "--width", "on"),
    "all forms and widths, mirrored statistics": ("--forms", "all", "--width", "on", "--statistics-views"),
    "all forms": ("--forms", "all", "--width", "off"),
    "widths alone": ("--forms", "dense", "--width", "on"),
    "k×k → 1×1 alone": ("--forms", "output", "--width", "off"),
}


def ways(share: float, options: argparse.Namespace) -> Iterator[Way | Peer]:
    """What is compared at a share of the MACs."""
    if share in RATIOS:
        yield seed_way(RATIOS[share])
    for allowed in OPTIONS:
        yield own_way(share, SEEN, allowed)
        if options.distilled:
            yield own_way(share, 4096, allowed, *DISTILLED)
    if options.searched:
        yield searched_way(share)
    if options.peers:
        yield plain_way("weight-svd", share, "weight SVD, by budget")
        yield forms_by_weight(share)
        yield tucker(share)
        yield plain_way("whitened-svd", share, "BALF: whitened SVD, by budget")
        yield from (
            pruning(importance, share, repair) for repair in peers.REPAIRS for importance in peers.IMPORTANCE
        )
