"""Ranks for who brings their own, or has none: nothing is started, nothing is ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.watchdog import Whereabouts
from dist_prune.distributed.world import World, existing

T = TypeVar("T")


def present(device: torch.device) -> World:
    """The ranks of the process group that this process is in, or this process alone.

    Args:
        device: where this rank computes.
    """
    return existing(device) or Alone(device)


class Alone(World):
    """One process that is in no process group, and needs none."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(LaunchEnv(0, 1, device.index or 0, "", "single"), device, Whereabouts())

    def sum_(self, *tensors: Tensor) -> None:
        """There is nothing to add."""

    def broadcast_(self, *tensors: Tensor, source: int = 0) -> None:
        """Everybody has it."""

    def gather(self, value: T) -> list[T]:
        """The one value there is."""
        return [value]

    def from_first(self, function: Callable[[], T]) -> T:
        """Call the function."""
        return function()

    def highest(self, value: int) -> Callable[[], int]:
        """The one value there is."""
        return lambda: value
