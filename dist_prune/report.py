"""What a run says while it works: log, TensorBoard, JSON lines, tables. Only rank 0 writes."""

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from dist_prune.bases import Basis
from dist_prune.checkpoint import write_text
from dist_prune.ranks import Plan
from dist_prune.sites import Survey

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "numpy", "safetensors", "tensorboard")


@dataclass
class Report:
    """One run's voice. Without a folder (other ranks, dry runs) nothing is written to disk."""

    folder: Path | None = None
    speaks: bool = True
    entering: Callable[[str], None] = lambda _: None  # is told the name of each phase
    seconds: dict[str, float] = field(default_factory=dict)
    _writer: SummaryWriter | None = None
    _under_way: dict[str, float] = field(default_factory=dict)

    def open(self, folder: Path, purge_step: int | None = None) -> None:
        """From now on write into `folder` as well; a resumed run takes its curves up at `purge_step`."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def close(self) -> None:
        """Flush what is still in memory."""
        if self._writer is not None:
            self._writer.close()

    def written(self) -> int:
        """How long metrics.jsonl is, in bytes; the curves have as much."""
        self.flush()
        path = self.folder and self.folder / METRICS
        return path.stat().st_size if path and path.is_file() else 0

    def rewind(self, size: int) -> None:
        """Take back the points after the first `size` bytes of metrics.jsonl: the run goes on from there again."""
        if self.folder is None or not (self.folder / METRICS).is_file():
            return
        content = (self.folder / METRICS).read_bytes()
        kept, dropped = _points(content[:size]), _points(content[size:])
        write_text(self.folder / METRICS, content[:size].decode())
        if dropped:
            # TensorBoard forgets all curves from this step on, not only those that are taken back.
            first = min(point["step"] for point in dropped)
            self.close()
            self.open(self.folder, purge_step=first)
            for point in kept:
                if point["step"] >= first:
                    self._draw(point)

    def say(self, text: str) -> None:
        """Lines for people: the console, and log.txt."""
        if not self.speaks:
            return
        print(text, flush=True)
        if self.folder is not None:
            with (self.folder / "log.txt").open("a") as log:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                log.writelines(f"{stamp} {line}\n" for line in text.splitlines())

    def scalars(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        """One point on each curve `group/name`, in TensorBoard and metrics.jsonl."""
        if self.folder is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        point = {"group": group, "step": step, "time": time.time(), **known}
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self._draw(point)

    def _draw(self, point: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for name in point.keys() - {"group", "step", "time"}:
            value = math.nan if point[name] is None else point[name]
            self._writer.add_scalar(f"{point['group']}/{name}", value, point["step"], walltime=point["time"])

    def flush(self) -> None:
        """Make the curves visible to a running TensorBoard."""
        if self._writer is not None:
            self._writer.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and time it."""
        self.say(f"── {name}")
        self.entering(name)
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

    def site_spectra(self, survey: Survey, bases: Mapping[str, Basis], plan: Plan) -> None:
        """Per site its rank, and its spectrum with that rank marked."""
        if self._writer is None:
            return
        for site in survey.sites:
            rank = plan.ranks.get(site.name)
            self._writer.add_scalar(f"layer/{site.name}/rank", rank or site.outputs, 0)
            self._writer.add_figure(f"layer/{site.name}/spectrum", spectrum_figure(bases[site.name], rank), 0)
        self.flush()


def _points(lines: bytes) -> list[dict[str, Any]]:
    found = []
    for line in lines.splitlines():
        with suppress(ValueError):  # the last line of a run that was killed
            found.append(json.loads(line))
    return found


def spectrum_figure(basis: Basis, rank: int | None) -> Figure:
    """Eigenvalues as shares of their sum, on a logarithmic axis, one line a group; the rank as a dashed line."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    spectrum = basis.spectrum.cpu()
    shares = spectrum / spectrum.sum(-1, keepdim=True).clamp(min=1e-300)
    for group in shares:
        axes.semilogy(range(1, len(group) + 1), group.clamp(min=1e-12), linewidth=1.2)
    if rank is not None:
        axes.axvline(rank / len(shares), linestyle="--", color="black", linewidth=0.8)
        axes.set_title(f"rank {rank} keeps {100 * shares[:, : rank // len(shares)].sum() / len(shares):.2f} %")
    axes.set_xlabel("direction")
    axes.set_ylabel("share of the variance")
    return figure


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(headers), "  ".join("─" * w for w in widths), *map(line, rows)])


def plan_table(survey: Survey, plan: Plan, shares: Mapping[str, float] | None = None, unit: str = "") -> str:
    """What happens to each layer: shape, rank, cost before → after, share of the dense forward time.

    Where losses are known they stand in a column of their own; `unit` says of what.
    """
    sites = {site.name: site for site in survey.sites}
    rows = []
    for choice in plan.choices:
        site = sites.get(choice.site)
        time_share = f"{shares[choice.site]:.1f} %" if shares and choice.site in shares else ""
        if site is None:
            rows.append([choice.site, "", "dense", "", "", "", "", choice.reason])
            continue
        macs, weights = site.macs, site.dense_weights
        after = (macs, weights)
        if choice.rank is not None:
            after = (site.factored_macs(choice.rank), site.factored_weights(choice.rank))
        rank = "dense" if choice.rank is None else f"{choice.rank}/{site.outputs}"
        costs = [f"{_si(macs)} → {_si(after[0])}", f"{_si(weights)} → {_si(after[1])}"]
        loss = "" if choice.loss is None else f"{choice.loss:.3g}"
        rows.append([site.name, site.shape, rank, *costs, time_share, loss, choice.reason])
    headers = ["site", "shape", "rank", "MACs", "weights", "time", f"predicted {unit}".strip(), "why dense"]
    if plan.loss is None:
        headers, rows = headers[:6] + headers[7:], [row[:6] + row[7:] for row in rows]
    return table(headers, rows)


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:  # from here on three digits would round to a thousand
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.0f}P"


def environment() -> dict[str, Any]:
    """Versions, commit, machine and command: what one needs to run it again."""
    return {
        "command": shlex.join(sys.argv),
        "launch": launch_of(os.environ),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


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
