"""Preemption: signals that set a flag, a vote of all ranks, and the exit code that says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dist_prune.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start it again, and it resumes
STUCK = 3


class Preempted(RuntimeError):
    """A signal asked the run to stop; a checkpoint is saved."""


class NoProgressError(RuntimeError):
    """The run was restarted several times and always stopped at the same place."""


@dataclass
class Flag:
    """Which signal asked to stop, empty if none did."""

    signal: str = ""
    reason: Preempted | None = None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """While open, keep `Preempted` for the end of `listening`: all ranks leave their world in order."""
        try:
            yield
        except Preempted as reason:
            self.reason = reason


@contextmanager
def listening() -> Iterator[Flag]:
    """While open, SIGTERM, SIGUSR1 and SIGUSR2 set the flag and do nothing else.

    Raises:
        Preempted: at the end, if the flag deferred it.
    """
    flag = Flag()

    def hear(number: int, _frame: FrameType | None) -> None:
        flag.signal = flag.signal or signal.Signals(number).name

    hears = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    before: dict[signal.Signals, Any] = {each: signal.signal(each, hear) for each in SIGNALS if hears}
    try:
        yield flag
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if flag.reason is not None:
        raise flag.reason


def restarts(environ: Mapping[str, str]) -> int:
    """How often torchrun or SLURM has started this job again."""
    counts = [0]
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with suppress(ValueError):
            counts.append(int(environ.get(name, "0")))
    return max(counts)


class Vote:
    """The largest vote of any rank; known one step late, so that nobody waits for it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._running: Callable[[], int] | None = None

    def last(self) -> int:
        """The outcome of the vote that `begin` began; 0 where there was none."""
        outcome = self._running() if self._running else 0
        self._running = None
        return outcome

    def begin(self, wish: int) -> None:
        """Cast this rank's vote, for the next `last`; all ranks do so the same number of times."""
        self._running = self._world.highest(wish)

    def settled(self, wish: int) -> int:
        """A vote whose outcome is waited for, together with the pending one."""
        before = self.last()
        self.begin(wish)
        return max(before, self.last())
