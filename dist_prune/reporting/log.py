"""The log of a run: records of the logger `dist_prune`, on the console and, with the time, in log.txt.

Ranks but the first attach no handlers and emit nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from dist_prune.utils.text import append_text

LOGGER = logging.getLogger("dist_prune")
PROGRESS = LOGGER.getChild("progress")  # a line now and then; a terminal has a bar instead


class Lines(logging.Formatter):
    """The lines of a record, warnings marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        """Without the time."""
        return f"warning: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage()


class Console(logging.Handler):
    """Prints to the standard output while a bar, if there is one, goes aside.

    An error in writing is raised, not swallowed as the standard library's handlers do.
    """

    def __init__(self, aside: Callable[[], AbstractContextManager[None]], has_bar: bool) -> None:
        """Progress is printed where there is no bar."""
        super().__init__()
        self.setFormatter(Lines())
        self.aside = aside
        if has_bar:
            self.addFilter(lambda record: record.name != PROGRESS.name)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        with self.aside():
            print(self.format(record), flush=True)


class LogFile(logging.Handler):
    """Adds to a file, each line with the time. It is opened for each record: nothing is lost when a run is killed.

    An error in writing, such as a full disk, is raised.
    """

    def __init__(self, path: Path) -> None:
        """The file need not be there."""
        super().__init__()
        self.setFormatter(Lines())
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        stamp = Lines().formatTime(record, "%Y-%m-%d %H:%M:%S")
        append_text(self.path, "".join(f"{stamp} {line}\n" for line in self.format(record).splitlines()))
