"""A traced forward as lines of Python that one would write: short chains in one expression, the rest named."""

from __future__ import annotations

import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dist_prune.export.tracing import Forward, UntraceableError

WIDTH = 88  # of an expression; longer ones are split at a name
TAKEN = frozenset({"torch", "nn", "F", "math", "self"})
INFIX: dict[Callable[..., Any], str] = {
    operator.add: "+",
    operator.iadd: "+",
    operator.sub: "-",
    operator.isub: "-",
    operator.mul: "*",
    operator.imul: "*",
    operator.truediv: "/",
    operator.itruediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
INPLACE = {
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
}


def parameters(forward: Forward) -> list[str]:
    """The names that the forward takes, after `self`."""
    return [_name(node) for node in forward.graph.nodes if node.op == "placeholder"]


def statements(forward: Forward, module: nn.Module) -> list[str]:
    """The body of the forward, one statement per line.

    Raises:
        UntraceableError: an operation that has no name in torch.
    """
    return _Writer(forward, module).lines


class _Writer:
    """Goes through the graph once. Expressions wait, in the order of evaluation, for the one use they have."""

    def __init__(self, forward: Forward, module: nn.Module) -> None:
        self.values, self.module = forward.values, module
        self.waiting: list[fx.Node] = []
        self.texts: dict[fx.Node, str] = {}
        self.lines: list[str] = []
        for node in forward.graph.nodes:
            self._take(node)

    def _take(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.texts[node] = _name(node)
        elif node.op == "get_attr":
            self.texts[node] = _path(self.module, str(node.target))
        else:
            self._write(node)

    def _write(self, node: fx.Node) -> None:
        count = self._fitting(node)
        self._flush(len(self.waiting) - count)
        if len(self._expression(node)) > WIDTH:
            self._flush(count)
            count = 0
        text = self._expression(node)
        del self.waiting[len(self.waiting) - count :]
        if node.op == "output":
            self.lines += _folded("return ", text)
        elif node.target is operator.setitem:
            self.lines.append(text)
        else:
            self.texts[node] = text
            self.waiting.append(node)
            if len(_uses(node)) != 1:
                self._flush(len(self.waiting))

    def _fitting(self, node: fx.Node) -> int:
        """How many of those that wait last can stand inside this expression, in their order."""
        used = [n for n in _inputs(node) if n in self.waiting]
        for count in range(len(used), 0, -1):
            if self.waiting[-count:] == used[-count:]:
                return count
        return 0

    def _flush(self, count: int) -> None:
        """Give the first of those that wait a name."""
        for node in self.waiting[:count]:
            self.lines += _folded(f"{_name(node)} = ", self.texts[node])
            self.texts[node] = _name(node)
        del self.waiting[:count]

    # ── expressions ────────────────────────────────────────────────────────────────────────────────────────

    def _expression(self, node: fx.Node) -> str:
        if node.op == "output":
            return self._literal(node.args[0])
        if node.op == "call_module":
            return f"{_path(self.module, str(node.target))}({self._arguments(node.args, node.kwargs)})"
        if node.op == "call_method":
            return self._method(str(node.target), node.args, node.kwargs)
        return self._function(node)

    def _function(self, node: fx.Node) -> str:
        target, args = node.target, node.args
        assert callable(target)
        if target in (operator.getitem, operator.setitem):
            item = f"{self._operand(args[0])}[{self._index(args[1])}]"
            return item if target is operator.getitem else f"{item} = {self._literal(args[2])}"
        if target is getattr:
            return f"{self._operand(args[0])}.{args[1]}"
        if target in INPLACE and self._is_needed_elsewhere(args[0]):
            return self._method(INPLACE[target], args, {})
        if target in INFIX:
            return f"{self._operand(args[0])} {INFIX[target]} {self._operand(args[1])}"
        return f"{_function_name(target)}({self._arguments(args, _unusual(target, node.kwargs))})"

    def _is_needed_elsewhere(self, value: Any) -> bool:  # noqa: ANN401
        """Whether a tensor that is changed in place is used by another operation, too."""
        return isinstance(value, fx.Node) and isinstance(self.values[value][0], Tensor) and len(_uses(value)) > 1

    def _method(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        return f"{self._operand(args[0])}.{name}({self._arguments(args[1:], kwargs)})"

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        return ", ".join(
            [*map(self._literal, args), *(f"{name}={self._literal(v)}" for name, v in kwargs.items())]
        )

    def _operand(self, value: Any) -> str:  # noqa: ANN401
        """In parentheses where it is an operation itself."""
        text = self._literal(value)
        is_infix = isinstance(value, fx.Node) and value in self.waiting and value.target in INFIX
        is_negative = isinstance(value, int | float) and value < 0
        return f"({text})" if is_infix or is_negative else text

    def _index(self, value: Any) -> str:  # noqa: ANN401
        if isinstance(value, tuple) and value:
            return ", ".join(map(self._index, value)) + ("," if len(value) == 1 else "")
        if isinstance(value, slice):
            start, stop = ("" if v is None else self._literal(v) for v in (value.start, value.stop))
            return f"{start}:{stop}" + ("" if value.step is None else f":{self._literal(value.step)}")
        return "..." if value is Ellipsis else self._literal(value)

    def _literal(self, value: Any) -> str:  # noqa: ANN401
        if isinstance(value, fx.Node):
            return self.texts[value]
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._literal(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._literal, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._literal, value))}{',' if len(value) == 1 else ''})"
        return literal(value)


def literal(value: Any) -> str:  # noqa: ANN401
    """A plain value as Python.

    Raises:
        UntraceableError: it is none.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.memory_format):
        return repr(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if value is Ellipsis:
        return "..."
    raise UntraceableError(f"a value of type {type(value).__name__} cannot be written as Python")


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes it uses, in the order in which they are evaluated, as often as it uses them."""
    found: list[fx.Node] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if isinstance(a, fx.Node) else a)
    return found


def _uses(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users for n in _inputs(user) if n is node]


def _name(node: fx.Node) -> str:
    name = str(node.target).lstrip("*") if node.op == "placeholder" else node.name
    return f"{name}_" if name in TAKEN else name


def _folded(head: str, text: str) -> list[str]:
    """A statement, on several lines where it is long."""
    if len(head) + len(text) <= WIDTH + 12:
        return [head + text]
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"{head}(", *("    " + line for line in lines), ")"]


def _path(module: nn.Module, target: str) -> str:
    """`self.layers[0].weight`, say."""
    text, here = "self", module
    for part in target.split("."):
        if type(here) is nn.ModuleDict:  # a subclass is written as a class, with attributes
            text += f"[{part!r}]"
        elif part.isdecimal() and isinstance(here, nn.Sequential | nn.ModuleList):
            text += f"[{part}]"
        else:
            text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
        here = getattr(here, part)
    return text


def _unusual(target: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are not what they are by default."""
    try:
        known = inspect.signature(target).parameters
    except ValueError:  # of functions in C
        return kwargs
    return {n: v for n, v in kwargs.items() if n not in known or repr(v) != repr(known[n].default)}


def _function_name(target: Callable[..., Any]) -> str:
    name = getattr(target, "__name__", "")
    if target is operator.neg:
        return "torch.neg"
    for prefix, namespace in (("F", F), ("torch", torch), ("math", math), ("torch.special", torch.special)):
        if getattr(namespace, name, None) is target:
            return f"{prefix}.{name}"
    if inspect.isbuiltin(target) and target.__module__ == "builtins":
        return name
    raise UntraceableError(f"the operation {target} has no public name in torch")
