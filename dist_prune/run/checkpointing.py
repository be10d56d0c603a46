"""Checkpointing and resuming: between stages, and within them between two batches or sites."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dist_prune.artifacts import checkpoints
from dist_prune.artifacts.checkpoints import Snapshot
from dist_prune.data.loader import Batch, Stream
from dist_prune.distributed.preemption import Flag, Preempted, Vote
from dist_prune.distributed.world import World
from dist_prune.statistics.collect import Passes
from dist_prune.statistics.moments import Moments, Sums

T = TypeVar("T")

GO_ON, SAVE, LEAVE = 0, 1, 2  # what a rank may vote for


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class ResumePoint:
    """A resume point: how far an unfinished stage has come.

    Attributes:
        at: in words, such as "epoch 3, step 120"; two that are equal made no progress.
        common: plain types and tensors, the same on all ranks.
        own: this rank's.
        whole: whether another number of ranks could resume here.
    """

    at: str
    common: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    whole: bool = False


@dataclass
class CheckpointManager:
    """Saves the run when it is time or a signal came, and gives each stage the state to resume from.

    Attributes:
        world: the ranks.
        folder: of the checkpoints.
        flag: which signal asked to stop.
        say: takes lines for people.
        every_s: seconds between two checkpoints.
        keep: how many.
        header: plain values that every checkpoint holds.
        parts: what a checkpoint consists of besides; the same on all ranks.
        stage: the one under way.
    """

    world: World
    folder: Path
    flag: Flag
    say: Callable[[str], None]
    every_s: float
    keep: int
    header: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    stage: str = ""
    left: dict[str, Any] | None = None  # of the stage under way when the run was stopped
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._vote = Vote(self.world)
        self._wish = GO_ON
        self._saved = time.monotonic()

    # ── resuming ────────────────────────────────────────────────────────────────────────────────────────────

    def take_up(self, found: Snapshot) -> None:
        """Be where the run was; from now on stages continue what this checkpoint holds."""
        for name, part in self.parts.items():
            part.load_state_dict(found.common[name])
        self.left, self.own = found.common["standing"], found.own
        if self.left is None:
            set_randomness(self.own)

    def resumed(self) -> ResumePoint | None:
        """Where the stage under way had stood, once; this rank's random numbers continue from there."""
        if self.left is None or self.left["stage"] != self.stage:
            return None
        left, own = self.left, self.own
        self.left, self.own = None, {}
        set_randomness(own)
        self.say(f"   resuming at {left['at']}")
        return ResumePoint(left["at"], left["common"], own.get("standing", {}), left["whole"])

    # ── saving ─────────────────────────────────────────────────────────────────────────────────────────────

    def watched(
        self, batches: Iterable[T], standing: Callable[[], ResumePoint | None] | None = None
    ) -> Iterator[T]:
        """The batches; whenever the next one is asked for, the run may be stopped. See `pause`."""
        for batch in batches:
            yield batch
            self.pause(standing)

    def pause(self, standing: Callable[[], ResumePoint | None] | None = None) -> None:
        """A point that all ranks reach together: save if it is time, stop if any rank was asked to.

        Args:
            standing: of the stage, or None if it cannot be resumed exactly here. Without it the stage will start
                again, from the checkpoint before it.

        Raises:
            Preempted: on all ranks; the checkpoint is written.
            CheckpointError: see `checkpoints.save`.
        """
        self._wish = max(self._wish, self._vote.last())
        now = None
        if self._wish and standing is not None and (now := standing()) is not None:
            self.save(now)
        if self._wish == LEAVE and (now is not None or standing is None):
            self._leave()
        self._vote.begin(self._own_wish())

    def close(self, standing: ResumePoint | None = None) -> None:
        """The end of a stage, or of an epoch: save, and stop if any rank was asked to.

        Raises:
            Preempted, CheckpointError: see `pause`.
        """
        wish = max(self._wish, self._vote.settled(self._own_wish()))
        self.save(standing)
        if wish == LEAVE:
            self._leave()

    def save(self, standing: ResumePoint | None) -> None:
        """Write a checkpoint, now."""
        left = standing and {
            "stage": self.stage,
            "at": standing.at,
            "common": standing.common,
            "whole": standing.whole,
        }
        own = {"standing": standing.own if standing else {}, **randomness(self.world)}
        whole = standing is None or standing.whole
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoints.save(
            self.folder, Snapshot({**self.header, **parts, "standing": left}, own, whole), self.world, self.keep
        )
        self._saved = time.monotonic()
        self._wish = GO_ON if self._wish == SAVE else self._wish

    def _own_wish(self) -> int:
        if self.flag.signal:
            return LEAVE
        is_time = self.world.is_first and time.monotonic() - self._saved > self.every_s
        return SAVE if is_time else GO_ON

    def _leave(self) -> None:
        heard = [name for name in self.world.gather(self.flag.signal) if name]
        raise Preempted(f"asked to stop by {heard[0]}; saved")


class Resumable(Passes):
    """Passes that can be resumed after any batch: sums and stream are each rank's own, finished passes common."""

    def __init__(
        self,
        manager: CheckpointManager,
        opening: Callable[[int], Stream],
        along: Callable[[Stream], Iterable[Batch]] = iter,
    ) -> None:
        """Resume the passes of the stage under way; `opening` gives its streams, `along` their batches."""
        self.checkpoints, self.opening, self.along = manager, opening, along
        self.left = manager.resumed()
        self.found: dict[str, dict[str, Tensor]] = self.left.common["found"] if self.left else {}
        self.stream: Stream | None = None

    def open(self, images: int) -> Iterable[Batch]:
        """The batches of the next pass."""
        self.stream = self.opening(images)
        return self.along(self.stream)

    def watch(self, batches: Iterable[T], sums: Mapping[str, Sums]) -> Iterable[T]:
        """See `moments.Watch`."""
        if self.left is not None and self.stream is not None:
            self.stream.load_state_dict(self.left.own["stream"])
            for name, each in sums.items():
                each.load_state_dict(self.left.own["sums"][name])
            self.left = None
        return self.checkpoints.watched(batches, lambda: self._standing(sums))

    def finished(self) -> dict[str, Moments] | None:
        """See `Passes`."""
        if not self.found:
            return None
        device = self.checkpoints.world.device
        return {
            name: Moments(**{part: tensor.to(device) for part, tensor in parts.items()})
            for name, parts in self.found.items()
        }

    def keep(self, moments: dict[str, Moments]) -> None:
        """See `Passes`."""
        self.found = {name: vars(each) for name, each in moments.items()}

    def _standing(self, sums: Mapping[str, Sums]) -> ResumePoint:
        assert self.stream is not None
        own = {
            "stream": self.stream.state_dict(),
            "sums": {name: each.state_dict() for name, each in sums.items()},
        }
        which = "second pass" if self.found else "pass"
        return ResumePoint(f"{which}, batch {self.stream.position}", {"found": self.found}, own)


def randomness(world: World) -> dict[str, Any]:
    """The state of this rank's generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def set_randomness(state: dict[str, Any]) -> None:
    """What `randomness` gave; nothing where it is missing, as after a change of the number of ranks."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
