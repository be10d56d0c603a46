"""`dist-prune report`: a run's page drawn again from its files, or one page over several runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dist_prune.artifacts.reader import Record, accuracy_interval, read_run
from dist_prune.cluster.gathering import Outcome, front, outcome_of
from dist_prune.cluster.sweep import Combination
from dist_prune.config.flags import ConfigError
from dist_prune.reporting.compare import flat
from dist_prune.reporting.html.charts import Plot, scatter
from dist_prune.reporting.html.page import HTML, write, write_pages

MOST_VALUES = 4  # differing settings that name a run


@dataclass(frozen=True)
class Reporting:
    """Draw report.html and report.md of a run again.

    Of several finished runs: one page with their Pareto front. Of an unfinished run: how far it is.

    Example: dist-prune report runs/* --output all.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs."""
    output: Path | None = None
    """Of several runs: the page to write, with the same in Markdown next to it; default ./report.html."""


@dataclass(frozen=True)
class Compared:
    """One run among several. `link` leads to its own page, if there is one."""

    outcome: Outcome
    interval: tuple[float, float]
    is_best: bool
    link: str | None
    settings: Mapping[str, str]


def main(words: Sequence[str]) -> int:
    """Write the pages and say where they are; 0.

    Raises:
        ConfigError: no run, or an output for a single one.
        CheckpointError: what is not the directory of a run, not finished, or damaged; the file is named.
    """
    asked = tyro.cli(Reporting, args=words, prog="dist-prune report")
    if not asked.runs:
        raise ConfigError("report needs the directory of a run: dist-prune report RUN [RUN …]")
    if len(asked.runs) > 1:
        written = over_all([read_run(folder) for folder in asked.runs], asked.output or Path(HTML))
    elif asked.output is None:
        written = write(asked.runs[0])
    else:
        raise ConfigError("--output is for several runs: the page of one is written into its directory")
    print("\n".join(map(str, written)))
    return 0


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
        "pareto": pareto(outcomes),
        "alike": len(dense) == 1,
    }


def link(page: Path, home: Path) -> str | None:
    """From a page in the folder `home` to this one, if it is there."""
    return os.path.relpath(str(page), str(home)) if page.is_file() else None


def _outcome(run: Record, values: Mapping[str, str]) -> Outcome:
    name = run.folder.resolve().name
    return outcome_of(Combination({"run": name, **values}, (), "", ""), run.result)


def differing(runs: Sequence[Record]) -> list[dict[str, str]]:
    """Of each run the settings that not all have alike, by their flags' names: the first few."""
    text = [flat(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in text for name in settings)
    names = dict.fromkeys(n for n in names if len({settings.get(n) for settings in text}) > 1)
    first = list(names)[:MOST_VALUES]
    return [{name.rpartition(".")[2]: settings.get(name, "") for name in first} for settings in text]


def pareto(outcomes: Sequence[Outcome]) -> Plot:
    """Top-1 over MACs; the Pareto front as a line, the dense network's accuracy as a guide."""
    text = [o.combination.values["run"] for o in outcomes]
    names = {
        id(o): f"{name} ({i + 1})" if text.count(name) > 1 else name
        for i, (o, name) in enumerate(zip(outcomes, text, strict=True))
    }
    points = {names[id(o)]: (o.macs, o.top1) for o in outcomes}
    best = [names[id(o)] for o in front(outcomes)]
    across, up = "MACs, share of the dense network's", "top-1, %"
    level = outcomes[0].dense if len({o.dense for o in outcomes}) == 1 else None
    return scatter("Accuracy and cost", points, across, up, joined=best, level=level)
