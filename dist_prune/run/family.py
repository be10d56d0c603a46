"""A family: several budgets of one network, each a plain run, from one set of statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dist_prune.artifacts.reader import member_folder, read_run, runs_in
from dist_prune.config.compression import DATA_FREE
from dist_prune.config.run import Run
from dist_prune.reporting.html.page import HTML
from dist_prune.reporting.html.several import over_all
from dist_prune.reporting.log import LOGGER
from dist_prune.utils.files import is_intact

STATISTICS = "statistics"  # the member that collects them, and its file


def members(config: Run, folder: Path) -> list[Run]:
    """The runs of a family: one that collects statistics, if any are needed; then one a budget, the least first.

    The first is of the least budget, too, so that one out of reach is refused before the work for any other.
    """
    basis = config.compression.basis
    collects = basis.method not in DATA_FREE and basis.statistics is None
    shared = (folder / STATISTICS / "statistics.safetensors").absolute() if collects else basis.statistics

    def member(rule: str, statistics: Path | None) -> Run:
        compression = replace(config.compression, ranks=rule, basis=replace(basis, statistics=statistics))
        return replace(config, compression=compression, run_dir=member_folder(folder, rule), overwrite=False)

    found = [member(rule, shared) for rule in config.compression.family]
    if collects and config.until == "end" and not is_intact_file(shared):
        first = member(config.compression.family[0], basis.statistics)
        found.insert(0, replace(first, run_dir=folder / STATISTICS, until="statistics"))
    return found


def is_intact_file(path: Path | None) -> bool:
    """Whether statistics are there, whole."""
    return path is not None and path.is_file() and is_intact(path)


def draw_family(folder: Path) -> None:
    """One page over all members; they are worth more than it is: whatever goes wrong with it is only said."""
    try:
        pages = over_all([read_run(each) for each in runs_in(folder)], folder / HTML)
    except Exception as error:
        LOGGER.warning(f"{HTML} could not be drawn ({error!r}); try dist-prune report {folder}")
    else:
        LOGGER.info(f"all budgets together: {pages[0]}")
