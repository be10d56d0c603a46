"""What compression costs in accuracy at a given share of the MACs: this project's ways against others.

    uv run python -m tests.bench.quality --data DIR --weights FILE [--distilled] [--searched] [--peers] [--tuned …]

DIR is a CIFAR-10 folder of JPEGs (train/ and val/), FILE a ResNet-20 state dict. Every cell of this project is a
run of launch/local.py, started as a user starts it, once for each seed: the seed chooses the training images that
statistics and correction see. `--peers` adds methods of others, at as many MACs; `--tuned` the same two or twenty
`--epochs` of fine-tuning of the networks of these seeds, from labels alone and with distillation from the dense
network. Figures are of the whole validation set. What is finished in the folder `--runs` is not repeated; `--only`
measures some ways and keeps the rows of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.artifacts.saved_model import load_compressed
from dist_prune.distributed.world import joined
from dist_prune.utils.files import name_of
from dist_prune.utils.tables import table
from tests.bench import peers
from tests.bench.ground import ground, macs_of
from tests.bench.timing import heading, write_json

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "quality.json"
COMMAND = "uv run python -m tests.bench.quality --data DIR --weights FILE"
SEEDS = (0, 1, 2)
UNTUNED = ("--epochs", "0")
TUNING = {"labels": "none", "distilled": "0.9,4"}  # column → --distill
EPOCHS = {2: "two", 20: "twenty"}
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
    """Torch-Pruning with one of its criteria, and one of `peers.REPAIRS`."""

    importance: str
    share: float
    repair: str

    @property
    def stages(self) -> dict[str, str]:
        """See `Way`."""
        return {"projected": f"Torch-Pruning, {self.importance}, {self.repair}"}

    @property
    def key(self) -> tuple[str, ...]:
        """See `Way`."""
        return "torch-pruning", self.importance, str(self.share), self.repair

    def make(self, seed: int, folder: Path, options: argparse.Namespace) -> None:
        """Prune, measure, and write what a run of the program would, as far as it is shown."""
        with joined("cpu") as world:
            at = ground(options.data, options.weights, options.arch, world)
            network = peers.prune(at, self.importance, self.share, SEEN, seed, self.repair)
            dense, found = asdict(at.measure(at.dense)), asdict(at.measure(network))
            macs = {"dense": macs_of(at.dense), "compressed": macs_of(network)}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network, folder / NETWORK)
        write_json(folder / "result.json", {"dense": dense, "projected": found, "macs": macs})


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
        yield plain_way("whitened-svd", share, "BALF: whitened SVD, by budget")
        yield from (Peer(importance, share, repair) for repair in peers.REPAIRS for importance in peers.IMPORTANCE)


@dataclass(frozen=True)
class Row:
    """One stage of one way over the seeds: `drop` in points of top-1, `kl` in nats, means and deviations.

    `tuned` has the same four of each fine-tuning.
    """

    way: str
    macs: float
    drop: float
    drop_std: float
    kl: float
    kl_std: float
    drops: tuple[float, ...]
    tuned: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)


def folder_of(way: Way | Peer, seed: int, options: argparse.Namespace) -> Path:
    """Where a way's run is kept."""
    folder: Path = options.runs / f"{name_of([*way.key, *options.more])}-{seed}"
    return folder


