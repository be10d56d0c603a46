"""The first error of any rank reaches all others, past any collective; dead and late ranks are named."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from dist_prune.distributed.launch_env import LaunchEnv

POLL_S = 0.5  # how often a rank shows that it lives and looks for errors of the others
SILENCE_S = 2.0  # once a connection broke, a rank without a heartbeat for this long is reported dead
LOST_S = 30.0  # as long as all seems well; Python code may well keep a rank's threads from running for seconds
HEARD_S = 3.0  # how long a failing rank stays, so that the others still find its message
GRACE_S = 5.0  # how long a rank may take to raise another's error by itself, before its process is ended


class RendezvousStore(Protocol):
    """What the ranks can write on and read, whatever state their connections are in: torch's rendezvous store."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], /) -> None: ...
    def compare_set(self, key: str, expected: str, wanted: str, /) -> bytes: ...


@dataclass
class Whereabouts:
    """Where a rank is: the phase of the run, the collective it is in, how many it has begun; what went wrong."""

    phase: str = "start"
    collective: str = ""
    begun: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        inside = f"collective #{self.begun} ({self.collective})" if self.collective else "no collective"
        return f"{inside}, phase {self.phase!r}{f', after {self.trouble}' * bool(self.trouble)}"


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"


class Alarm:
    """Carries the first error of any rank to all, through the rendezvous store and past any collective."""

    def __init__(
        self, store: RendezvousStore, watched: RendezvousStore, place: LaunchEnv, where: Whereabouts
    ) -> None:
        """Begin to watch; `watched` is another connection to the store: the main thread may block in its own."""
        self.store = store
        self.place = place
        self.where = where
        self.launcher = os.getppid() if place.has_launcher else 0
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.verdict = ""
        self.thread = threading.Thread(target=self._watch, args=(watched,), daemon=True)

    def __enter__(self) -> "Alarm":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=1)

    def raise_for_all(self, error: BaseException, broken: bool) -> str:
        """Post the error unless another rank was first; return the error that counts.

        Args:
            error: what this rank raised.
            broken: whether its connection to others broke, or it timed out: the cause is another rank.
        """
        self.error = error
        own = f"rank {self.place.rank} failed: {describe(error)}"
        try:
            if broken and not self.store.check(["error"]):
                own = self._died(dead) if (dead := self._silent_ranks()) else self._waited(error)
            return self.store.compare_set("error", "", own).decode()
        except RuntimeError:
            return self.verdict or (self._store_is_gone() if broken else own)

    def _died(self, ranks: Sequence[int], store: RendezvousStore | None = None) -> str:
        """The error for ranks that left no message, with the trouble that one of them was last seen in."""
        board = store or self.store
        seen = [board.get(f"at/{rank}").decode() for rank in ranks if board.check([f"at/{rank}"])]
        troubles = [text.partition(", after ")[2] for text in seen]
        return "; ".join([died(ranks), *filter(None, troubles)])

    def _waited(self, error: BaseException) -> str:
        """Which collective timed out here, and where the other ranks are."""
        others = [rank for rank in range(self.place.size) if rank != self.place.rank]
        seen = {rank: self.store.get(f"at/{rank}").decode() for rank in others if self.store.check([f"at/{rank}"])}
        elsewhere = "; ".join(f"rank {rank} is in {at}" for rank, at in seen.items() if at != str(self.where))
        return (
            f"rank {self.place.rank} timed out in {self.where}"
            f"{f'; {elsewhere}' if elsewhere else ', as did all others'} ({describe(error)})"
        )

    def wait_until_heard(self) -> None:
        """Stay until every rank has read the error, a few seconds at most."""
        deadline = time.monotonic() + HEARD_S
        with suppress(RuntimeError):  # the store went down with its host, which waited, too
            while self.store.add("heard", 0) < self.place.size > 1 and time.monotonic() < deadline:
                time.sleep(POLL_S / 10)

    def _beats(self, store: RendezvousStore, rank: int) -> int:
        return store.add(f"beats/{rank}", 0)

    def _silent_ranks(self) -> list[int]:
        before = [self._beats(self.store, rank) for rank in range(self.place.size)]
        time.sleep(SILENCE_S)
        return [rank for rank, beats in enumerate(before) if beats == self._beats(self.store, rank)]

    def _store_is_gone(self) -> str:
        if self.place.launcher_serves:
            return f"torchrun, which served the store at {self.place.address}, is gone"
        return f"the store at {self.place.address} is gone: {died([0])}"

    def _is_orphan(self) -> bool:
        return self.launcher not in (0, os.getppid())

    def _watch(self, store: RendezvousStore) -> None:
        """Show that this rank lives, watch over the next, and let an error of any rank end this one."""
        following = (self.place.rank + 1) % self.place.size
        beats, since = 0, time.monotonic()
        while not self.verdict and not self.over.wait(POLL_S):
            try:
                store.set(f"at/{self.place.rank}", str(self.where))
                store.add(f"beats/{self.place.rank}", 1)
                if (now := self._beats(store, following)) != beats or not now:  # none: it has not joined yet
                    beats, since = now, time.monotonic()
                elif time.monotonic() - since > LOST_S:
                    store.compare_set("error", "", self._died([following], store))
                if self._is_orphan():
                    store.compare_set("error", "", f"torchrun, which started rank {self.place.rank}, is gone")
                if store.check(["error"]):
                    self.verdict = store.get("error").decode()
                    store.add("heard", 1)
            except RuntimeError:
                self.verdict = self.verdict or self._store_is_gone()
        if self.verdict and not self.over.wait(GRACE_S):
            self._end_process()

    def _end_process(self) -> None:
        if self.error:
            traceback.print_exception(self.error)
        print(f"rank {self.place.rank} ends: {self.verdict}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # the main thread is somewhere that no exception reaches


def died(ranks: Sequence[int]) -> str:
    """The error for ranks that left no message."""
    return f"rank {', '.join(map(str, ranks))} died without a message (killed, or out of memory?)"
