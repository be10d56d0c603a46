"""What a run says while it works: log, curves, progress, warnings, tables. Only rank 0 writes."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_prune.checkpoint import write_text
from dist_prune.curves import FOLDER, Curves
from dist_prune.figures import prediction_figure, spectrum_figure
from dist_prune.layers import Layer
from dist_prune.progress import Meter
from dist_prune.ranks import Plan

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "numpy", "safetensors", "tensorboard")


@dataclass
class Report:
    """One run's voice. Without a folder (other ranks, dry runs) nothing is written to disk."""

    folder: Path | None = None
    speaks: bool = True
    entering: Callable[[str], None] = lambda _: None  # is told the name of each phase
    ranks: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    curves: Curves | None = None
    _under_way: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meter = Meter(self.say, self.ranks, self.speaks)
        if self.meter.terminal:  # which has a bar
            self.meter.line = self._log

    def open(self, folder: Path) -> None:
        """From now on write into `folder` as well."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.curves = Curves(folder / FOLDER, self.warn)

    def close(self) -> None:
        """Flush what is still in memory."""
        if self.curves is not None:
            self.curves.close()

    def written(self) -> int:
        """How long metrics.jsonl is, in bytes; the curves have as much."""
        self.flush()
        path = self.folder and self.folder / METRICS
        return path.stat().st_size if path and path.is_file() else 0

    def rewind(self, size: int) -> None:
        """Take back what came after the first `size` bytes of metrics.jsonl: the run goes on from there again.

        TensorBoard forgets everything, and is given the points before.
        """
        if self.folder is None or self.curves is None:
            return
        kept = (self.folder / METRICS).read_bytes()[:size] if (self.folder / METRICS).is_file() else b""
        write_text(self.folder / METRICS, kept.decode())
        self.curves.begin_anew()
        for point in points_of(kept):
            self.curves.point(point)

    def say(self, text: str) -> None:
        """Lines for people: the console, and log.txt."""
        if not self.speaks:
            return
        with self.meter.aside():
            print(text, flush=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self.folder is not None:
            with (self.folder / "log.txt").open("a") as log:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                log.writelines(f"{stamp} {line}\n" for line in text.splitlines())

    def warn(self, text: str) -> None:
        """Say what may have spoilt something, and keep it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
        self.say(f"warning: {text}")

    def scalars(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        """One point on each curve `group/name`, in TensorBoard and metrics.jsonl."""
        if self.folder is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        point = {"group": group, "step": step, "time": time.time(), **known}
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(finite) + "\n")
        if self.curves is not None:
            self.curves.point(point)

    def flush(self) -> None:
        """Make the curves visible to a running TensorBoard."""
        if self.curves is not None:
            self.curves.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and time it."""
        self.say(f"── {name}")
        self.entering(name)
        self.meter.name = name
        self._under_way[name] = time.perf_counter()
        yield
        self.seconds[name] = self.elapsed()[name]
        del self._under_way[name]
        self.say(f"   {name}: {self.seconds[name]:.1f} s")

    def elapsed(self) -> dict[str, float]:
        """Seconds of all phases, those under way included."""
        now = time.perf_counter()
        return self.seconds | {
            name: self.seconds.get(name, 0.0) + now - began for name, began in self._under_way.items()
        }

    def layers(self, layers: Sequence[Layer], plan: Plan) -> None:
        """Per layer its rank, and its spectrum with that rank marked; the plan as a table."""
        if self.curves is None:
            return
        for layer in layers:
            rank = plan.ranks.get(layer.name)
            self.curves.value(f"layer/{layer.name}/rank", rank or layer.outputs)
            if layer.spectrum is not None:
                self.curves.figure(f"layer/{layer.name}/spectrum", partial(spectrum_figure, layer, rank))
        self.curves.text("plan", plan_markdown(layers, plan))
        self.curves.flush()

    def predictions(self, sites: Sequence[Mapping[str, Any]], unit: str) -> None:
        """Each site compressed alone: the predicted against the measured loss."""
        if self.curves is not None:
            self.curves.figure("layers/predicted and measured", partial(prediction_figure, sites, unit))


def points_of(lines: bytes) -> list[dict[str, Any]]:
    """The points in the lines of metrics.jsonl; what a run that was killed left of its last line is left out."""
    found = []
    for line in lines.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def plan_markdown(layers: Sequence[Layer], plan: Plan) -> str:
    """What happens to each layer, as a table in Markdown."""
    lines = ["| layer | shape | rank | MACs | weights | |", "|---|---|---:|---:|---:|---|"]
    for choice, (site, *cells) in zip(plan.choices, plan_rows(layers, plan), strict=True):
        lines.append(f"| {' | '.join([f'`{site}`', *cells, choice.reason])} |")
    return "\n".join(lines)


def plan_rows(layers: Sequence[Layer], plan: Plan) -> list[list[str]]:
    """Of each site of a plan its name, shape, rank, and what it costs before → after: MACs, weights."""
    known, rows = {layer.name: layer for layer in layers}, []
    for choice in plan.choices:
        layer = known.get(choice.site)
        if layer is None:
            rows.append([choice.site, "", "dense", "", ""])
            continue
        rank = "dense" if choice.rank is None else f"{choice.rank}/{layer.outputs}"
        before, after = layer.costs(None), layer.costs(choice.rank)
        costs = [
            si(a) if choice.rank is None else f"{si(a)} → {si(b)}" for a, b in zip(before, after, strict=True)
        ]
        rows.append([layer.name, layer.shape, rank, *costs])
    return rows


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(headers), "  ".join("─" * w for w in widths), *map(line, rows)])


def plan_table(
    layers: Sequence[Layer], plan: Plan, shares: Mapping[str, float] | None = None, unit: str = ""
) -> str:
    """What happens to each layer: shape, rank, cost before → after, share of the dense forward time.

    Predicted losses are of `unit`; columns of which nothing is known are left out.
    """
    times = {site: f"{share:.1f} %" for site, share in (shares or {}).items()}
    rows = [
        [*row, times.get(choice.site, ""), "" if choice.loss is None else f"{choice.loss:.3g}", choice.reason]
        for choice, row in zip(plan.choices, plan_rows(layers, plan), strict=True)
    ]
    headers = ["site", "shape", "rank", "MACs", "weights", "time", f"predicted {unit}".strip(), "why dense"]
    said = [index for index in range(len(headers)) if index < 3 or any(row[index] for row in rows)]
    return table([headers[i] for i in said], [[row[i] for i in said] for row in rows])


def si(number: float) -> str:
    """Three digits and a unit: 1.81G."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:  # from here on three digits would round to a thousand
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.0f}P"


