"""Fair comparisons on a machine that others use too: interleaved runs, ratios, and where they were taken."""

from __future__ import annotations

import functools
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dist_prune.export.speed import processor_name


@dataclass(frozen=True)
class Row:
    """One comparison: the median over rounds of ours ÷ the plain way's, and its range; good up to `target`."""

    name: str
    ratio: float
    low: float
    high: float
    target: float
    detail: str


@dataclass(frozen=True)
class Pair:
    """Seconds of two functions, by round; each round ran both. `clock` says what kind of seconds."""

    ours: tuple[float, ...]
    plain: tuple[float, ...]
    clock: str = "wall"

    def row(self, name: str, target: float, detail: str) -> Row:
        ratios = [a / b for a, b in zip(self.ours, self.plain, strict=True)]
        ours, plain = statistics.median(self.ours), statistics.median(self.plain)
        medians = f"{ours:.4g} against {plain:.4g} {self.clock} s, {len(ratios)} rounds"
        return Row(
            name, statistics.median(ratios), min(ratios), max(ratios), target, f"{detail}; medians {medians}"
        )

    def rates(self) -> str:
        """How often a second, where the seconds are of one piece of work."""
        ours, plain = (1 / statistics.median(seconds) for seconds in (self.ours, self.plain))
        return f"{ours:.4g} against {plain:.4g}"


def interleaved(
    ours: Callable[[], object],
    plain: Callable[[], object],
    rounds: int,
    device: torch.device,
    clock: str = "wall",
    until: float = math.inf,
) -> Pair:
    """Time both in turns, A B, B A, …, after one call of each to warm up: drifts of the machine cancel.

    The `cpu` clock counts what this process computes, so that others on the machine matter less. Where the
    process waits, for a GPU or for other ranks, only `wall` is true. After the moment `until` of
    `time.monotonic` no round begins but the first.
    """
    seconds(ours, device, clock), seconds(plain, device, clock)
    taken: dict[Callable[[], object], list[float]] = {ours: [], plain: []}
    for index in range(rounds):
        if index and time.monotonic() > until:
            break
        for function in (ours, plain) if index % 2 == 0 else (plain, ours):
            taken[function].append(seconds(function, device, clock))
    return Pair(tuple(taken[ours]), tuple(taken[plain]), clock)


def seconds(function: Callable[[], object], device: torch.device, clock: str) -> float:
    """Seconds of one call by the clock, the device's work included."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    synchronise(device)
    began = now()
    function()
    synchronise(device)
    return now() - began


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, cores, threads in use, GPU, versions."""
    return {
        "cpu": processor_name(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


@functools.cache
def _driver() -> str | None:
    """The version of NVIDIA's driver, where nvidia-smi is there to tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    message = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return next(iter(message.stdout.splitlines()), None)


def table(rows: Sequence[Row]) -> str:
    """The rows for people, one line each."""
    width = max(len(row.name) for row in rows)
    head = f"{'':{width}}   ratio      range       target"
    return "\n".join([head, *(_line(row, width) for row in rows)])


def _line(row: Row, width: int) -> str:
    verdict = "≤" if row.ratio <= row.target else ">"
    return (
        f"{row.name:{width}}  {row.ratio:6.3f}  {row.low:.3f}–{row.high:.3f}  "
        f"{verdict} {row.target:.2f}  {row.detail}"
    )


def heading(command: str) -> dict[str, Any]:
    """What every result begins with: the command, the day (UTC) and the machine."""
    return {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": machine()}


def report(rows: Sequence[Row], command: str) -> dict[str, Any]:
    """The rows for programs, below a heading."""
    return heading(command) | {"rows": [asdict(row) for row in rows]}


def command_line(module: str) -> str:
    """How this program was called, without the folders of this machine."""
    words = ["DIR" if Path(word).is_dir() else word for word in sys.argv[1:]]
    return " ".join(["uv run python -m", module, *words])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result for people and programs to read, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
