"""What compression costs in accuracy at a given share of the MACs: the seed's way against this project's.

    uv run python -m tests.bench.quality --data DIR --weights FILE

DIR is a CIFAR-10 folder of JPEGs (train/ and val/), FILE a ResNet-20 state dict. Every cell is a run of
launch/local.py, started as a user starts it, once for each seed: the seed chooses the training images that
statistics and correction see. Figures are of the whole validation set, read from each run's result.json. Runs that
are finished in the folder `--runs` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_prune.checkpoint import name_of
from dist_prune.report import table
from tests.bench.timing import machine, write_json

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "quality.json"
COMMAND = "uv run python -m tests.bench.quality --data DIR --weights FILE"
SEEDS = (0, 1, 2)
UNTUNED = ("--epochs", "0")


@dataclass(frozen=True)
class Way:
    """Flags that compress to a share of the MACs; which stages of result.json are shown, under which names."""

    flags: tuple[str, ...]
    stages: dict[str, str]


def seed_way(ratio: float) -> Way:
    """PCA, the same share of every stride-1 convolution's ranks, nothing corrected."""
    flags = ("--method", "pca", "--sites", "@stride1", "--ranks", f"uniform:{ratio}", "--correct", "none")
    return Way(flags, {"projected": "PCA, uniform, stride-1 convolutions"})


def own_way(share: float, images: int, *more: str) -> Way:
    """Ranks by budget from Fisher spectra, closed-form correction, perhaps label-free distillation."""
    budget = ("--sites", "*", "--method", "fisher", "--draws", "0", "--ranks", f"budget:macs={share}")
    seen = (
        "--statistics-images",
        "512",
        "--calibrate-images",
        str(images),
        "--mirrored",
        "--eval-batch-size",
        "64",
    )
    stages = {"projected": "Fisher, by budget", "corrected": "… corrected", "distilled": "… distilled"}
    return Way((*budget, *seen, *more), {stage: f"{what}, {images} images" for stage, what in stages.items()})


DISTILLED = ("--distill-steps", "300", "--distill-images", "8192", "--pad", "0")
RATIOS = {
    0.584: 0.5,
    0.346: 0.28,
}  # share of the MACs → uniform ratio that costs as much or less


def ways(share: float, distilled: bool) -> tuple[Way, ...]:
    """What is compared at a share of the MACs."""
    in_closed_form = seed_way(RATIOS[share]), own_way(share, 512, "--mirrored")
    return (*in_closed_form, own_way(share, 4096, *DISTILLED)) if distilled else in_closed_form


@dataclass(frozen=True)
class Row:
    """One stage of one way over the seeds: `drop` in points of top-1, `kl` in nats, means and deviations."""

    way: str
    macs: float
    drop: float
    drop_std: float
    kl: float
    kl_std: float
    drops: tuple[float, ...]


def results(way: Way, options: argparse.Namespace) -> list[dict[str, Any]]:
    """result.json of the way's runs, one a seed; what is not there yet is run now."""
    found = []
    for seed in options.seeds:
        folder = options.runs / f"{name_of([*way.flags, *options.more])}-{seed}"
        if not (folder / "result.json").is_file():
            run(way, seed, folder, options)
        found.append(json.loads((folder / "result.json").read_text()))
    return found


def run(way: Way, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """One run of the program, in processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc-per-node", str(options.ranks), "launch/local.py", "cifar10"]
    given = ["--data", str(options.data), "--weights", str(options.weights)]
    where = ["--seed", str(seed), "--run-dir", str(folder), "--overwrite"]
    words = [*launcher, *program, *given, *where, *UNTUNED, *way.flags, *options.more]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rows(way: Way, found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A row for each of the way's stages that ran."""
    macs = found[0]["macs"]["compressed"] / found[0]["macs"]["dense"]
    for stage, name in way.stages.items():
        if found[0][stage] is not None:
            drops = tuple(one["dense"]["top1"] - one[stage]["top1"] for one in found)
            divergences = [one[stage]["kl"] for one in found]
            yield Row(name, macs, *spread(drops), *spread(divergences), drops)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(found: Sequence[Row], seeds: Sequence[int]) -> str:
    """The table."""
    cells = [
        [r.way, f"{r.macs:.3f}", f"{r.drop:.2f} ± {r.drop_std:.2f}", f"{r.kl:.3f} ± {r.kl_std:.3f}"] for r in found
    ]
    return table(["way", "MACs", f"top-1 drop, pp, seeds {', '.join(map(str, seeds))}", "KL to dense"], cells)


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of the ResNet-20")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument(
        "--distilled", action="store_true", help="from more images, then distilled, too: minutes each"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("more", nargs="*", help="after --: flags for every run")
    options = parser.parse_args()
    for name in ("data", "weights", "runs"):
        setattr(options, name, getattr(options, name).resolve())
    found: list[Row] = []
    for budget in options.budgets:
        for way in ways(budget, options.distilled):
            found += rows(way, results(way, options))
            print(show(found, options.seeds), flush=True)
    command = f"{COMMAND}{' --distilled' if options.distilled else ''}"
    content = {"command": command, "machine": machine(), "ranks": options.ranks}
    write_json(options.output, content | {"seeds": list(options.seeds), "rows": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
