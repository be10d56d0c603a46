"""`dist-prune report`: a run's page drawn again from its files, or one page over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dist_prune.artifacts.reader import read_run, runs_in
from dist_prune.config.flags import ConfigError
from dist_prune.reporting.html.page import HTML, write
from dist_prune.reporting.html.several import over_all


@dataclass(frozen=True)
class Reporting:
    """Draw report.html and report.md of a run again.

    Of several runs, or a family: one page with their Pareto front. Of an unfinished run: how far it is.

    Example: dist-prune report runs/* --output all.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs."""
    output: Path | None = None
    """Of several runs: the page to write, with the same in Markdown next to it; default ./report.html."""


def main(words: Sequence[str]) -> int:
    """Write the pages and say where they are; 0.

    Raises:
        ConfigError: no run, or an output for a single one.
        CheckpointError: what is not the directory of a run, not finished, or damaged; the file is named.
    """
    asked = tyro.cli(Reporting, args=words, prog="dist-prune report")
    if not asked.runs:
        raise ConfigError("report needs the directory of a run: dist-prune report RUN [RUN …]")
    runs = [run for folder in asked.runs for run in runs_in(folder)]
    if len(runs) > 1:
        home = asked.runs[0] if len(asked.runs) == 1 else Path()
        written = over_all([read_run(folder) for folder in runs], asked.output or home / HTML)
    elif asked.output is None:
        written = write(asked.runs[0])
    else:
        raise ConfigError("--output is for several runs: the page of one is written into its directory")
    print("\n".join(map(str, written)))
    return 0