def environment() -> dict[str, Any]:
    """Versions, commit, machine and command: what one needs to run it again."""
    return {
        "command": shlex.join(sys.argv),
        "start": start_of(sys.argv, os.environ),
        "launch": launch_of(os.environ),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


def start_of(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The command that starts as many processes with these words, through torchrun or srun where they did."""
    program = [*argv] if Path(argv[0]).suffix == ".py" else ["--no-python", Path(argv[0]).name, *argv[1:]]
    if "TORCHELASTIC_RUN_ID" in environ:
        size, here = int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
        place = ["--standalone"] if here == size else ["--nnodes", str(size // here), "--rdzv-backend", "c10d"]
        place += [] if here == size else ["--rdzv-endpoint", "FIRST_NODE"]
        return shlex.join(["torchrun", *place, "--nproc-per-node", str(here), *program])
    alone = ["python", *argv] if program == [*argv] else program[1:]
    if "SLURM_STEP_NUM_TASKS" in environ:
        nodes, tasks = environ.get("SLURM_STEP_NUM_NODES", "1"), environ["SLURM_STEP_NUM_TASKS"]
        return shlex.join(["srun", "--nodes", nodes, "--ntasks", tasks, *alone])
    return shlex.join(alone)


def launch_of(environ: Mapping[str, str]) -> str:
    """What torchrun or SLURM calls this job, the same after a restart; empty without them."""
    torchrun, slurm = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("SLURM_JOB_ID", "")
    return " ".join(f"{name} {value}" for name, value in (("slurm", slurm), ("torchrun", torchrun)) if value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, with `+` if files differ from it; None outside a repository.

    A snapshot is no repository, and may lie within another: the commit was noted beside it.
    """
    here = Path(__file__).parent
    noted = here.with_name("COMMIT")
    if noted.is_file():
        return noted.read_text().strip()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
