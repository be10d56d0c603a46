"""All that a GPU changes, in one command: passes, training, decoding and latency, in bf16 and float32.

    uv run python -m tests.bench.gpu [--device cpu] [--quick] [--parts NAME …] [--seconds N] [--output FILE]

Made for one CUDA device and ten minutes at most (an H200 took two); with `--device cpu` the same parts run on
the CPU, smaller, and what needs a GPU says so. Synthetic images and random weights, but for `bases`, where a
network is trained on scikit-learn's digits. Neither weights nor data are needed, and of the packages in
pyproject.toml neither DALI (the part `decoding` then says that it was not measured) nor submitit, jinja2,
tomli-w and the extras.

Both sides of every ratio are taken in turns. A fraction is of what this device was measured to do at best, see
`ceilings.py`. Results are written after every part. A part that fails is told, the others go on, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_prune.distributed.world import World, joined
from tests.bench.ceilings import Ceilings, measure_ceilings
from tests.bench.decoding import decoding
from tests.bench.figures import Figure, format_table, has_failed, kept_going, missing
from tests.bench.phases import Bench, Scale, curvature_pass, fine_tuning, statistics_pass
from tests.bench.roughness import bases_of_rough_passes
from tests.bench.shapes import graphed_networks, rounded_ranks, whole_networks
from tests.bench.timing import command_line, heading, write_json

RESULT = Path(__file__).parent / "results" / "gpu.json"
CUDA = Scale()
CPU = Scale(("resnet18",), 64, 4, 2, 3, 1024, 256 << 20, (1, 8), 640, 10, 128)
QUICK = Scale(("resnet18",), 32, 2, 1, 1, 64, 1 << 20, (1, 2), 40, 1, 32)

Part = Callable[[Bench], Iterator[Figure]]
PARTS: dict[str, tuple[Part, float]] = {  # and the seconds it may begin new rounds in
    "statistics": (statistics_pass, 100),
    "bases": (bases_of_rough_passes, 60),
    "curvature": (curvature_pass, 70),
    "decoding": (decoding, 40),
    "fine-tuning": (fine_tuning, 60),
    "latency": (whole_networks, 50),
    "latency in CUDA graphs": (graphed_networks, 50),
    "rounding": (rounded_ranks, 60),
}
LEAST_S = 15.0  # no part is begun with less time left


def measure(world: World, scale: Scale, names: Sequence[str], end: float, keep: Callable[..., None]) -> bool:
    """Run the parts, handing all figures so far to `keep` after each; whether none failed."""
    found: dict[str, list[Figure]] = {}
    ceilings = measure_ceilings(world.device, scale.product, scale.copied)
    found["ceilings"] = list(ceilings.figures())
    for name in names:
        found[name] = list(kept_going(name, partial(_part, world, scale, ceilings, name, end)))
        keep(found)
    return not any(has_failed(figure) for figures in found.values() for figure in figures)


def _part(world: World, scale: Scale, ceilings: Ceilings, name: str, end: float) -> Iterator[Figure]:
    function, budget = PARTS[name]
    now = time.monotonic()
    if end - now < LEAST_S:
        yield missing(name, "no time was left: raise --seconds, or choose --parts")
        return
    print(f"{name} …", file=sys.stderr, flush=True)
    gc.collect()  # of a part that broke off
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    for figure in function(Bench(world, scale, ceilings, min(now + budget, end))):
        yield figure if scale == CUDA else replace(figure, target=None)  # targets are of full size


def content(scale: Scale, found: dict[str, list[Figure]]) -> dict[str, Any]:
    """For programs."""
    return heading(command_line("tests.bench.gpu")) | {
        "scale": asdict(scale),
        "parts": {part: [asdict(f) | {"verdict": f.verdict} for f in figures] for part, figures in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="does it run at all? Writes only to --output")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=540, help="in which parts are begun; default: 540")
    parser.add_argument("--output", type=Path, help=f"default on a GPU: results/{RESULT.name}")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if options.device == "cpu":
        torch.set_num_threads(1)
    scale = QUICK if options.quick else CUDA if options.device == "cuda" else CPU
    output = options.output or (RESULT if options.device == "cuda" and not options.quick else None)
    found: dict[str, list[Figure]] = {}

    def keep(so_far: dict[str, list[Figure]]) -> None:
        found.update(so_far)
        if output:
            write_json(output, content(scale, so_far))

    with joined(options.device) as world:
        sound = measure(world, scale, options.parts, end, keep)
    print(format_table(found))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
