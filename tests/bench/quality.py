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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.artifacts.saved_model import load_compressed
from dist_prune.distributed.world import joined
from dist_prune.utils.files import name_of
from dist_prune.utils.tables import table
from tests.bench.ground import ground
from tests.bench.timing import heading, write_json
from tests.bench.ways import BUDGETS, NETWORK, Peer, Way, ways

RESULT = Path(__file__).parent / "results" / "quality.json"
COMMAND = "uv run python -m tests.bench.quality --data DIR --weights FILE"
SEEDS = (0, 1, 2)
TUNING = {"labels": "none", "distilled": "0.9,4"}  # column → --distill
EPOCHS = {2: "two", 20: "twenty"}


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
