"""The forward of one module as a graph of operations, its children left as calls.

Values are computed along for two batch sizes. What is the same for both, such as the height of an image, is a
constant to the traced code: it may decide which way to go, and stands in the graph as a number.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

Pair = tuple[Any, Any]  # a value at each of the two batch sizes
PLAIN = (bool, int, float, str, torch.dtype, type(None))


class UntraceableError(ValueError):
    """A forward that cannot be written down as operations; the message says where and why."""


@dataclass
class Forward:
    """What `trace` found: the graph, and of each child that was called its arguments, name → values."""

    graph: fx.Graph
    values: dict[fx.Node, Pair]
    calls: dict[nn.Module, dict[str, Pair]]


def trace(module: nn.Module, name: str, arguments: Mapping[str, Pair]) -> Forward:
    """Trace one module in evaluation mode; tensors made on the way become its buffers `constant0`, …

    Args:
        module: with children of its own.
        name: of the module in its network, for messages.
        arguments: of its forward, by name; plain values are fixed, all others become the graph's inputs.

    Raises:
        UntraceableError: values of tensors, or the number of images, decide what is computed; or the code does
            what cannot be followed.
    """
    tracer = _SourceTracer(arguments)
    try:
        with torch.no_grad():
            graph = tracer.trace(module)
    except UntraceableError as error:
        raise UntraceableError(f"{type(module).__name__} {name!r}{error}") from error
    except Exception as error:  # whatever the network's own code raises when given a stand-in for a tensor
        where = _users_line(traceback.extract_tb(error.__traceback__))
        raise UntraceableError(f"{type(module).__name__} {name!r}{where}: {error}") from error
    _drop_unused(graph)
    _keep_constants(module, graph)
    return Forward(graph, tracer.values, tracer.calls)


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what nobody uses and what changes nothing, such as the width of an image."""
    for node in reversed(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        changes = name == "setitem" or name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")
        if not node.users and not changes and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _users_line(frames: traceback.StackSummary) -> str:
    """Where in the network's own code this is."""
    barred = (str(Path(torch.__file__).parent), __file__)
    own = [frame for frame in frames if not frame.filename.startswith(barred)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def is_known(module: nn.Module) -> bool:
    """Whether torch has this layer, so that it is written as it is constructed."""
    containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return getattr(nn, type(module).__name__, None) is type(module) and not isinstance(module, containers)


def is_foreign(function: Any) -> bool:  # noqa: ANN401
    """Whether it is a function of some other package, to be followed into."""
    package = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    return package not in ("torch", "builtins", "_operator", "math")


def is_constant(pair: Pair) -> bool:
    """Whether it is the same plain value at both batch sizes."""
    first, second = pair
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(is_constant, zip(first, second, strict=True)))
    return isinstance(first, PLAIN) and type(first) is type(second) and bool(first == second)


def _cloned(pair: Pair) -> Pair:
    """So that nothing that is computed in place later changes it."""
    copy = map_aggregate(pair, lambda a: a.clone() if isinstance(a, Tensor) else a)
    assert isinstance(copy, tuple)
    return copy[0], copy[1]


def _keep_constants(module: nn.Module, graph: fx.Graph) -> None:
    """Tensors that the forward made of nothing but constants, as buffers that are saved."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            name = node.target.lstrip("_").removeprefix("tensor_")
            if node.target in vars(module):
                module.register_buffer(name, vars(module).pop(node.target))
            node.target = name


def own_buffers(network: nn.Module) -> None:
    """Have all tensors of a network saved with it: plain attributes, and buffers that were not."""
    for module in network.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
            module.register_buffer(name, vars(module).pop(name))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=True)


class _Value(fx.Proxy):
    """Stands for a value while a forward is traced; knows what it was at the two batch sizes."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        first = self.tracer.values[self.node][0]  # type: ignore[attr-defined]
        if callable(getattr(first, name)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, key: Any, value: Any) -> None:  # noqa: ANN401
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __iadd__(self, other: Any) -> Any:  # noqa: ANN401  torch.fx itself would forget that it is in place
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __len__(self) -> int:
        return self.tracer.length(self)  # type: ignore[attr-defined, no-any-return]


class _SourceTracer(fx.Tracer):
    """Traces one module; its children are calls."""

    proxy_buffer_attributes = True

    def __init__(self, arguments: Mapping[str, Pair]) -> None:
        super().__init__()
        self.arguments = arguments
        self.values: dict[fx.Node, Pair] = {}
        self.calls: dict[nn.Module, dict[str, Pair]] = {}
        self.running = False

    def proxy(self, node: fx.Node) -> _Value:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ANN401
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """A call of a child; of one that is written as a class, only what is no constant is handed over."""
        if self.running:
            return forward(*args, **kwargs)
        if not is_known(m):
            bound = inspect.signature(m.forward).bind(*args, **kwargs).arguments
            pairs = {name: self._pair(value) for name, value in bound.items()}
            self.calls.setdefault(m, {n: _cloned(p) for n, p in pairs.items()})
            args, kwargs = tuple(v for n, v in bound.items() if not is_constant(pairs[n])), {}
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(
        self,
        kind: str,
        target: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,  # noqa: ANN401
        **more: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """A constant, or a node whose values are known."""
        if kind == "call_function" and is_foreign(target):
            return target(*args, **kwargs)
        if kind == "placeholder":
            pair = self.arguments.get(target.lstrip("*"), args * 2)
        else:
            pair = self._computed(kind, target, args, kwargs)
        if is_constant(pair) and target is not operator.setitem:
            return pair[0]
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self.values[made.node] = pair
        return made

    def to_bool(self, obj: fx.Proxy) -> bool:
        kind = "the values of a tensor" if isinstance(self._pair(obj)[0], Tensor) else "the number of images"
        raise UntraceableError(f"{_users_line(traceback.extract_stack())}: {kind} decide what is computed")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(self.length(obj))])  # type: ignore[index]

    def length(self, obj: fx.Proxy) -> int:
        first, second = map(len, self._pair(obj))
        if first != second:
            raise UntraceableError(f"{_users_line(traceback.extract_stack())}: it loops over the images")
        return first

    def _pair(self, value: Any) -> Pair:  # noqa: ANN401
        return self._at(0, value), self._at(1, value)

    def _at(self, size: int, value: Any) -> Any:  # noqa: ANN401
        """A value, or a structure of them, at one of the batch sizes."""
        return map_aggregate(value, lambda a: self.values[a.node][size] if isinstance(a, fx.Proxy) else a)

    def _computed(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:  # noqa: ANN401
        """The operation's results at both batch sizes."""
        both = zip(self._pair(args), self._pair(kwargs), strict=True)
        self.running = True
        try:
            first, second = (_apply(self.root, kind, target, a, k) for a, k in both)
        finally:
            self.running = False
        return first, second


def _apply(root: nn.Module, kind: str, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    if kind == "get_attr":
        return operator.attrgetter(target)(root)
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    function = root.get_submodule(target) if kind == "call_module" else target
    return function(*args, **kwargs)
