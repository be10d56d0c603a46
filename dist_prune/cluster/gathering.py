"""The results of a sweep in one table and one picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from dist_prune.cluster.sweep import Sweep
from dist_prune.reporting.outcomes import Outcome, front, outcome_of
from dist_prune.utils.files import replacing, write_text
from dist_prune.utils.tables import table
from dist_prune.utils.text import read_text


def outcomes(sweep: Sweep) -> list[Outcome]:
    """Of all combinations that are finished, in the sweep's order."""
    tasks = zip(sweep.combinations, sweep.runs(), strict=True)
    return [
        outcome_of(c.name, c.values, json.loads(read_text(t.folder / t.product))) for c, t in tasks if t.is_done
    ]


def gather(sweep: Sweep) -> str:
    """Write `results.csv` and `pareto.png` into the sweep's folder; the table for people, and where they are."""
    found = outcomes(sweep)
    if not found:
        return f"no run of {sweep.folder} is finished"
    write_text(sweep.folder / "results.csv", as_csv(found))
    with replacing(sweep.folder / "pareto.png") as aside:
        picture(found).savefig(aside, format="png", dpi=150)
    text = as_table(found) + over_seeds(found)
    write_text(sweep.folder / "results.txt", text + "\n")
    missing = len(sweep.combinations) - len(found)
    rest = f"; {missing} of {len(sweep.combinations)} runs are not finished" if missing else ""
    return f"{text}\nwritten to {sweep.folder}: results.csv, results.txt, pareto.png{rest}"


def as_table(found: Sequence[Outcome]) -> str:
    """One line per run; * marks what no other run beats in both cost and accuracy."""
    best = set(map(id, front(found)))
    rows = [
        [
            o.name + (" *" if id(o) in best else ""),
            f"{o.macs:.3f}",
            f"{o.params:.3f}",
            o.stage,
            f"{o.top1:.2f} %",
            f"{o.top1 - o.dense:+.2f}",
            f"{o.kl:.4f}",
            f"{o.seconds:.0f} s",
        ]
        for o in found
    ]
    headers = ["run (* on the Pareto front)", "MACs", "params", "stage", "top-1", "to dense", "KL", "time"]
    return table(headers, rows)


def over_seeds(found: Sequence[Outcome]) -> str:
    """Where seeds were swept: mean ± standard deviation over them; else nothing."""
    groups: dict[str, list[Outcome]] = {}
    for o in found:
        name = ", ".join(f"{k}={v}" for k, v in o.values.items() if k != "seed") or "all"
        groups.setdefault(name, []).append(o)
    if all(len(group) == 1 for group in groups.values()):
        return ""
    rows = [
        [name, str(len(group)), _spread([o.macs for o in group], 3), _spread([o.top1 for o in group], 2)]
        for name, group in groups.items()
    ]
    return "\n\n" + table(["over seeds, mean ± deviation", "runs", "MACs", "top-1 %"], rows)


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def picture(found: Sequence[Outcome]) -> Figure:
    """Top-1 over MACs, one colour for each combination but for budget and seed; the Pareto front as a line."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Outcome]] = {}
    for o in found:
        fixed = {k: v for k, v in o.values.items() if k not in ("ranks", "seed")}
        groups.setdefault(", ".join(f"{k}={v}" for k, v in fixed.items()) or "runs", []).append(o)
    for name, group in groups.items():
        axes.scatter([o.macs for o in group], [o.top1 for o in group], s=24, label=name)
    best = front(found)
    axes.plot([o.macs for o in best], [o.top1 for o in best], color="black", linewidth=0.8, label="Pareto front")
    axes.axhline(found[0].dense, linestyle="--", color="grey", linewidth=0.8, label="dense")
    axes.set_xlabel("MACs, share of the dense network's")
    axes.set_ylabel("top-1 on the validation images, %")
    axes.legend(fontsize="small")
    return figure


def as_csv(found: Sequence[Outcome]) -> str:
    """All figures, for programs."""
    axes = list(found[0].values)
    names = ["macs", "params", "dense", "stage", "top1", "kl", "seconds"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *axes, *names])
    for o in found:
        values = [o.values[axis] for axis in axes]
        writer.writerow([o.name, *values, *(getattr(o, name) for name in names)])
    return out.getvalue()
