"""What a run reports while it works: log, curves, progress, warnings, tables. Only rank 0 writes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dist_prune.artifacts.metrics import METRICS, points_of
from dist_prune.factorization.layers import Layer
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.plan_table import plan_markdown
from dist_prune.reporting.log import LOGGER, PROGRESS, Console, LogFile
from dist_prune.reporting.plots import prediction_figure, spectrum_figure
from dist_prune.reporting.progress import Meter
from dist_prune.reporting.tensorboard import FOLDER, Curves
from dist_prune.utils.files import write_text
from dist_prune.utils.text import append_text


@dataclass
class Report:
    """Reports of one run, to be closed. Without a folder (other ranks, dry runs) nothing is written to disk."""

    folder: Path | None = None
    speaks: bool = True
    entering: Callable[[str], None] = lambda _: None  # takes the name of each phase
    ranks: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    curves: Curves | None = None
    _under_way: dict[str, float] = field(default_factory=dict)

    _handlers: list[logging.Handler] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meter = Meter(PROGRESS.info, self.ranks, self.speaks)
        if self.speaks:
            LOGGER.setLevel(logging.INFO)
            self._attach(Console(self.meter.aside, self.meter.terminal))

    def _attach(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        LOGGER.addHandler(handler)

    def open(self, folder: Path) -> None:
        """From now on write into `folder` as well."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._attach(LogFile(folder / "log.txt"))
        self.curves = Curves(folder / FOLDER, self.warn)

    def close(self) -> None:
        """Flush what is still in memory, and take the handlers off the logger."""
        while self._handlers:
            LOGGER.removeHandler(self._handlers.pop())
        if self.curves is not None:
            self.curves.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from; `points` is how far metrics.jsonl had come."""
        return {"seconds": self.elapsed(), "warnings": self.warnings, "points": self.written()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what `state_dict` gave; what was warned of since comes after."""
        self.seconds, self.warnings = state["seconds"], [*state["warnings"], *self.warnings]
        self.rewind(state["points"])

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
        self.curves.restart()
        for point in points_of(kept):
            self.curves.point(point)

    def say(self, text: str) -> None:
        """Log lines for people."""
        if self.speaks:
            LOGGER.info(text)

    def warn(self, text: str) -> None:
        """Log what may have gone wrong, and keep it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
        if self.speaks:
            LOGGER.warning(text)

    def scalars(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        """One point on each curve `group/name`, in TensorBoard and metrics.jsonl."""
        if self.folder is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        point = {"group": group, "step": step, "time": time.time(), **known}
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in point.items()}
        append_text(self.folder / METRICS, json.dumps(finite) + "\n")
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
            site, choice = layer.site, plan.factored.get(layer.site.name)
            self.curves.value(f"layer/{site.name}/rank", site.outputs if choice is None else choice.ranks[0])
            self.curves.text(f"layer/{site.name}/form", "dense" if choice is None else choice.label)
            if layer.spectrum is not None:
                rank = choice.rank if choice is not None and choice.form == "output" else None
                self.curves.figure(f"layer/{site.name}/spectrum", partial(spectrum_figure, layer, rank))
        self.curves.text("plan", plan_markdown(layers, plan))
        self.curves.flush()

    def predictions(self, sites: Sequence[Mapping[str, Any]], unit: str) -> None:
        """Each site compressed alone: the predicted against the measured loss."""
        if self.curves is not None:
            self.curves.figure("layers/predicted and measured", partial(prediction_figure, sites, unit))
