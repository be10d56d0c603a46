"""Networks of several inputs, given one tensor that holds them all: each image's bytes, one after another.

All that works on images, from their place among the ranks to the passes that stop at layers, works on such rows;
in front of the network they become what it is called with. Bytes hold numbers of any type as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.network.errors import ModelError

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
Inputs = Callable[[Any], Call]  # of a batch: what the network is called with, (args, kwargs)
PLAIN = (bool, int, float, str, type(None))  # values that are no images


@dataclass(frozen=True)
class Input:
    """A tensor among a network's arguments: what each image has of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one image."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} (n, {', '.join(map(str, self.shape))})" if self.shape else f"{self.dtype} (n,)"


@dataclass(frozen=True)
class InputPacking:
    """What a network is called with, without the values: `args` by position, `kwargs` by name.

    Of each, the part of a tensor that an image has, or a plain value that is the same in all batches.
    """

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(call: Call) -> InputPacking:
        """Of such a call; tensors have the images along their first dimension."""
        args, kwargs = call
        return InputPacking(tuple(map(_part, args)), tuple((name, _part(value)) for name, value in kwargs.items()))

    def packed(self, call: Call) -> Tensor:
        """The images of such a call, (n, bytes) uint8."""
        args, kwargs = call
        tensors = [value.detach() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        rows = [t.reshape(len(t), prod(t.shape[1:])).contiguous().view(torch.uint8) for t in tensors]
        return torch.cat(rows, 1)

    def unpacked(self, packed: Tensor) -> Call:
        """What the network is called with for these images (n, bytes)."""
        start, values = 0, []
        for part in (*self.args, *(part for _, part in self.kwargs)):
            if not isinstance(part, Input):
                values.append(part)
                continue
            own = packed[:, start : start + part.bytes].clone(memory_format=torch.contiguous_format)
            values.append(own.reshape(-1).view(part.dtype).reshape(packed.shape[0], *part.shape))
            start += part.bytes
        names = [name for name, _ in self.kwargs]
        return tuple(values[: len(self.args)]), dict(zip(names, values[len(self.args) :], strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs: numbers where they go by position."""
        return tuple(name for name, part in self._named() if isinstance(part, Input))

    def __str__(self) -> str:
        return ", ".join(
            f"{name}: {part if isinstance(part, Input) else repr(part)}" for name, part in self._named()
        )

    def _named(self) -> Iterable[tuple[str, Any]]:
        return (*((str(place), part) for place, part in enumerate(self.args)), *self.kwargs)


def _part(value: Any) -> Any:  # noqa: ANN401  a tensor, or a plain value that stays as it is
    return Input(tuple(value.shape[1:]), value.dtype) if isinstance(value, Tensor) else value


def taking(model: nn.Module, packing: InputPacking) -> nn.Module:
    """The same layers in a network that takes packed images; the given one stays as it is.

    Raises:
        ModelError: a torch.fx.GraphModule, whose copies are what its graph says and nothing else.
    """
    if isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            "the network is a torch.fx.GraphModule, of one input here; expected the module that it was traced from"
        )

    def forward(self: nn.Module, images: Tensor) -> Any:  # noqa: ANN401  what the network returns
        args, kwargs = packing.unpacked(images)
        return kind.forward(self, *args, **kwargs)

    kind = type(model)
    network = copy.copy(model)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return network


def required_inputs(model: nn.Module) -> tuple[str, ...]:
    """What its forward cannot be called without."""
    plain = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in known if p.default is p.empty and p.kind not in plain)
