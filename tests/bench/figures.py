"""Figures of a benchmark with several parts: measured, or not and why; a table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dist_prune.utils.tables import table
from tests.bench.timing import Pair

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figure:
    """One figure in `unit`; `value` is None where it was not measured, and `detail` then says why.

    `low` and `high` are the range over rounds. `target` is a bound: from above, or with `at_least` from below.
    """

    name: str
    value: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_least: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or empty without a target or a value."""
        if self.value is None or self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if met else "missed"

    def cells(self) -> list[str]:
        """For the table."""
        value = NOT_MEASURED if self.value is None else _formatted(self.value, self.unit)
        bounds = "" if self.low is None or self.high is None else f"{self.low:.3g}–{self.high:.3g}"
        sign = "≥" if self.at_least else "≤"
        target = "" if self.target is None else f"{sign} {self.target:.2f} {self.verdict}".rstrip()
        return [self.name, value, bounds, target]


def _formatted(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


def missing(name: str, why: str) -> Figure:
    """A figure that cannot be had here."""
    return Figure(name, None, detail=why)


def ratio(name: str, taken: Pair, target: float, detail: str = "") -> Figure:
    """Ours ÷ plain: the median of the rounds' ratios, and their range; good up to `target`."""
    row = taken.row(name, target, detail)
    return Figure(name, row.ratio, "×", row.low, row.high, target, detail=row.detail.removeprefix("; "))


def rate(name: str, amount: float, seconds: Sequence[float], unit: str = "images/s") -> Figure:
    """So much in so many seconds: by the median round, and the range."""
    middle, slowest, fastest = statistics.median(seconds), max(seconds), min(seconds)
    return Figure(name, amount / middle, unit, amount / slowest, amount / fastest)


def kept_going(part: str, figures: Callable[[], Iterator[Figure]]) -> Iterator[Figure]:
    """The figures of a part; where it fails, one that says how, after those that it had."""
    try:
        yield from figures()
    except Exception as error:
        lines = str(error).strip().splitlines()
        yield Figure(
            f"{part}: failed", None, detail=f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        )


def has_failed(figure: Figure) -> bool:
    """Whether it stands for a part that broke off, and not for something that cannot be had here."""
    return figure.value is None and figure.name.endswith(": failed")


def format_table(parts: dict[str, list[Figure]]) -> str:
    """For people: a table, and below it what cannot stand in one."""
    rows = [[f"{part}: {cells[0]}", *cells[1:]] for part in parts for cells in (f.cells() for f in parts[part])]
    notes = [f"{part}: {f.name}: {f.detail}" for part in parts for f in parts[part] if f.detail]
    return "\n".join([table(["", "value", "range", "target"], rows), "", *notes])
