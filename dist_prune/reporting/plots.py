"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dist_prune.factorization.layers import Layer
from dist_prune.factorization.plan import Choice


def spectrum_figure(layer: Layer, rank: int | None) -> Figure:
    """Shares of the sum, on a logarithmic axis, one line per group; the rank as a dashed line."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    spectrum = layer.spectrum or ()
    for group in spectrum:
        axes.semilogy(range(1, len(group) + 1), [max(share, 1e-12) for share in group], linewidth=1.2)
    if rank is not None:
        axes.axvline(rank / max(1, len(spectrum)), linestyle="--", color="black", linewidth=0.8)
        kept = layer.kept(Choice(layer.site.name, rank)) or 0.0
        axes.set_title(f"rank {rank} keeps {100 * kept:.2f} %")
    axes.set_xlabel("direction")
    axes.set_ylabel("share of the sum")
    return figure


def prediction_figure(sites: Sequence[Mapping[str, Any]], unit: str) -> Figure:
    """Each site compressed alone: its predicted against its measured loss, logarithmic, with the diagonal."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    known = [(s["site"], max(s["predicted"], 1e-9), max(s["measured"], 1e-9)) for s in sites if s["predicted"]]
    axes.loglog([x for _, x, _ in known], [y for *_, y in known], "o", markersize=4)
    for name, x, y in known:
        axes.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize="x-small")
    if unit == "KL" and known:
        ends = [f(v for _, *both in known for v in both) for f in (min, max)]
        axes.plot(ends, ends, linestyle="--", color="grey", linewidth=0.8, label="as predicted")
        axes.legend(fontsize="small")
    axes.set_xlabel(f"predicted {unit}")
    axes.set_ylabel("measured KL, nats per image")
    axes.set_title("each layer compressed alone")
    return figure
