"""A network's graph of operations with the shape of every value."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dist_prune.network.head_attention import HeadMixing
from dist_prune.network.sites import evaluating

WHOLE = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, HeadMixing, _NormBase)


class GraphError(ValueError):
    """A network that torch.fx cannot follow."""


class _GroupTracer(fx.Tracer):
    """Enters everything but layers; those derived from PyTorch's own are layers, too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WHOLE) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs the graph and notes shapes."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401  whatever the operation returns
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


def traced_with_shapes(model: nn.Module, image: Tensor) -> fx.Graph:
    """The graph in evaluation mode; the network is left as it is.

    Args:
        model: a network of one input; further arguments have their defaults.
        image: a batch that it takes.

    Raises:
        GraphError: its control flow depends on its values, or what was traced does not run.
    """
    known = set(vars(model))
    try:
        with evaluating(model):
            graph = _GroupTracer().trace(model, _defaults(model))
            _Shapes(fx.GraphModule(model, graph)).run(image.clone())
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise GraphError(f"torch.fx cannot follow {type(model).__name__} ({first})") from error
    finally:
        for name in set(vars(model)) - known:  # tensors it made as it ran: the tracer leaves them on the network
            vars(model).pop(name)
    return graph


def shape_of(node: fx.Node) -> Any:  # noqa: ANN401  a tuple of ints, or None
    """Of the tensor that the operation gives, None if it gives none."""
    return node.meta["shape"]


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What the arguments besides the images are when only images are given."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in others if isinstance(p.default, plain)}
