"""Forward passes that stop at sites: the network as a list of operations, advanced for many batches in step.

The graph is traced once (torch.fx) and executed against either of two roots, the dense network or its compressed
copy, whose layers have the same names. Values are dropped after their last use, so a paused pass holds what an
ordinary forward would hold at that place.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dist_prune.network.encoders import EncoderTracer
from dist_prune.network.head_attention import HeadMixing
from dist_prune.network.padded import PaddedConv2d
from dist_prune.network.sites import evaluating

Values = dict[fx.Node, Any]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Names of modules and functions that are the identity in evaluation mode.
_PASSING = ("Identity", "Dropout", "Dropout2d", "StochasticDepth", "DropPath", "dropout", "stochastic_depth")
_IN_PLACE = (operator.setitem, *(f for n, f in vars(operator).items() if n[0] == "i" and hasattr(operator, n[1:])))


class TraceError(ValueError):
    """A network that torch.fx cannot follow."""


@dataclass(frozen=True)
class Shortcut:
    """Where a site's output is added to something: `site → affine → add(·, other)`.

    `affine` is the name of the batch norm in between, empty if there is none.
    """

    other: fx.Node
    affine: str


@dataclass(frozen=True)
class Program:
    """Operations in an order that computes each site's shortcut before the site."""

    steps: tuple[fx.Node, ...]
    stops: Mapping[str, int]  # site name → its place in steps, of sites called exactly once
    shortcuts: Mapping[str, Shortcut]
    dropped: tuple[tuple[fx.Node, ...], ...]  # what is no longer needed after each step
    constants: Mapping[str, Any]  # that the network makes as it runs
    changed_until: int  # no step from here on changes a value in place

    def begin(self, root: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Pass:
        """A pass over a batch, still before the first operation."""
        return Pass(self, root, images, prepare)


def trace(model: nn.Module, names: Iterable[str]) -> Program:
    """Follow the network in evaluation mode.

    Args:
        model: left as it is.
        names: of the sites to stop at; those called more than once are left out of `stops`.

    Raises:
        TraceError: its control flow depends on its values.
    """
    known = set(vars(model))
    try:
        with evaluating(model):
            graph = _Tracer().trace(model, _defaults(model))
    except Exception as error:
        raise TraceError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    finally:
        # Tensors the network makes as it runs: the tracer leaves them on the network.
        constants = {name: vars(model).pop(name) for name in set(vars(model)) - known}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    once = {name: calls[name][0] for name in names if len(calls.get(name, ())) == 1}
    shortcuts = _shortcuts(model, once)
    first = {once[name]: shortcut.other for name, shortcut in shortcuts.items()}
    steps = _ordered(graph, first)
    place = {node: index for index, node in enumerate(steps)}
    stops = dict(sorted(((name, place[node]) for name, node in once.items()), key=operator.itemgetter(1)))
    changed_until = max((place[node] + 1 for node in steps if _is_in_place(model, node)), default=0)
    return Program(steps, stops, shortcuts, _last_uses(steps, first), constants, changed_until)


class _Tracer(EncoderTracer):
    """Enters everything but torch's own layers and the like."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PaddedConv2d | HeadMixing) or super().is_leaf_module(m, module_qualified_name)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What the arguments besides the images are when only images are given."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    plain = (bool, int, float, str, type(None))
    return {p.name: p.default for p in others if isinstance(p.default, plain)}


def _shortcuts(model: nn.Module, sites: Mapping[str, fx.Node]) -> dict[str, Shortcut]:
    """One site for each addition, the one on the longer path: it repairs what the other path lost."""
    found: dict[str, Shortcut] = {}
    first: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    place = {node: index for index, node in enumerate(next(iter(sites.values())).graph.nodes)} if sites else {}
    for name, site in sorted(sites.items(), key=lambda item: -len(_ancestors(item[1], {}))):
        end = _addition_after(model, site)
        if end is None or end[0] in taken:
            continue
        addition, shortcut = end
        before = _ancestors(shortcut.other, first)
        span = range(place[site], max(map(place.__getitem__, before)) + 1)
        moved_past = [node for node in site.graph.nodes if place[node] in span]
        if site not in before and not any(_is_in_place(model, node) for node in moved_past):
            found[name], first[site] = shortcut, shortcut.other
            taken.add(addition)
    return found


def _addition_after(model: nn.Module, site: fx.Node) -> tuple[fx.Node, Shortcut] | None:
    """Where the output is added to another value, through at most one batch norm and any number of identities."""
    affine, node = "", site
    while len(node.users) == 1:
        (user,) = node.users
        if _is_addition(user) and len(user.all_input_nodes) == 2:
            (other,) = (n for n in user.all_input_nodes if n is not node)
            return user, Shortcut(other, affine)
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None and not affine:
            affine = str(user.target)
        elif (type(module).__name__ if module else getattr(user.target, "__name__", "")) not in _PASSING:
            return None
        node = user
    return None


def _is_addition(node: fx.Node) -> bool:
    by_function = node.op == "call_function" and node.target in _ADDITIONS
    by_method = node.op == "call_method" and node.target in ("add", "add_")
    return (by_function or by_method) and "alpha" not in node.kwargs


def _is_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether the operation changes what it is given, as far as can be seen; rather too often than too rarely."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flagged = any(value is True for value in (*node.args, node.kwargs.get("inplace"), "out" in node.kwargs))
    return flagged or name.endswith("_") or node.target in _IN_PLACE


def _ancestors(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The node and all that must be computed before it."""
    waiting, seen = [node], {node}
    while waiting:
        fresh = [n for n in _needs(waiting.pop(), first) if n not in seen]
        seen.update(fresh)
        waiting += fresh
    return seen


def _needs(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    return [*node.all_input_nodes, first[node]] if node in first else node.all_input_nodes


def _ordered(graph: fx.Graph, first: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
    """The graph's order, except that `first[node]`, with all it needs, comes before `node`."""
    done: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in done:
            return
        for needed in _needs(node, first):
            visit(needed)
        done[node] = None

    for node in graph.nodes:
        visit(node)
    return tuple(done)


def _last_uses(steps: Sequence[fx.Node], first: Mapping[fx.Node, fx.Node]) -> tuple[tuple[fx.Node, ...], ...]:
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(steps):
        for used in _needs(node, first):
            last[used] = index
    dropped: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        dropped[index].append(node)
    return tuple(map(tuple, dropped))


@dataclass
class Pass:
    """A forward pass under way: everything before `position` is done."""

    program: Program
    root: nn.Module
    images: Tensor
    prepare: Callable[[Tensor], Tensor] = torch.Tensor.clone  # from the images kept to what the network takes
    position: int = 0
    values: Values = field(default_factory=dict)

    @torch.no_grad()
    def advance(self, position: int) -> None:
        """Execute the steps before `position`."""
        for index in range(self.position, position):
            self._execute(index)
        self.position = position

    def _execute(self, index: int) -> None:
        node = self.program.steps[index]
        self.values[node] = self._run(node)
        for unused in self.program.dropped[index]:
            self.values.pop(unused, None)

    def _run(self, node: fx.Node) -> Any:  # noqa: ANN401  whatever the operation returns
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "placeholder":
            first = node is self.program.steps[0]
            return self.prepare(self.images) if first else next(iter(node.args), None)
        if node.op == "get_attr" and node.target in self.program.constants:
            return self.program.constants[str(node.target)]
        return carried_out(node, self.root, args, kwargs)

    def input_of(self, name: str) -> Tensor:
        """What the site is about to be given; the pass must stand at it."""
        node = self.program.steps[self.program.stops[name]]
        value: Tensor = self.values[node.all_input_nodes[0]]
        return value

    def output_of(self, name: str) -> Tensor:
        """What the site gives; the pass, which must stand at it, goes one step further."""
        place = self.program.stops[name]
        self.advance(place + 1)
        value: Tensor = self.values[self.program.steps[place]]
        return value

    def shortcut_of(self, name: str) -> Tensor:
        """What the site's output will be added to; the pass must stand at the site."""
        value: Tensor = self.values[self.program.shortcuts[name].other]
        return value

    @torch.no_grad()
    def outcome(self, root: nn.Module, output: Tensor) -> Any:  # noqa: ANN401  what the network returns
        """What the network returns if the site it stands at gave `output` and all that follows were `root`'s."""
        fork = Pass(self.program, root, self.images, self.prepare, self.position + 1, dict(self.values))
        fork.values[self.program.steps[self.position]] = output
        if fork.position < self.program.changed_until:
            fork.values = dict(zip(fork.values, copy.deepcopy(list(fork.values.values())), strict=True))
        for unused in self.program.dropped[self.position]:
            fork.values.pop(unused, None)
        return fork.finished()

    def finished(self) -> Any:  # noqa: ANN401  what the network returns
        """What the network returns, after all the steps that are left."""
        self.advance(len(self.program.steps))
        return self.values[self.program.steps[-1]]

    @property
    def bytes(self) -> int:
        """Memory that the pass holds while it waits."""
        tensors = [v for v in tree_leaves(list(self.values.values())) if isinstance(v, Tensor)]
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}
        return sum(storages.values())

    def restart(self) -> None:
        """Drop all activations: the next `advance` computes from the images."""
        self.position, self.values = 0, {}


def carried_out(node: fx.Node, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """What an operation of a graph returns, of a network and the values of its arguments; none of placeholders."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(root)
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]
