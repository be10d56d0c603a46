"""The README's pictures: accuracy of this project and of others, drawn from quality.json and over_time.json.

    uv run python -m tests.bench.picture

Writes .github/accuracy-light.svg, over MACs, .github/time-light.svg, over measured time, and -dark.svg of both.
Each names the figures it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench import over_time, quality

PICTURES = Path(__file__).parents[2] / ".github"
THEMES = {"light": ("#1f2328", "#d1d9e0"), "dark": ("#e6edf3", "#3d444d")}  # text, grid
PRUNING = "Torch-Pruning"


@dataclass(frozen=True)
class Curve:
    """What is drawn together: rows of quality.json whose `way` begins and ends so; at each budget the best."""

    label: str
    begins: str
    color: str
    marker: str
    ends: str = ""


CURVES = (
    Curve("this, forms and widths", "all forms and widths, corrected, 512", "#2f81f7", "o"),
    Curve("… distilled without labels", "all forms and widths, distilled, 4096", "#3fb950", "s"),
    Curve("this, k×k → 1×1 alone", "k×k → 1×1 alone, corrected, 512", "#39c5cf", "P"),
    Curve("BALF", "BALF", "#d29922", "^"),
    Curve("PCA, same share everywhere", "PCA, uniform", "#a371f7", "D"),
    Curve("structured pruning", PRUNING, "#f85149", "v", "batch norm re-estimated"),
    Curve("… solved again as ours", PRUNING, "#db61a2", "x", "solved again"),
)


def points(
    rows: Iterable[Mapping[str, Any]], curve: Curve, tuning: str = "", engine: str = ""
) -> list[tuple[float, float, float]]:
    """(share of the MACs or of the time, points of top-1 lost, standard deviation), the dense network first.

    Args:
        rows: of quality.json or over_time.json.
        curve: which of them.
        tuning: after this fine-tuning, a key of `tuned`; empty: before.
        engine: whose time, a key of `times`; empty: MACs.
    """
    best: dict[float, tuple[float, float, float]] = {}
    for row in rows:
        own = row["way"].startswith(curve.begins) and row["way"].endswith(curve.ends)
        if own and (not tuning or tuning in row["tuned"]):
            drop, deviation = row["tuned"][tuning][:2] if tuning else (row["drop"], row["drop_std"])
            budget = round(row["macs"], 1)  # 0.6 and 0.3: ways meet a budget to within a per cent
            cost = row["times"][engine][0] if engine else row["macs"]
            best[budget] = min(best.get(budget, (0, float("inf"), 0)), (cost, drop, deviation), key=_drop)
    return [(1.0, 0.0, 0.0), *(best[budget] for budget in sorted(best, reverse=True))]


def _drop(point: tuple[float, float, float]) -> float:
    return point[1]


def draw(panels: Sequence[Panel], text: str, grid: str) -> Figure:
    """The panels beside each other, with one legend."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    with mpl.rc_context({**colors, "axes.edgecolor": grid, "grid.color": grid, "font.size": 9}):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for panel, own in zip(panels, axes, strict=True):
            panel.draw(own)
        axes[0].set(ylabel="top-1, points below the dense network")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


@dataclass(frozen=True)
class Panel:
    """One pair of axes: of which rows, after which fine-tuning, over which engine's time or else over MACs."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    tuning: str = ""
    engine: str = ""

    def draw(self, axes: Axes) -> None:
        """All curves that have a point beside the dense network."""
        for curve in CURVES:
            if len(found := points(self.rows, curve, self.tuning, self.engine)) == 1:
                continue  # not measured
            costs, drops, deviations = zip(*found, strict=True)
            lost = [-drop for drop in drops]
            axes.errorbar(costs, lost, deviations, label=curve.label, color=curve.color, marker=curve.marker)
        limits = (1.25, 0.75) if self.engine else (1.03, 0.17)
        axes.set(xlabel=f"share of the {'time' if self.engine else 'MACs'}", xlim=limits, title=self.title)
        axes.grid(visible=True, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


def source_of(file: Path) -> str:
    """What a picture says of the figures it was drawn from."""
    digest = hashlib.sha256(json.dumps(_rows(file), sort_keys=True).encode()).hexdigest()
    return f"tests/bench/results/{file.name}, rows {digest[:16]}"


def _rows(file: Path) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def main(folder: Path = PICTURES) -> None:
    """Draw all."""
    over_macs, timed = _rows(quality.RESULT), _rows(over_time.RESULT)
    tuned = quality.column(2, "distilled")
    macs = [Panel("before fine-tuning", over_macs), Panel("after two epochs of fine-tuning", over_macs, tuned)]
    time = [Panel(f"before fine-tuning, {engine}", timed, engine=engine) for engine in over_time.ENGINES]
    for theme, (text, grid) in THEMES.items():
        for name, panels, file in (("accuracy", macs, quality.RESULT), ("time", time, over_time.RESULT)):
            figure = draw(panels, text, grid)
            title = f"Accuracy over {'time' if name == 'time' else 'MACs'}"
            metadata = {"Date": None, "Title": title, "Description": source_of(file)}
            with mpl.rc_context({"svg.hashsalt": theme, "svg.fonttype": "none"}):
                figure.savefig(folder / f"{name}-{theme}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    main()
