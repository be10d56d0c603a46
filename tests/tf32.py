"""Tensor cores on a CPU: products of float32 whose operands are rounded where torch's settings allow TF32."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dist_prune

ATEN = torch.ops.aten
CONVOLUTIONS = {ATEN.convolution.default: (0, 1), ATEN.convolution_backward.default: (0, 1, 2)}
PRODUCTS = {  # where the operands stand
    ATEN.mm.default: (0, 1),
    ATEN.bmm.default: (0, 1),
    ATEN.addmm.default: (1, 2),
    ATEN.baddbmm.default: (1, 2),
    ATEN.baddbmm_.default: (1, 2),
}
PACKAGE, TORCH = (str(Path(module.__file__ or "").parent) for module in (dist_prune, torch))


def in_tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that tensor cores read, to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class TensorCores(TorchDispatchMode):
    """While open, every product is what a GPU would make of it under the settings at that moment.

    `rounded` and `exact` count the products of this package's own code in float32, by module; not those that a
    network's layers or the backward pass make.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded, self.exact = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operands = (PRODUCTS | CONVOLUTIONS).get(func, ())
        if operands and args[operands[0]].dtype is torch.float32:
            backend = torch.backends.cudnn.conv if func in CONVOLUTIONS else torch.backends.cuda.matmul
            rounds = backend.fp32_precision == "tf32"
            if place := _own_module():
                (self.rounded if rounds else self.exact)[place] += 1
            if rounds:
                args = tuple(in_tf32(each) if place in operands else each for place, each in enumerate(args))
        return func(*args, **(kwargs or {}))


def _own_module() -> str:
    """The module of this package that calls, such as `statistics/patches.py`; empty if a layer of torch does."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return file.removeprefix(PACKAGE).lstrip("/")
        if file.startswith((f"{TORCH}/nn/modules", f"{TORCH}/autograd")) or "/tests/" in file:
            return ""
        frame = frame.f_back
    return ""
