"""In which precision, and by what, passes run whose time counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_prune.network.memory_format import layout_of


@dataclass(frozen=True)
class Execution:
    """How the passes run whose time counts.

    Attributes:
        bf16: in bfloat16 autocast.
        compiled: whole networks through torch.compile. Layers alone are not: each rank would be compiled.
    """

    bf16: bool = False
    compiled: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """While open, passes have that precision, and weights are converted in each, as if opened for each."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def network(self, model: nn.Module) -> Callable[[Tensor], object]:
        """The network as it will be called."""
        return torch.compile(model) if self.compiled else model

    def described(self, model: nn.Module) -> str:
        """For people: `bfloat16 autocast, channels last`."""
        precision = (
            "bfloat16 autocast" if self.bf16 else str(next(model.parameters()).dtype).removeprefix("torch.")
        )
        layout = ", channels last" if layout_of(model) is torch.channels_last else ""
        return f"{precision}{layout}{', whole networks compiled' if self.compiled else ''}"


PLAIN = Execution()  # in the precision of the network's own weights
