"""Batches on their way to a GPU, which nothing waits for: what is not yet copied or read may not go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 2  # batches that are kept for a GPU that lags behind


def aboard(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on `device`; to a GPU by way of pinned memory, and not waited for."""
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class InFlight:
    """Keeps what a GPU may still read: DALI's outputs are not PyTorch's memory, and are reused once let go.

    `keep` is called with each batch, when whoever took the one before has enqueued all that reads it.
    """

    def __init__(self) -> None:
        self._last: Sequence[Tensor] = ()
        self._read: deque[tuple[Any, Sequence[Tensor]]] = deque()

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Keep these until the next call, and until the GPU has done what it was given by then."""
        if self._last:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()  # type: ignore[no-untyped-call]
            self._read.append((event, self._last))
        self._last = [tensor for tensor in tensors if tensor.is_cuda]
        while self._read and (len(self._read) > MOST or self._read[0][0].query()):
            self._read[0][0].synchronize()
            self._read.popleft()
