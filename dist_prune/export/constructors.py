"""The layers that torch has, as the calls that construct them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dist_prune.export.statements import literal
from dist_prune.export.tracing import UntraceableError

EVEN = frozenset({"kernel_size", "stride", "padding", "output_padding", "dilation", "output_size"})
OTHERWISE: dict[tuple[type, str], Callable[[Any], object]] = {  # where an attribute is not named as its argument
    (nn.MultiheadAttention, "bias"): lambda m: m.in_proj_bias is not None,
    (nn.MultiheadAttention, "add_bias_kv"): lambda m: m.bias_k is not None,
    (nn.MultiheadAttention, "kdim"): lambda m: None if m.kdim == m.embed_dim else m.kdim,
    (nn.MultiheadAttention, "vdim"): lambda m: None if m.vdim == m.embed_dim else m.vdim,
}


@dataclass(frozen=True)
class Part:
    """An expression: `head(name=item, …)`, items without a name first; `times` above 1 makes it that many."""

    head: str
    items: tuple[tuple[str, Part | str], ...] = ()
    brackets: str = "()"
    times: int = 1

    def lines(self, width: int) -> list[str]:
        """On one line where it is narrow enough."""
        if self.times > 1:
            return self._repeated(width)
        inner = [_named(name, _lines(item, width - len(name) - 5)) for name, item in self.items]
        one = (
            f"{self.head}{self.brackets[0]}{', '.join(text for item in inner for text in item)}{self.brackets[1]}"
        )
        if len(one) <= width and all(len(item) == 1 for item in inner):
            return [one]
        indented = ["    " + line for item in inner for line in [*item[:-1], item[-1] + ","]]
        return [self.head + self.brackets[0], *indented, self.brackets[1]]

    def _repeated(self, width: int) -> list[str]:
        once, count = replace(self, times=1).lines(width - 4), f"for _ in range({self.times})"
        if len(once) == 1 and len(once[0]) + len(count) + 4 <= width:
            return [f"*({once[0]} {count})"]
        return ["*(", *("    " + line for line in [*once, count]), ")"]


def _lines(item: Part | str, width: int) -> list[str]:
    return item.lines(width) if isinstance(item, Part) else [item]


def _named(name: str, lines: list[str]) -> list[str]:
    return [f"{name}={lines[0]}" if name else lines[0], *lines[1:]]


def layer(module: nn.Module, name: str) -> Part:
    """The call that constructs a layer of `torch.nn`; its values are another matter.

    Raises:
        UntraceableError: it does not say what it was constructed with.
    """
    known = inspect.signature(type(module).__init__).parameters.values()
    items = []
    for parameter in list(known)[1:]:
        unusual = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if unusual or parameter.name in ("device", "dtype") or parameter.name.startswith("_"):
            continue
        value = _argument(module, parameter.name)
        if parameter.default is inspect.Parameter.empty:
            items.append(("", written(value)))
        elif value != _even(parameter.name, parameter.default):
            items.append((parameter.name, written(value)))
    part = Part(f"nn.{type(module).__name__}", tuple(items))
    _require_same(module, part, name)
    return part


def _argument(module: nn.Module, name: str) -> object:
    if (type(module), name) in OTHERWISE:
        return OTHERWISE[type(module), name](module)
    if name == "bias":
        return getattr(module, "bias", None) is not None
    return _even(name, getattr(module, name, None))


def _even(name: str, value: object) -> object:
    """`3` for `(3, 3)`."""
    return value[0] if name in EVEN and isinstance(value, tuple) and len(set(value)) == 1 else value


def written(value: object) -> str:
    """A plain value, or a tuple or list of them, as Python."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    return literal(value)


def _require_same(module: nn.Module, part: Part, name: str) -> None:
    """The call, tried out, makes a layer with tensors of the same names and shapes."""
    (text,) = part.lines(10**9)
    try:
        with torch.device("meta"):
            made = eval(text, {"nn": nn, "torch": torch})
    except Exception as error:  # whatever the layer does not like
        raise UntraceableError(f"{name}: {text} cannot be constructed like this ({error})") from error
    shapes = [{key: tensor.shape for key, tensor in m.state_dict().items()} for m in (made, module)]
    if shapes[0] != shapes[1]:
        raise UntraceableError(f"{name}: {text} does not have the tensors of the {type(module).__name__} there")
