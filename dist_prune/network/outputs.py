"""What networks return, and the logits among it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.network.errors import ModelError

LOGITS = ("logits", "out")  # what libraries call them: Hugging Face, torchvision's segmentation
Outputs = Callable[[Any], Tensor]


def logits_of(output: Any) -> Tensor:  # noqa: ANN401  networks return what they like
    """The logits (N, classes), or (N, classes, positions), of what a network returned.

    Of a mapping, a dataclass, a tuple or a list they are what is called `logits` or `out`, or the only tensor; of
    several in a tuple or list the first, if that is (N, classes): auxiliary ones follow it by custom. Maps
    (N, classes, H, W) have H·W positions.

    Raises:
        ModelError: there is no such tensor, or there are several.
    """
    found = _tensor_of(output)
    if found.dim() < 2 or not found.is_floating_point():
        raise ModelError(f"the network returned {described(output)}; {EXPECTED}")
    return found.flatten(2) if found.dim() > 2 else found


EXPECTED = (
    "expected logits (images, classes) or (images, classes, …), floating-point; in Python, say by `outputs`, a "
    "function of what the network returns, which tensor counts"
)


def _tensor_of(output: Any) -> Tensor:  # noqa: ANN401
    if isinstance(output, Tensor):
        return output
    named = _named(output)
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    known = [name for name in LOGITS if name in tensors]
    if not known and isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        known = list(tensors)[:1] if output[0].dim() == 2 else []
    if known or len(tensors) == 1:
        return tensors[known[0] if known else next(iter(tensors))]
    raise ModelError(f"the network returned {described(output)}; {EXPECTED}")


def _named(output: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """What a mapping, a dataclass, a tuple or a list holds, by name or number."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple | list):
        return dict(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=True))
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def described(output: Any) -> str:  # noqa: ANN401
    """What was returned: kinds and shapes, for messages."""
    if isinstance(output, Tensor):
        return f"{output.dtype} {tuple(output.shape)}"
    kind, parts = type(output).__name__, [f"{name}: {described(value)}" for name, value in _named(output).items()]
    if len(parts) > 6:
        parts = [*parts[:6], "…"]
    return f"{kind} ({', '.join(parts)})" if parts else kind


def answering(model: nn.Module, outputs: Outputs) -> nn.Module:
    """The same layers in a network that returns `outputs` of what it returned; the given one stays as it is.

    Layers keep their names, unlike in a wrapper.

    Raises:
        ModelError: a torch.fx.GraphModule, whose copies are what its graph says and nothing else.
    """
    if isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            "outputs: the network is a torch.fx.GraphModule; expected the module that it was traced from, or a "
            "graph that returns the tensor that counts"
        )

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return outputs(kind.forward(self, images))

    kind = type(model)
    network = copy.copy(model)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return network


def unanswering(network: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of what `answering` made of the model returns again what the model does; others stay as they are."""
    if isinstance(network, type(model)):
        network.__class__ = type(model)
    return network


def concern_about(answer: Tensor) -> str:
    """A warning where a network's answer may not be what it is taken for; else empty."""
    if answer.dim() == 3:
        return (
            f"the network's outputs are taken for logits of {answer.shape[1]} classes at each of "
            f"{answer.shape[2]} positions; of features or a regression, ask for the loss mse"
        )
    answer = answer.double()
    if not (answer >= 0).all() or not ((answer.sum(1) - 1).abs() <= 1e-3).all():
        return ""
    return (
        "the network's outputs are not negative and sum to 1, as after a softmax, but are taken for logits: every "
        "divergence is far too small. Take the softmax out of the network"
    )
