"""Which of the images a process reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Share(Protocol):
    """Which part of the images a process reads, part `rank` of `size`, and onto which device. A World is one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def report_trouble(self, text: str, /) -> None: ...


@dataclass(frozen=True)
class Unsharded:
    """All images, on the device of one rank."""

    device: torch.device
    local_rank: int
    rank: int = 0
    size: int = 1

    def report_trouble(self, text: str) -> None:
        """Nobody waits for it."""
