"""Which operations keep channels apart, and where the channels are afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

ABOUT_SHAPE = {"getattr", "size", "dim", "_assert"}
PRODUCTS = {"mul", "imul", "truediv", "div", "multiply"}
SUMS = {"add", "iadd", "sub", "isub", "subtract"}

_ELEMENTWISE = {
    *("relu", "relu6", "hardswish", "hardsigmoid", "hardtanh", "silu", "gelu", "sigmoid", "tanh", "elu", "selu"),
    *("celu", "leaky_relu", "mish", "softplus", "clamp", "clip", "neg", "abs", "sqrt", "square", "exp", "pow"),
    *("dropout", "dropout1d", "dropout2d", "feature_dropout", "stochastic_depth", "contiguous", "clone", "float"),
    *("detach", "to", "type_as", "threshold", "logsigmoid", "softsign", "alpha_dropout"),
}
_SPATIAL = {
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "pad", "lp_pool2d"),
}
_REDUCING = {"mean", "amax", "amin", "sum"}
_MOVING = {"permute", "transpose", "swapaxes", "flatten", "view", "reshape", "squeeze", "unsqueeze"}
RESHAPING = _ELEMENTWISE | _SPATIAL | _REDUCING | _MOVING

_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.ELU),
    *(nn.SELU, nn.CELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.AlphaDropout, nn.Softsign, nn.LogSigmoid, nn.Threshold),
)
_DROPPING = ("StochasticDepth", "DropPath")  # of torchvision and timm, by name
_SPATIAL_MODULES = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
)


@dataclass(frozen=True)
class Operation:
    """What is done to a value: a name, and the arguments after the value."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Moved:
    """Where channels are after an operation: along `axis`, each with `repeat` consecutive entries."""

    axis: int
    repeat: int = 1


def name_of(target: Any) -> str:  # noqa: ANN401  what torch.fx calls a target
    """Of a function or a method, in place or not."""
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    return str(name) if str(name).startswith("_") else str(name).rstrip("_")


def has_entries(module: nn.Module) -> bool:
    """Whether the module is one that has an entry of its own for each channel."""
    return isinstance(module, _NormBase) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def keeps_apart(module: nn.Module, axis: int, dimensions: int) -> bool:
    """Whether the module keeps channels apart that lie along `axis` of a value with so many dimensions."""
    shared = isinstance(module, nn.PReLU) and module.num_parameters == 1
    if (
        isinstance(module, _ELEMENTWISE_MODULES)
        or shared
        or type(module).__name__ in ("StochasticDepth", "DropPath")
    ):
        return True
    return isinstance(module, _SPATIAL_MODULES) and axis == 1 and dimensions == 4


def moved(operation: Operation, before: Sequence[int], after: Sequence[int], axis: int) -> Moved | None:
    """Where the channels along `axis` of a value of shape `before` are afterwards; None if they are mixed."""
    name = operation.name
    if name in ("permute", "transpose", "swapaxes"):
        return _permuted(operation, len(before), axis)
    if name in _REDUCING:
        return _reduced(operation, len(before), axis, len(after))
    if name in ("flatten", "view", "reshape", "squeeze", "unsqueeze"):
        return _refolded(before, after, axis)
    if name in _SPATIAL and (axis != 1 or len(before) != 4):
        return None
    return Moved(axis) if len(before) == len(after) and before[axis] == after[axis] else None


def _permuted(operation: Operation, dimensions: int, axis: int) -> Moved | None:
    given = operation.args[0] if operation.args and isinstance(operation.args[0], Sequence) else operation.args
    values = [*given, *operation.kwargs.values()]
    flat = [v for value in values for v in (value if isinstance(value, Sequence) else [value])]
    if not all(isinstance(value, int) for value in flat):
        return None
    order = [value % dimensions for value in flat]
    if operation.name != "permute":
        first, second = order
        order = list(range(dimensions))
        order[first], order[second] = second, first
    return Moved(order.index(axis))


def _reduced(operation: Operation, dimensions: int, axis: int, left: int) -> Moved | None:
    given = operation.args[0] if operation.args else operation.kwargs.get("dim")
    dims: Sequence[Any] = given if isinstance(given, Sequence) else [given]
    if not all(isinstance(value, int) for value in dims):
        return None
    gone = {value % dimensions for value in dims}
    if axis in gone:
        return None
    return Moved(axis if left == dimensions else axis - sum(value < axis for value in gone))


def _refolded(before: Sequence[int], after: Sequence[int], axis: int) -> Moved | None:
    """What lies before the channels, and the channels themselves, must keep their order."""
    ahead, width, behind = math.prod(before[:axis]), before[axis], math.prod(before[axis + 1 :])
    for place, size in enumerate(after):
        if math.prod(after[:place]) == ahead and size == width and math.prod(after[place + 1 :]) == behind:
            return Moved(place)
    last = len(after) - 1
    if math.prod(after[:last]) == ahead and after[last] == width * behind:
        return Moved(last, behind)
    return None
