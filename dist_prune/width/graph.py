"""A network's graph of operations with the shape of every value.

Every operation is carried out as it is written down. So whatever the code asks of a tensor besides its numbers has
an answer: shapes, types and devices, on which code may depend as much as it likes (transformers' networks do), and
how many tensors there are. Only code that depends on the numbers themselves cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from dist_prune.network.encoders import EncoderTracer
from dist_prune.network.head_attention import HeadMixing
from dist_prune.network.sites import evaluating
from dist_prune.network.tracing import carried_out

WHOLE = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, HeadMixing, _NormBase)


class GraphError(ValueError):
    """A network that torch.fx cannot follow."""


class _ValueTracer(EncoderTracer):
    """Enters everything but layers; those derived from PyTorch's own are layers, too. See the module."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image
        self.carrying_out = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WHOLE) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One input; further arguments have their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401  as fx has it
        node = super().create_node(kind, *args, **kwargs)
        node.meta["value"] = self._value_of(node)
        return node

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What holds no tensor is itself, and no proxy."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        value = proxy.node.meta["value"]
        return proxy if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)) else value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:  # noqa: ANN401  a proxy
        return (obj[place] for place in range(len(obj.node.meta["value"])))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        return forward(*args, **kwargs) if self.carrying_out else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ANN401
        return attr_val if self.carrying_out else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _value_of(self, node: fx.Node) -> Any:  # noqa: ANN401  whatever the operation returns
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        self.carrying_out = True
        try:
            if node.op == "placeholder":
                return self.image
            return carried_out(node, self.root, args, kwargs)
        finally:
            self.carrying_out = False


class _ValueProxy(fx.Proxy):
    """Stands for a value that is known: what it is asked for besides tensors and methods, it answers."""

    def __getattr__(self, k: str) -> Any:  # noqa: ANN401
        found = getattr(self.node.meta["value"], k)
        if isinstance(found, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return fx.proxy.Attribute(self, k) if callable(found) else found

    def __len__(self) -> int:
        return len(self.node.meta["value"])


def traced_with_shapes(model: nn.Module, image: Tensor) -> fx.Graph:
    """The graph in evaluation mode; the network is left as it is.

    Args:
        model: a network of one input; further arguments have their defaults.
        image: a batch that it takes.

    Raises:
        GraphError: its control flow depends on its values.
    """
    known = set(vars(model))
    try:
        with evaluating(model):
            graph = _ValueTracer(image.clone()).trace(model)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise GraphError(f"torch.fx cannot follow {type(model).__name__} ({first})") from error
    finally:
        for name in set(vars(model)) - known:  # tensors it made as it ran: the tracer leaves them on the network
            vars(model).pop(name)
    for node in graph.nodes:
        value = node.meta.pop("value")
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
    return graph


def shape_of(node: fx.Node) -> Any:  # noqa: ANN401  a tuple of ints, or None
    """Of the tensor that the operation gives, None if it gives none."""
    return node.meta["shape"]
