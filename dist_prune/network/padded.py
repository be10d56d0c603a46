"""Convolutions behind padding that torch's own cannot make: other on each side, or as the size asks."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Sides = tuple[int, int] | Literal["same"]  # before and behind, along one axis; or see `amount`


class PaddedConv2d(nn.Conv2d):
    """Padding, then the convolution; its weight and bias are called as in any other.

    Args:
        inputs: channels.
        outputs: channels.
        sides: of rows and of columns.
        more: as of `Conv2d`, without `padding`.
    """

    def __init__(self, inputs: int, outputs: int, sides: tuple[Sides, Sides], **more: Any) -> None:  # noqa: ANN401
        super().__init__(inputs, outputs, **more)
        self.sides = sides

    def padded(self, x: Tensor) -> Tensor:
        """The input as the kernel goes over it, (…, H, W)."""
        amounts = [
            amount(side, size, kernel, stride, dilation)
            for side, size, kernel, stride, dilation in zip(
                self.sides, x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (*amounts[1], *amounts[0]), mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padded(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sides={self.sides}"  # type: ignore[no-untyped-call]


def amount(sides: Sides, size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """How much is added before and behind, along one axis.

    `same` gives ⌈size / stride⌉ positions, an odd one behind: the padding SAME of TensorFlow.
    """
    if sides != "same":
        return sides
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def sides_of(module: nn.Conv2d) -> tuple[Sides, Sides] | str:
    """Of rows and columns; a word where torch itself knows one."""
    if isinstance(module, PaddedConv2d):
        return module.sides
    if isinstance(module.padding, str):
        return module.padding
    rows, columns = (int(side) for side in module.padding)
    return (rows, rows), (columns, columns)


def convolution(inputs: int, outputs: int, sides: tuple[Sides, Sides] | str, **more: Any) -> nn.Conv2d:  # noqa: ANN401
    """The plainest convolution with these sides: torch's own where it can be. Arguments as of `PaddedConv2d`."""
    if isinstance(sides, str):
        return nn.Conv2d(inputs, outputs, padding=sides, **more)
    if all(side != "same" and side[0] == side[1] for side in sides):
        return nn.Conv2d(inputs, outputs, padding=(int(sides[0][0]), int(sides[1][0])), **more)
    return PaddedConv2d(inputs, outputs, sides, **more)
