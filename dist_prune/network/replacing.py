"""Copies of a network in which some modules are replaced, and in which what cannot be copied is shared.

PyTorch's transformer encoders have a fast path that reads the weights of their layers, past whatever stands in the
place of one. Where that has no weight, they go without.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class CopyError(ValueError):
    """A network that cannot be copied; the message names the attribute."""


def with_replaced(
    model: nn.Module, replacements: Iterable[tuple[str, nn.Module]] = (), shared: Iterable[object] = ()
) -> nn.Module:
    """A copy of the network with the named modules replaced.

    What Python cannot copy, such as locks, open files and generators, is no part of what the network computes: the
    copy refers to the same. Activations that a forward pass has left on the network are cut off from its graph.

    Args:
        model: left as it is.
        replacements: names and what stands there in the copy; the modules they replace are not copied.
        shared: what else both networks refer to.

    Raises:
        CopyError: a module or a parameter cannot be copied.
    """
    # deepcopy takes from the memo what stands there.
    known: dict[int, Any] = {id(thing): thing for thing in shared}
    known |= {id(tensor): tensor.detach() for tensor in _left_by_a_pass(model)}
    new = {id(model.get_submodule(name)): module for name, module in replacements}
    known |= new
    while True:
        try:
            network = copy.deepcopy(model, dict(known))
            _leave_fast_paths(network, new.values())
            return network
        except Exception as error:
            thing = _innermost(error)
            if thing is None or id(thing) in known or isinstance(thing, nn.Module | nn.Parameter):
                raise CopyError(
                    f"{type(model).__name__}{_place_of(model, thing)}: cannot be copied ({error})"
                ) from error
            known[id(thing)] = thing.detach() if isinstance(thing, Tensor) else thing


def replace_in(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of others, in the network itself, wherever these are used."""
    new = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    places = [(name, new[id(old)]) for name, old in model.named_modules(remove_duplicate=False) if id(old) in new]
    for name, module in places:
        model.set_submodule(name, module)
    _leave_fast_paths(model, replacements.values())


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, the named modules stand in the places of the model's own."""
    before = {name: model.get_submodule(name) for name in modules}
    fast = [(encoder, switch, getattr(encoder, switch, None)) for encoder, switch in _encoders(model)]
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        _leave_fast_paths(model, modules.values())
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
        for encoder, switch, value in fast:
            setattr(encoder, switch, value)


def _encoders(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """PyTorch's encoders and their layers, with the attribute that switches the fast path off."""
    return [(m, switch) for m in model.modules() for kind, switch in FAST_PATHS.items() if isinstance(m, kind)]


def _leave_fast_paths(network: nn.Module, new: Iterable[nn.Module]) -> None:
    """Of all encoders in which one of these stands that has no weight to be read."""
    weightless = {id(module) for module in new if not isinstance(getattr(module, "weight", None), Tensor)}
    for encoder, switch in _encoders(network):
        if any(id(module) in weightless for module in encoder.modules()):
            setattr(encoder, switch, False)


def _left_by_a_pass(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a graph behind them among the modules' attributes."""
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, Tensor) and v.grad_fn is not None)


def _innermost(error: BaseException) -> Any:  # noqa: ANN401  networks hold what they like
    """What `copy.deepcopy` was about to copy when it failed."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    asked_for = [frame.f_locals["x"] for frame in frames if frame.f_code is copy.deepcopy.__code__]
    return asked_for[-1] if asked_for else None


def _place_of(model: nn.Module, thing: object) -> str:
    """Where among the network's attributes it is, as `.blocks.0.cache`; empty where it lies deeper."""
    for name, module in model.named_modules():
        for attribute, value in {**vars(module), **module._modules, **module._parameters}.items():
            if value is thing:
                return "." + ".".join(filter(None, (name, attribute)))
    return ""
