"""TensorBoard: curves, pictures and tables, in a folder that can be drawn again from a run's own files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

FOLDER = "tensorboard"
MARKS = {"group", "step", "time"}  # of a point; everything else in it is a value
TRAINED = "(pretrain|train|distill|rounds/train)"
# Category → chart → the groups of points it shows, and a pattern of their tags.
CHARTS: dict[str, dict[str, tuple[set[str], str]]] = {
    "the network at each stage": {
        "top-1, %: dense, projected, corrected, distilled, tuned": ({"top1"}, "top1/.*"),
        "KL to the dense network, nats per image": ({"val"}, "val/kl"),
        "loss on the validation images": ({"val"}, "val/loss"),
    },
    "training": {
        "loss": ({"pretrain", "train", "distill", "rounds/train"}, f"{TRAINED}/loss"),
        "images per second": ({"pretrain", "train", "distill", "rounds/train"}, f"{TRAINED}/images_per_second"),
        "learning rate": ({"pretrain", "train", "distill", "rounds/train"}, f"{TRAINED}/lr"),
    },
    "search": {"KL of each candidate, and the least so far": ({"search"}, "search/.*")},
    "correction": {"held-out KL after each layer": ({"calibration"}, "calibration/.*")},
    "rounds": {
        "top-1, %": ({"rounds"}, "rounds/top1"),
        "MACs": ({"rounds"}, "rounds/macs"),
        "ranks": ({"rank"}, "rank/.*"),
    },
}


@dataclass
class Curves:
    """One run's TensorBoard folder. The first error in writing is reported; from then on nothing is drawn.

    A run is worth more than its pictures: metrics.jsonl has the points, and layers.json what the pictures show.
    """

    folder: Path
    tell: Callable[[str], None]
    _writer: SummaryWriter | None = None
    _groups: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with self._drawing():
            self._writer = SummaryWriter(str(self.folder))

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # the writer's thread hands its errors to the next call
            writer, self._writer = self._writer, None
            with suppress(OSError, ValueError):
                if writer is not None:
                    writer.close()
            self.tell(f"{self.folder}: could not be written ({error}); the run goes on without TensorBoard")

    def restart(self) -> None:
        """Forget everything drawn: what comes now is the whole."""
        if self._writer is None:
            return
        self.close()
        self._groups = set()
        with self._drawing():
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink()
            # A TensorBoard that is watching has read the old files: this has it forget them.
            self._writer = SummaryWriter(str(self.folder), purge_step=0)

    def point(self, point: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._writer is None:
            return
        with self._drawing():
            self._lay_out(point["group"])
            for name in point.keys() - MARKS:
                value = math.nan if point[name] is None else point[name]
                self._writer.add_scalar(f"{point['group']}/{name}", value, point["step"], walltime=point["time"])

    def _lay_out(self, group: str) -> None:
        """Where a group is new, the charts to open on are written again, with those that show it."""
        if group in self._groups or self._writer is None:
            return
        self._groups.add(group)
        layout = {
            category: {title: ["Multiline", [tags]] for title, (of, tags) in charts.items() if of & self._groups}
            for category, charts in CHARTS.items()
        }
        self._writer.add_custom_scalars({category: charts for category, charts in layout.items() if charts})

    def value(self, tag: str, value: float, step: int = 0) -> None:
        """A point that is in no file of its own."""
        if self._writer is not None:
            with self._drawing():
                self._writer.add_scalar(tag, value, step)

    def figure(self, tag: str, draw: Callable[[], Figure]) -> None:
        """A picture, drawn only where it is written."""
        if self._writer is not None:
            with self._drawing():
                self._writer.add_figure(tag, draw(), 0)

    def text(self, tag: str, markdown: str) -> None:
        """A page of text."""
        if self._writer is not None:
            with self._drawing():
                self._writer.add_text(tag, markdown, 0)

    def settings(self, chosen: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """The settings of a run and what it came to, for TensorBoard's comparison of runs."""
        if self._writer is None:
            return
        with self._drawing():
            plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in chosen.items()}
            for summary in hparams(plain, dict(figures)):  # type: ignore[no-untyped-call]
                self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            for name, value in figures.items():
                self._writer.add_scalar(name, value, 0)

    def flush(self) -> None:
        """Make everything visible to a running TensorBoard."""
        if self._writer is not None:
            with self._drawing():
                self._writer.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        if self._writer is not None:
            with self._drawing():
                self._writer.close()
            self._writer = None
