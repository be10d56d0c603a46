"""Progress of a phase: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

from tqdm import tqdm

from dist_prune.data.loader import Batch, Stream

T = TypeVar("T")

EVERY_S = 30.0  # between two lines
NAME_WIDTH = 22  # beyond it a phase's name is cut, so that there is room for a bar in 60 columns


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread of its own


def is_terminal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a line can be drawn over."""
    return stream.isatty() and environ.get("TERM", "dumb") != "dumb"


@dataclass
class Meter:
    """Shows the progress of the phase called `name`, on rank 0 alone; never looks at anything on a device.

    Attributes:
        line: takes the lines that a log gets.
        ranks: each of which handles as many images as this one.
        shows: nothing, on the other ranks.
        terminal: whether there is one, for a bar on the standard error output.
        every_s: seconds between two lines.
    """

    line: Callable[[str], None]
    ranks: int = 1
    shows: bool = True
    terminal: bool = field(default_factory=lambda: is_terminal(sys.stderr, os.environ))
    every_s: float = EVERY_S
    name: str = ""

    def batches(self, stream: Stream, epochs: int = 1, epoch: int = 0) -> Iterator[Batch]:
        """The stream's batches, from where it stands, as those of one of several epochs."""
        size = len(stream)
        yield from self.along(stream, epochs * size, epoch * size + stream.position % size, images=count_images)

    def along(
        self,
        items: Iterable[T],
        total: int,
        done: int = 0,
        unit: str = "batch",
        images: Callable[[T], int] = lambda _: 0,
    ) -> Iterator[T]:
        """The items, `total` in all, of which `done` were done before; an item is done when the next is asked for.

        Args:
            items: handed on one by one.
            total: to come to.
            done: by an earlier start of the run.
            unit: one item.
            images: how many an item has.
        """
        count = self.count(total, done, unit)
        try:
            for item in items:
                yield item
                count.step(images(item))
        finally:
            count.close()

    def count(self, total: int, done: int = 0, unit: str = "batch") -> Count:
        """The same for what is no loop; to be closed."""
        bar = None
        if self.shows and self.terminal:
            name = self.name if len(self.name) <= NAME_WIDTH else self.name[: NAME_WIDTH - 1] + "…"
            bar = _Bar(
                total=total,
                initial=done,
                desc=name,
                leave=False,
                mininterval=0.2,
                miniters=1,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            )
        return Count(self, total, done, unit, bar)

    def aside(self) -> AbstractContextManager[None]:
        """While open, the bar gives way to something else that is written."""
        return _Bar.external_write_mode() if self.shows and self.terminal else nullcontext()


@dataclass
class Count:
    """One count up to `total`."""

    meter: Meter
    total: int
    done: int
    unit: str
    bar: _Bar | None
    images: int = 0  # since `began`, on this rank

    def __post_init__(self) -> None:
        self.began = self.reported_at = time.monotonic()
        self.before = self.done

    def step(self, images: int = 0) -> None:
        """One more, of so many images."""
        self.done, self.images = self.done + 1, self.images + images
        now = time.monotonic()
        if self.bar is not None:
            if self.images:
                self.bar.set_postfix_str(self._rate(now), refresh=False)
            self.bar.update()
        if self.meter.shows and now - self.reported_at >= self.meter.every_s and self.done < self.total:
            self.reported_at = now
            self.meter.line(self._line(now))

    def _rate(self, now: float) -> str:
        return f"{self.images * self.meter.ranks / max(now - self.began, 1e-9):,.0f} images/s"

    def _line(self, now: float) -> str:
        left = (now - self.began) / (self.done - self.before) * (self.total - self.done)
        rate = f", {self._rate(now)}" if self.images else ""
        place = f"{self.unit} {self.done:,} of {self.total:,}"
        return f"   {self.meter.name}: {place}{rate}, {tqdm.format_interval(left)} left"

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def count_images(batch: Batch) -> int:
    """Of this rank."""
    return len(batch.images)
