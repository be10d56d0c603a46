"""Forward passes that stop at sites: the network as a list of operations, advanced for many batches in step.

The graph is traced once (torch.fx) and executed against either of two roots, the dense network or its compressed
copy, whose layers have the same names. Values are dropped after their last use, so a paused pass holds what an
ordinary forward would hold at that place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

Values = dict[fx.Node, Any]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_PASSING = (nn.Identity, nn.Dropout)


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


def trace(model: nn.Module, names: Iterable[str]) -> Program:
    """Follow the network in evaluation mode.

    Args:
        model: left as it is.
        names: of the sites to stop at; those called more than once are left out of `stops`.

    Raises:
        TraceError: its control flow depends on its values.
    """
    mode = model.training
    try:
        graph = fx.Tracer().trace(model.eval())
    except Exception as error:
        raise TraceError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    finally:
        model.train(mode)
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
    return Program(steps, stops, shortcuts, _last_uses(steps, first))


def _shortcuts(model: nn.Module, sites: Mapping[str, fx.Node]) -> dict[str, Shortcut]:
    """One site for each addition, the one on the longer path: it repairs what the other path lost."""
    found: dict[str, Shortcut] = {}
    first: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    for name, site in sorted(sites.items(), key=lambda item: -len(_ancestors(item[1], {}))):
        end = _addition_after(model, site)
        if end is None or end[0] in taken:
            continue
        addition, shortcut = end
        if site not in _ancestors(shortcut.other, first):
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
        if isinstance(module, nn.BatchNorm2d) and not affine:
            affine = str(user.target)
        elif not isinstance(module, _PASSING) and not _is_stochastic_depth(module):
            return None
        node = user
    return None


def _is_addition(node: fx.Node) -> bool:
    by_function = node.op == "call_function" and node.target in _ADDITIONS
    return by_function or (node.op == "call_method" and node.target in ("add", "add_"))


def _is_stochastic_depth(module: nn.Module | None) -> bool:
    """As torchvision and timm have it; the identity in evaluation mode."""
    return type(module).__name__ in ("StochasticDepth", "DropPath")


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
    position: int = 0
    values: Values = field(default_factory=dict)
    prepare: Callable[[Tensor], Tensor] = torch.Tensor.contiguous  # from the images kept to what the network takes

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
            return self.prepare(self.images)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]

    def input_of(self, name: str) -> Tensor:
        """What the site is about to be given; the pass must stand at it."""
        node = self.program.steps[self.program.stops[name]]
        value: Tensor = self.values[node.all_input_nodes[0]]
        return value

    def shortcut_of(self, name: str) -> Tensor:
        """What the site's output will be added to; the pass must stand at the site."""
        value: Tensor = self.values[self.program.shortcuts[name].other]
        return value

    @torch.no_grad()
    def outcome(self, root: nn.Module, output: Tensor) -> Tensor:
        """The network's output if the site it stands at gave `output` and all that follows were `root`'s."""
        fork = Pass(self.program, root, self.images, self.position + 1, dict(self.values), self.prepare)
        fork.values[self.program.steps[self.position]] = output
        for unused in self.program.dropped[self.position]:
            fork.values.pop(unused, None)
        fork.advance(len(self.program.steps))
        result: Tensor = fork.values[self.program.steps[-1]]
        return result

    @property
    def bytes(self) -> int:
        """Memory that the pass holds while it waits."""
        tensors = {v.untyped_storage().data_ptr(): v for v in self.values.values() if isinstance(v, Tensor)}
        return sum(v.untyped_storage().nbytes() for v in tensors.values())

    def restart(self) -> None:
        """Forget everything: the next `advance` computes from the images."""
        self.position, self.values = 0, {}
