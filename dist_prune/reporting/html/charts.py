"""Charts for a page: positions in per cent, ticks and words; the template draws them, in any width and colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.ticker import LogLocator, MaxNLocator

Points = Sequence[tuple[float, float]]
MOST = 160  # points of a line: beyond, a page shows no more
NAME_HEIGHT, NAME_WIDTH = 7.0, 45.0  # per cent of a chart that a point's name takes
LEAST = 1e-9  # of what is drawn on a logarithmic axis


@dataclass(frozen=True)
class Tick:
    """A label of an axis, and its position, in per cent."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point with a name."""

    x: float
    y: float
    name: str = ""


@dataclass(frozen=True)
class Line:
    """One curve: an SVG path in per cent, y downwards; `dots` where points stand for themselves."""

    name: str
    path: str
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A chart. `mark` is the place of a vertical line, `alt` what it shows, in words."""

    title: str
    across: str
    up: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    alt: str
    mark: float | None = None
    guide: str = ""


@dataclass(frozen=True)
class Axis:
    """From numbers to per cent, linear or logarithmic, rounded ends out to ticks where there is room."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._bent(v) for v in (self.low, self.high, value))
        return round(100 * (value - low) / ((high - low) or 1.0), 2)

    def _bent(self, value: float) -> float:
        return math.log10(max(value, LEAST)) if self.logarithmic else value

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """A few round numbers within."""
        locator = LogLocator(numticks=5) if self.logarithmic else MaxNLocator(4)
        low, high = max(self.low, LEAST) if self.logarithmic else self.low, self.high
        found = locator.tick_values(low, high)
        return tuple(Tick(self(v), f"{v:.4g}") for v in found if 0 <= self(v) <= 100)


def axis_of(values: Sequence[float], logarithmic: bool = False) -> Axis:
    """One that has room for all of them."""
    if logarithmic:
        low, high = max(min(values), LEAST), max(*values, 2 * LEAST)
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, logarithmic)
    low, high = min(values), max(values)
    room = 0.04 * ((high - low) or abs(high) or 1.0)
    return Axis(0.0 if 0 <= low < 0.3 * high else low - room, high + room)


def plot(
    title: str,
    curves: Mapping[str, Points],
    across: str,
    up: str,
    *,
    logarithmic: bool = False,
    mark: float | None = None,
    whole: bool = True,
) -> Plot:
    """Curves through points, `logarithmic` upwards; points that are no numbers are left out.

    Args:
        title: of the chart.
        curves: name → points.
        across: what x is.
        up: what y is.
        logarithmic: the axis upwards.
        mark: x of a vertical line.
        whole: x begins at its least value exactly.
    """
    known = {n: [(x, y) for x, y in points if math.isfinite(y)] for n, points in curves.items()}
    known = {name: points for name, points in known.items() if points}
    xs, ys = ([p[i] for points in known.values() for p in points] or [0.0, 1.0] for i in (0, 1))
    x, y = Axis(min(xs), max(xs)) if whole else axis_of(xs), axis_of(ys, logarithmic)
    lines = tuple(_line(name, points, x, y) for name, points in known.items())
    ends = "; ".join(f"{n} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for n, p in list(known.items())[:6])
    return Plot(
        title,
        across,
        up,
        x.ticks,
        y.ticks,
        lines,
        f"{up} over {across}: {ends or 'nothing'}",
        None if mark is None else min(100.0, max(0.0, x(mark))),
    )


def _line(name: str, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> Line:
    every = math.ceil(len(points) / MOST)
    thinned = [*points[:-1:every], points[-1]]
    places = [f"{x(a):g} {100 - y(b):g}" for a, b in thinned]
    dots = tuple(Dot(x(a), 100 - y(b)) for a, b in thinned) if len(thinned) < 8 else ()
    return Line(name, "M" + "L".join(places), dots)


def scatter(
    title: str,
    points: Mapping[str, tuple[float, float]],
    across: str,
    up: str,
    *,
    logarithmic: bool = False,
    joined: Sequence[str] = (),
    level: float | None = None,
) -> Plot:
    """Named points; a line joins some, a guide is the diagonal (`logarithmic`) or stands at a `level`."""
    xs, ys = ([p[i] for p in points.values()] for i in (0, 1))
    ys = ys if level is None else [*ys, level]
    x, y = (axis_of([*xs, *ys] if logarithmic else v, logarithmic) for v in (xs, ys))
    places = {name: (x(a), 100 - y(b)) for name, (a, b) in points.items()}
    way = "L".join(f"{a:g} {b:g}" for a, b in (places[name] for name in joined))
    dots = tuple(_labelled([Dot(a, b, name) for name, (a, b) in places.items()]))
    guide = "" if level is None else f"M0 {100 - y(level):g}L100 {100 - y(level):g}"
    text = "; ".join(f"{name}: {a:.4g}, {b:.4g}" for name, (a, b) in list(points.items())[:40])
    line = Line("", f"M{way}" if way else "", dots)
    guide = "M0 100L100 0" if logarithmic else guide
    return Plot(title, across, up, x.ticks, y.ticks, (line,), f"{up} against {across}: {text}", None, guide)


def _labelled(dots: Sequence[Dot]) -> Iterator[Dot]:
    """Those keep their names that have room for them."""
    named: list[Dot] = []
    for dot in dots:
        has_room = all(abs(dot.y - other.y) > NAME_HEIGHT or abs(dot.x - other.x) > NAME_WIDTH for other in named)
        if has_room:
            named.append(dot)
        yield dot if has_room else replace(dot, name="")
