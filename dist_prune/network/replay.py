"""The same as a walk for networks that torch.fx cannot trace: the forward pass starts again for every site.

Nothing is known about the graph, so there are no shortcuts to repair: targets are the dense layers' plain outputs.
A network may decide by its values which sites it calls; a site that is not called for a batch gets no rows of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dist_prune.network.replacing import replaced
from dist_prune.network.sites import evaluating, given_to
from dist_prune.network.tracing import Pass, Program, Shortcut, TraceError, trace


class _ReachedError(BaseException):
    """Ends a forward pass at a site; no `Exception`, which the network's own code might catch."""


@dataclass(frozen=True)
class Listing:
    """The sites that one forward pass calls exactly once, in its order, and the shapes of what they are given."""

    stops: Mapping[str, int]
    given: Mapping[str, torch.Size]
    reason: str  # why there is no Program
    shortcuts: Mapping[str, Shortcut] = field(default_factory=dict)

    def begin(self, root: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Rerun:
        """A pass over a batch, still before the first site."""
        return Rerun(self, root, images, prepare)


Route = Program | Listing


def follow(model: nn.Module, names: Iterable[str], images: Tensor) -> Route:
    """The network's graph, if torch.fx finds one that computes what the network does; else its sites' order.

    Args:
        model: left as it is.
        names: of the sites to stop at.
        images: a few, as the network takes them.
    """
    names = list(names)
    try:
        program = trace(model, names)
    except TraceError as error:
        return listing(model, names, images, str(error))
    with evaluating(model):
        expected, walk = model(images.clone()), program.begin(model, images, torch.clone)
        if _same(expected, walk.finished()):
            return program
    kind = type(model).__name__
    return listing(model, names, images, f"what torch.fx traced of {kind} computes something else than {kind}")


def _same(first: Any, second: Any) -> bool:  # noqa: ANN401  networks return what they like
    """Whether two answers of a network agree, up to rounding."""
    firsts, seconds = (tree_leaves(a) for a in (first, second))
    pairs = [(a, b) for a, b in zip(firsts, seconds, strict=False) if isinstance(a, Tensor)]
    return bool(pairs) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-3, 1e-3) for a, b in pairs
    )


def listing(model: nn.Module, names: Iterable[str], images: Tensor, reason: str) -> Listing:
    """The order of sites in one forward pass."""
    calls: Counter[str] = Counter()
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            calls[name] += 1
            shapes[name] = given_to(args, kwargs).shape

        return hook

    with ExitStack() as stack, evaluating(model):
        for name in names:
            stack.callback(
                model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True).remove
            )
        model(images.clone())
    once = [name for name, times in calls.items() if times == 1]
    return Listing({name: place for place, name in enumerate(once)}, shapes, reason)


@dataclass
class Rerun:
    """A batch as a `Pass`; what it is asked for is computed from the images each time."""

    listing: Listing
    root: nn.Module
    images: Tensor
    prepare: Callable[[Tensor], Tensor] = torch.Tensor.clone
    position: int = 0  # of the site it stands at
    held: dict[str, Tensor] = field(default_factory=dict)  # the input of that site, once asked for

    def advance(self, position: int) -> None:
        """Move to just before the site at `position`."""
        if position != self.position:
            self.restart()
        self.position = position

    @torch.no_grad()
    def input_of(self, name: str) -> Tensor:
        """What the site is about to be given; an empty batch if the network does not call it for these images."""
        if name not in self.held:
            self.held[name] = self._stopped_at(name)
        return self.held[name]

    def _stopped_at(self, name: str) -> Tensor:
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            found.append(given_to(args, kwargs))
            raise _ReachedError

        site = self.root.get_submodule(name)
        weight = next(site.parameters())
        hook = site.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.root(self.prepare(self.images))
        except _ReachedError:
            return found[0].to(weight.dtype)  # inside the network, autocast may do that
        finally:
            hook.remove()
        return weight.new_empty((0, *self.listing.given[name][1:]))

    @torch.no_grad()
    def output_of(self, name: str) -> Tensor:
        """What the site gives."""
        output: Tensor = self.root.get_submodule(name)(self.input_of(name))
        return output

    def shortcut_of(self, name: str) -> Tensor:
        """Shortcuts are not known."""
        raise KeyError(name)

    @torch.no_grad()
    def outcome(self, root: nn.Module, output: Tensor) -> Any:  # noqa: ANN401  what the network returns
        """What the network returns if this site gave `output` and all sites that follow were `root`'s."""
        here, *later = list(self.listing.stops)[self.position :]
        modules = {name: root.get_submodule(name) for name in later}
        with replaced(self.root, {here: _Giving(output), **modules}):
            return self.root(self.prepare(self.images))

    @property
    def bytes(self) -> int:
        """Memory that the pass holds while it waits."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held.values())

    def restart(self) -> None:
        """Drop all activations."""
        self.position, self.held = 0, {}


AnyPass = Pass | Rerun


class _Giving(nn.Module):
    """Gives a copy of the same output whatever it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.output.clone()
