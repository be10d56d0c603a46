"""The README's picture: accuracy over MACs of this project and of others, drawn from results/quality.json.

    uv run python -m tests.bench.picture

Writes .github/accuracy-light.svg and .github/accuracy-dark.svg. Each names the figures it was drawn from.
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

from tests.bench.quality import RESULT, TUNING

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
    Curve("this, forms and widths, from 512 images", "all forms and widths, corrected, 512", "#2f81f7", "o"),
    Curve("… then distilled without labels, seed 0", "all forms and widths, distilled, 4096", "#3fb950", "s"),
    Curve("this, k×k → 1×1 alone, from 512 images", "… corrected, 512 images", "#39c5cf", "P"),
    Curve("BALF", "BALF", "#d29922", "^"),
    Curve("PCA, the same share of every layer", "PCA, uniform", "#a371f7", "D"),
    Curve("structured pruning, best of 3", PRUNING, "#f85149", "v", "batch norm re-estimated"),
)


def points(rows: Iterable[Mapping[str, Any]], curve: Curve, tuning: str = "") -> list[tuple[float, float, float]]:
    """(share of the MACs, points of top-1 lost, standard deviation), the dense network first.

    Args:
        rows: of quality.json.
        curve: which of them.
        tuning: after this fine-tuning, a key of `tuned`; empty: before.
    """
    best: dict[float, tuple[float, float, float]] = {}
    for row in rows:
        own = row["way"].startswith(curve.begins) and row["way"].endswith(curve.ends)
        if own and (not tuning or tuning in row["tuned"]):
            drop, deviation = row["tuned"][tuning][:2] if tuning else (row["drop"], row["drop_std"])
            budget = round(row["macs"], 1)  # 0.6 and 0.3: ways meet a budget to within a per cent
            best[budget] = min(best.get(budget, (0, float("inf"), 0)), (row["macs"], drop, deviation), key=_drop)
    return [(1.0, 0.0, 0.0), *sorted(best.values(), reverse=True)]


def _drop(point: tuple[float, float, float]) -> float:
    return point[1]


def draw(rows: Sequence[Mapping[str, Any]], text: str, grid: str) -> Figure:
    """Before and after two epochs of fine-tuning, beside each other."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    with mpl.rc_context({**colors, "axes.edgecolor": grid, "grid.color": grid, "font.size": 9}):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        before, after = figure.subplots(1, 2)
        _panel(before, rows, "")
        _panel(after, rows, list(TUNING)[-1])
        before.set(title="before fine-tuning", ylabel="top-1, points below the dense network")
        after.set_title("after two epochs of fine-tuning")
        handles, labels = before.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], tuning: str) -> None:
    for curve in CURVES:
        if len(found := points(rows, curve, tuning)) == 1:
            continue  # not tuned
        macs, drops, deviations = zip(*found, strict=True)
        axes.errorbar(
            macs, [-drop for drop in drops], deviations, label=curve.label, color=curve.color, marker=curve.marker
        )
    axes.set(xlabel="share of the MACs", xlim=(1.03, 0.17))
    axes.grid(visible=True, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def source_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a picture says of the figures it was drawn from."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"tests/bench/results/quality.json, rows {digest[:16]}"


def main(folder: Path = PICTURES) -> None:
    """Draw both."""
    rows = json.loads(RESULT.read_text())["rows"]
    for theme, (text, grid) in THEMES.items():
        figure = draw(rows, text, grid)
        metadata = {"Date": None, "Title": "Accuracy over MACs", "Description": source_of(rows)}
        with mpl.rc_context({"svg.hashsalt": theme, "svg.fonttype": "none"}):
            figure.savefig(folder / f"accuracy-{theme}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    main()
