"""Tracing with torch.fx that enters PyTorch's own transformer encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn


class EncoderTracer(fx.Tracer):
    """Enters nn.TransformerEncoder, whose own code cannot be traced: its layers one after the other, and its norm.

    Encoders that are given masks are single operations, as all of torch's modules are for torch.fx. Meanwhile
    there is no fast path, which runs all of a layer in one operation.
    """

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See torch.fx."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().trace(root, concrete_args)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is one operation."""
        entered = type(m) in (nn.TransformerEncoder, nn.TransformerEncoderLayer)
        return not entered and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401  whatever the module returns
        """See torch.fx."""
        if type(m) in (nn.TransformerEncoder, nn.TransformerEncoderLayer) and (len(args) > 1 or kwargs):
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        if type(m) is nn.TransformerEncoder:
            forward = partial(_in_order, m)
        return super().call_module(m, forward, args, kwargs)


def _in_order(encoder: nn.TransformerEncoder, x: Tensor) -> Tensor:
    """What an encoder computes without masks."""
    for layer in encoder.layers:
        x = layer(x)
    return x if encoder.norm is None else encoder.norm(x)