def results(way: Way | Peer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """result.json of the way's runs, one a seed; what is not there yet is run now."""
    found = []
    for seed in options.seeds:
        folder = folder_of(way, seed, options)
        if not (folder / "result.json").is_file():
            way.make(seed, folder, options)
        found.append(json.loads((folder / "result.json").read_text()))
    return found


@dataclass(frozen=True)
class Cell:
    """One network to be fine-tuned, in one way."""

    folder: Path
    seed: int
    distill: str
    options: argparse.Namespace

    @property
    def kept(self) -> Path:
        """Where its metrics are, once it was tuned: beside the network."""
        return self.folder / f"tuned-{self.distill}-{self.options.epochs}-{self.options.tuning_images}.json"


def tunings(way: Way | Peer, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Metrics after each kind of fine-tuning, one a seed; as many processes at a time as there are ranks."""
    folders = {seed: folder_of(way, seed, options) for seed in options.tuned}
    cells = {
        column(options.epochs, how): [Cell(folder, s, TUNING[how], options) for s, folder in folders.items()]
        for how in options.tunings
    }
    if missing := [cell for some in cells.values() for cell in some if not cell.kept.is_file()]:
        with ProcessPoolExecutor(options.ranks, get_context("spawn")) as pool:
            list(pool.map(tune, missing))
    return {name: [json.loads(cell.kept.read_text()) for cell in some] for name, some in cells.items()}


def tune(cell: Cell) -> None:
    """Fine-tune one network, and keep its metrics."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        options, network = cell.options, network_in(cell.folder)
        at = ground(options.data, options.weights, options.arch, world)
        metrics = at.tune(network, cell.seed, cell.distill, options.epochs, options.tuning_images)
    write_json(cell.kept, asdict(metrics))


def column(epochs: int, how: str) -> str:
    """Of `tuned`: after so many epochs."""
    return f"{EPOCHS[epochs]} epochs, {how}"


def network_in(folder: Path) -> nn.Module:
    """The compressed network of a run, or of a peer."""
    if (folder / NETWORK).is_file():
        network: nn.Module = torch.load(folder / NETWORK, weights_only=False)  # whole: its shape is in no plan
        return network
    return load_compressed(folder)


def rows(way: Way | Peer, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each of the way's stages that ran; tunings beside the last."""
    found = results(way, options)
    macs = found[0]["macs"]["compressed"] / found[0]["macs"]["dense"]
    dense = [one["dense"]["top1"] for one in found]
    stages = [stage for stage in way.stages if found[0].get(stage) is not None]
    for stage in stages:
        drops, divergences = compared([one[stage] for one in found], dense)
        after = tunings(way, options) if options.tuned and stage == stages[-1] else {}
        before = [top1 for top1, seed in zip(dense, options.seeds, strict=True) if seed in options.tuned]
        spreads = {name: compared(metrics, before) for name, metrics in after.items()}
        yield Row(
            way.stages[stage],
            macs,
            *spread(drops),
            *spread(divergences),
            drops,
            {name: (*spread(lost), *spread(apart)) for name, (lost, apart) in spreads.items()},
        )


def compared(metrics: Sequence[dict[str, Any]], dense: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Points of top-1 lost and KL to the dense network, by seed."""
    drops = tuple(before - one["top1"] for one, before in zip(metrics, dense, strict=True))
    return drops, tuple(one["kl"] for one in metrics)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(found: Sequence[Row], options: argparse.Namespace) -> str:
    """The table."""
    extra = dict.fromkeys(name for row in found for name in row.tuned)
    cells = []
    for r in found:
        after = [format_spread(*t[:2], options.tuned) if (t := r.tuned.get(name)) else "" for name in extra]
        plain = [
            f"{r.macs:.3f}",
            format_spread(r.drop, r.drop_std, options.seeds),
            format_spread(r.kl, r.kl_std, options.seeds, 3),
        ]
        cells.append([r.way, *plain, *after])
    heads = ["way", "MACs", f"top-1 drop, pp, {seeds_of(options.seeds)}", "KL to dense"]
    return table([*heads, *(f"drop, {name}, {seeds_of(options.tuned)}" for name in extra)], cells)


def format_spread(mean: float, deviation: float, seeds: Sequence[int], digits: int = 2) -> str:
    """With the deviation where there are several seeds."""
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(seeds) > 1 else "")


def seeds_of(seeds: Sequence[int]) -> str:
    """In words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def main() -> None:
    """Run what is missing, print, write."""
    options = parsed()
    found: list[Row] = []
    for budget in options.budgets:
        for way in ways(budget, options):
            if options.only in " ".join(way.stages.values()):
                found += rows(way, options)
            print(show(found, options), flush=True)
    given = [f"--{name}" for name in ("distilled", "searched", "peers") if getattr(options, name)]
    given += [" ".join(["--tuned", *map(str, options.tuned)])] if options.tuned else []
    given += [] if options.epochs == min(EPOCHS) else [f"--epochs {options.epochs}"]
    given += [] if options.tunings == list(TUNING) else [" ".join(["--tunings", *options.tunings])]
    given += [] if options.budgets == list(BUDGETS) else [" ".join(["--budgets", *map(str, options.budgets)])]
    given += [f"--only '{options.only}'"] if options.only else []
    content = heading(" ".join([COMMAND, *given])) | {
        "ranks": options.ranks,
        "seeds": list(options.seeds),
        "tuned": list(options.tuned),
        "rows": [*(others(found, options.output) if options.only else []), *map(asdict, found)],
    }
    write_json(options.output, content)


def others(found: Sequence[Row], file: Path) -> list[dict[str, Any]]:
    """Rows that were measured before, and not now."""
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    now = {(row.way, round(row.macs, 3)) for row in found}
    return [row for row in before if (row["way"], round(row["macs"], 3)) not in now]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the ResNet-20")
    parser.add_argument("--arch", default="resnet20", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run, or cells at a time")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--only", default="", help="only ways whose name holds this")
    parser.add_argument("--distilled", action="store_true", help="from more images, then distilled, too")
    parser.add_argument("--searched", action="store_true", help="the best of several plans, too")
    parser.add_argument("--peers", action="store_true", help="methods of others, too")
    parser.add_argument("--tuned", type=int, nargs="*", default=[], help="seeds to fine-tune: minutes a network")
    parser.add_argument("--epochs", type=int, default=min(EPOCHS), choices=list(EPOCHS), help="of fine-tuning")
    parser.add_argument("--tunings", nargs="+", default=list(TUNING), choices=list(TUNING), help="kinds of it")
    parser.add_argument("--tuning-images", type=int, default=0, help="0: all")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("more", nargs="*", help="after --: flags for every run")
    options = parser.parse_args()
    if unknown := set(options.tuned) - set(options.seeds):
        parser.error(f"--tuned {seeds_of(sorted(unknown))}: not among --seeds")
    for name in ("data", "weights", "runs"):
        setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    main()
