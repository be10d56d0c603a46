"""`dist-prune compare`: finished runs side by side: settings and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from dist_prune.artifacts.reader import (
    Record,
    accuracy_interval,
    difference_interval,
    paired_interval,
    read_run,
    runs_in,
)
from dist_prune.artifacts.run_directory import IRRELEVANT
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.console import columns, hanging
from dist_prune.utils.files import CheckpointError
from dist_prune.utils.tables import table

ABSENT = "–"


@dataclass(frozen=True)
class Comparison:
    """Compare finished runs: settings, accuracy, cost, ranks, time.

    Intervals are of 95 %; those of differences, to the first run, are paired on the same images.

    Example: dist-prune compare runs/pca runs/fisher
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of two or more finished runs."""


def main(words: Sequence[str]) -> int:
    """Print the comparison; 0.

    Raises:
        CheckpointError: fewer than two, or one that is not a finished run.
    """
    asked = tyro.cli(Comparison, args=words, prog="dist-prune compare")
    runs = [run for folder in asked.runs for run in runs_in(folder)]
    if len(runs) < 2:
        raise CheckpointError("compare needs two finished runs or more: dist-prune compare RUN RUN")
    print(format_summary([read_run(folder) for folder in runs], columns()))
    return 0


def format_summary(runs: Sequence[Record], width: int) -> str:
    """All of it, for people; runs are called A, B, … and named once."""
    names = [chr(ord("A") + i) for i in range(len(runs))]
    room = max(12, (width - 30) // len(runs))
    differing = [[row[0], *(cut(cell, room) for cell in row[1:])] for row in settings(runs)]
    parts = [
        "\n".join(hanging(f"{name}  ", str(run.folder), 3, width) for name, run in zip(names, runs, strict=True)),
        _section("settings that differ", names, differing),
        _section("accuracy", names, accuracies(runs)),
        _section("cost of one image", names, costs(runs)),
        _section("ranks that differ", names, ranks(runs)),
        _section("seconds", names, seconds(runs)),
    ]
    return "\n\n".join(parts)


def _section(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([title, *names], rows) if rows else f"{title}\n  none"


def cut(text: str, room: int) -> str:
    """The end of a text that is too long: of paths, the part that distinguishes them."""
    return text if len(text) <= room else "…" + text[1 - room :]


# ── rows: a name, then a cell for each run ─────────────────────────────────────────────────────────────────


def settings(runs: Sequence[Record]) -> list[list[str]]:
    """Flags whose values differ, and versions; not those that only say where and how often to save."""
    text = [flat(run.settings) | {"ranks of the job": str(run.result["world_size"])} for run in runs]
    made = [flat({"package": run.environment.get("packages", {})}) for run in runs]
    return _differing([a | b for a, b in zip(text, made, strict=True)])


def flat(settings: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """Nested settings as `outer.inner` → text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{where}{name}.")
        elif name not in IRRELEVANT:
            found[where + name] = str(value)
    return found


def accuracies(runs: Sequence[Record]) -> list[list[str]]:
    """Per stage top-1 with its interval, its difference to the first run's, and the divergence."""
    first, rows = runs[0].stages, []
    for stage in _in_order(run.stages for run in runs):
        found = [run.stages.get(stage) for run in runs]
        intervals = [m and accuracy_interval(m.top1, m.images) for m in found]
        rows.append([f"{stage}: top-1 %", *(f"{m.top1:.2f}" if m else ABSENT for m in found)])
        rows.append(["  95 %", *(f"{i[0]:.2f} … {i[1]:.2f}" if i else ABSENT for i in intervals)])
        base = first.get(stage)
        if base and any(m and m != base for m in found):
            rows += differences(runs, stage)
        if any(m and m.kl is not None for m in found):
            rows.append(
                ["  KL to dense", *(ABSENT if m is None or m.kl is None else f"{m.kl:.4f}" for m in found)]
            )
    return rows


def differences(runs: Sequence[Record], stage: str) -> list[list[str]]:
    """Top-1 of a stage less the first run's, which has it, and the intervals: all paired, or none."""
    base, others = runs[0].stages[stage], runs[1:]
    changes = [changed(runs[0], run, stage) for run in others]
    paired = all(change for change, run in zip(changes, others, strict=True) if stage in run.stages)
    cells = [
        difference(base, run.stages.get(stage), change if paired else None)
        for change, run in zip(changes, others, strict=True)
    ]
    gaps, bounds = zip(*cells, strict=True)
    return [["  to A, points", "", *gaps], [f"  95 %{', paired' if paired else ''}", "", *bounds]]


def difference(base: Metrics, other: Metrics | None, change: tuple[int, int] | None) -> tuple[str, str]:
    """In points, and its interval: paired if it is known which images changed."""
    if other is None:
        return ABSENT, ABSENT
    low, high = paired_interval(*change, other.images) if change else difference_interval(base, other)
    return f"{other.top1 - base.top1:+.2f}", f"{low:+.2f} … {high:+.2f}"


def changed(first: Record, other: Record, stage: str) -> tuple[int, int] | None:
    """See `Answers.changed`; None where one of the runs kept no answers."""
    return first.answers.changed(other.answers, stage) if first.answers and other.answers else None


def costs(runs: Sequence[Record]) -> list[list[str]]:
    """MACs and parameters, and as shares of the dense network's."""
    rows = []
    for kind, name in (("macs", "MACs"), ("params", "parameters")):
        both = [(run.result[kind]["dense"], run.result[kind]["compressed"]) for run in runs]
        rows.append([f"{name}, M", *(f"{after / 1e6:.2f}" for _, after in both)])
        rows.append(["  of the dense network's", *(f"{after / before:.3f}" for before, after in both)])
    return rows


def ranks(runs: Sequence[Record]) -> list[list[str]]:
    """Sites whose ranks differ."""
    chosen = [{c.site: c.label for c in run.plan.choices} for run in runs]
    return _differing(chosen)


def seconds(runs: Sequence[Record]) -> list[list[str]]:
    """What each phase took, and all of them."""
    spent = [run.result["seconds"] for run in runs]
    rows = [[phase, *(f"{s[phase]:.1f}" if phase in s else ABSENT for s in spent)] for phase in _in_order(spent)]
    return [*rows, ["all", *(f"{sum(s.values()):.1f}" for s in spent)]]


def _differing(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    cells = {name: [column.get(name, ABSENT) for column in columns] for name in _in_order(columns)}
    return [[name, *values] for name, values in cells.items() if len(set(values)) > 1]


def _in_order(columns: Any) -> list[str]:  # noqa: ANN401  any iterable of mappings
    return list(dict.fromkeys(chain.from_iterable(columns)))
