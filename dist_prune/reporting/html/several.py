"""One page over several finished runs: their Pareto front, settings and figures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune.artifacts.reader import Record, accuracy_interval
from dist_prune.reporting.compare import flat
from dist_prune.reporting.html.charts import Plot, scatter
from dist_prune.reporting.html.page import HTML, write_pages
from dist_prune.reporting.outcomes import Outcome, front, outcome_of

MOST_VALUES = 4  # differing settings that name a run


@dataclass(frozen=True)
class Compared:
    """One run among several. `link` leads to its own page, if there is one."""

    outcome: Outcome
    interval: tuple[float, float]
    is_best: bool
    link: str | None
    settings: Mapping[str, str]


def over_all(runs: Sequence[Record], output: Path) -> list[Path]:
    """One page over several finished runs.

    Raises:
        CheckpointError: see `page.write_pages`.
    """
    return write_pages(output, "runs", context(runs, output.parent))


def context(runs: Sequence[Record], home: Path) -> dict[str, Any]:
    """All that the templates ask for; links are relative to `home`, the page's folder."""
    settings = differing(runs)
    outcomes = [_outcome(run, values) for run, values in zip(runs, settings, strict=True)]
    best = set(map(id, front(outcomes)))
    dense = {(run.result["dense"]["top1"], run.result["dense"]["images"]) for run in runs}
    compared = [
        Compared(
            o,
            accuracy_interval(o.top1, run.result["dense"]["images"]),
            id(o) in best,
            link(run.folder / HTML, home),
            values,
        )
        for o, run, values in zip(outcomes, runs, settings, strict=True)
    ]
    return {
        "title": f"{len(runs)} runs",
        "runs": sorted(compared, key=lambda c: c.outcome.macs),
        "columns": list(settings[0]),
        "pareto": list(pareto(outcomes)),
        "alike": len(dense) == 1,
    }


def link(page: Path, home: Path) -> str | None:
    """From a page in the folder `home` to this one, if it is there."""
    return os.path.relpath(str(page), str(home)) if page.is_file() else None


def _outcome(run: Record, values: Mapping[str, str]) -> Outcome:
    name = run.folder.resolve().name
    return outcome_of(name, values, run.result)


def differing(runs: Sequence[Record]) -> list[dict[str, str]]:
    """Of each run the settings that not all have alike, by their flags' names: the first few."""
    text = [flat(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in text for name in settings)
    names = dict.fromkeys(n for n in names if len({settings.get(n) for settings in text}) > 1)
    first = list(names)[:MOST_VALUES]
    return [{name.rpartition(".")[2]: settings.get(name, "") for name in first} for settings in text]


def pareto(outcomes: Sequence[Outcome]) -> Iterator[Plot]:
    """Top-1 and KL over MACs and over parameters; each front as a line, the dense network as a guide."""
    text = [o.name for o in outcomes]
    names = [f"{name} ({i + 1})" if text.count(name) > 1 else name for i, name in enumerate(text)]
    dense = outcomes[0].dense if len({o.dense for o in outcomes}) == 1 else None
    for cost, of in (("macs", "MACs"), ("params", "parameters")):
        for worth, up, level in (("top1", "top-1, %", dense), ("kl", "KL to dense, nats per image", None)):
            points = {n: (getattr(o, cost), getattr(o, worth)) for n, o in zip(names, outcomes, strict=True)}
            best = set(map(id, front(outcomes, cost, worth)))
            joined = sorted(
                (n for n, o in zip(names, outcomes, strict=True) if id(o) in best), key=points.__getitem__
            )
            title = "Accuracy and cost" if (cost, worth) == ("macs", "top1") else f"{up.split(',')[0]} over {of}"
            yield scatter(title, points, f"{of}, share of the dense network's", up, joined=joined, level=level)
