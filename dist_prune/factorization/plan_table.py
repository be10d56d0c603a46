"""A plan as a table, for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_prune.factorization.layers import Layer
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.utils.tables import si, table


def plan_markdown(layers: Sequence[Layer], plan: Plan) -> str:
    """What happens to each layer, as a table in Markdown."""
    lines = ["| layer | shape | rank | MACs | weights | |", "|---|---|---:|---:|---:|---|"]
    for choice, (site, *cells) in zip(plan.choices, plan_rows(layers, plan), strict=True):
        lines.append(f"| {' | '.join([f'`{site}`', *cells, choice.reason])} |")
    return "\n".join(lines)


def plan_rows(layers: Sequence[Layer], plan: Plan) -> list[list[str]]:
    """Of each site of a plan its name, shape, rank, and what it costs before → after: MACs, weights."""
    known, rows = {layer.site.name: layer for layer in layers}, []
    for choice in plan.choices:
        layer = known.get(choice.site)
        if layer is None:
            rows.append([choice.site, "", "dense", "", ""])
            continue
        site, is_pair = layer.site, choice.rank is not None and choice.form == "output"
        rank = f"{choice.label}/{site.outputs}" if is_pair else choice.label
        before, after = layer.costs(Choice(site.name, None)), layer.costs(choice)
        costs = [
            si(a) if choice.rank is None else f"{si(a)} → {si(b)}" for a, b in zip(before, after, strict=True)
        ]
        rows.append([site.name, site.shape, rank, *costs])
    return rows


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
