"""Channel groups: which channels of a network can be removed, and which layers have to change with them.

A group is a set of channels that one or more layers make (*producers*), that pass only operations which keep
channels apart (batch norm, activations, depthwise convolutions, pooling, gates), and that one or more layers take
up (*consumers*). A channel that is removed takes with it a row of each producer, its entries *between*, and its
columns in each consumer; nothing else in the network changes.

Attention that was taken apart has two more: the dimensions of queries and keys, and those of values, which go from
all heads alike.

Found by following the traced graph once, in execution order: every value knows along which axis it carries
channels, and of which group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dist_prune.network.channels import QUERIES, VALUES, Consumer, Group
from dist_prune.network.head_attention import HeadMixing, NormalisedMixing
from dist_prune.width import channelwise
from dist_prune.width.graph import GraphError, shape_of, traced_with_shapes

RESIDUAL = "on a residual stream: it is added to another layer's output"
NORMALISED = "queries and keys are normalised, so that all their dimensions count"


@dataclass(frozen=True)
class Staying:
    """Channels that no one may remove: who makes them, why they stay, and of what part of attention they are."""

    producers: tuple[str, ...]
    reason: str
    part: str = ""


@dataclass(frozen=True)
class Groups:
    """All channels of a network, in execution order: those that can be removed, and those that stay.

    `unknown` says why nothing is known of them, where the network cannot be traced.
    """

    groups: tuple[Group, ...] = ()
    staying: tuple[Staying, ...] = ()
    unknown: str = ""


def find_groups(model: nn.Module, image: Tensor) -> Groups:
    """Follow the network's channels.

    Args:
        model: in any mode; left as it is.
        image: a batch of at least 2 that the network takes; its values do not matter.

    Where torch.fx cannot trace the network, everything stays, for that reason.
    """
    try:
        graph = traced_with_shapes(model, image)
    except GraphError as error:
        made = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return Groups((), (Staying(made, str(error)),) if made else (), str(error))
    return _Following(model, graph).groups()


@dataclass
class _Channels:
    """A group as far as it is known; two that meet in a gate become one."""

    width: int
    producers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    reason: str = ""  # why it stays
    part: str = ""  # see Group, as the two that follow
    start: int = 0
    times: int = 1
    joined: _Channels | None = None

    @property
    def whole(self) -> _Channels:
        """The group that this one has become a part of."""
        return self.joined.whole if self.joined else self

    def stay(self, reason: str) -> None:
        """For the first reason that is found."""
        whole = self.whole
        whole.reason = whole.reason or reason

    def join(self, other: _Channels) -> None:
        """Become one group with another."""
        whole, part = self.whole, other.whole
        if whole is not part:
            whole.producers += part.producers
            whole.between += part.between
            whole.consumers += part.consumers
            whole.reason = whole.reason or part.reason
            part.joined = whole


@dataclass(frozen=True)
class _Lane:
    """Along which axis a value carries channels, `repeat` consecutive entries for each; all that in each head."""

    channels: _Channels
    axis: int
    repeat: int = 1
    times: int = 1


class _Following:
    """One walk through the graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.images = shape_of(next(iter(graph.nodes)))[0]
        self.lanes: dict[fx.Node, _Lane] = {}
        self.made: list[_Channels] = []
        self.modules = dict(model.named_modules())
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.owners = Counter(id(p) for m in self.modules.values() for p in m.parameters(recurse=False))

    def groups(self) -> Groups:
        """All of them, once the graph has been followed."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                self._module(node, self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._operation(node)
            elif node.op == "output":
                self._block(node, "the network's output")
        order = {str(node.target): place for place, node in enumerate(self.graph.nodes)}
        found, staying = [], []
        for channels in self.made:
            if channels.joined or not channels.producers:
                continue
            producers, between = (
                tuple(sorted(names, key=order.__getitem__)) for names in (channels.producers, channels.between)
            )
            reason = channels.reason or ("" if channels.consumers else "no layer takes its output")
            if reason:
                staying.append(Staying(producers, reason, channels.part))
            else:
                consumers = tuple(sorted(channels.consumers, key=lambda c: order[c.name]))
                where = channels.part, channels.start, channels.times
                found.append(Group(channels.width, producers, between, consumers, *where))
        found.sort(key=lambda g: (order[g.producers[0]], g.start))
        return Groups(tuple(found), tuple(staying))

    # ── one node ───────────────────────────────────────────────────────────────────────────────────────────

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name, lane = str(node.target), self._only_lane(node)
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._layer(node, name, module, lane)
        elif lane is None:
            self._block(node, f"used by {name} ({type(module).__name__})")
        elif isinstance(module, HeadMixing):
            self._heads(node, name, module, lane)
        elif self.calls[name] > 1 and any(True for _ in module.parameters()):
            lane.channels.stay(f"{name} is called more than once")
        elif channelwise.has_entries(module) and (lane.axis, lane.repeat, lane.times) == (1, 1, 1):
            self._pass(node, lane, name)
        elif channelwise.keeps_apart(module, lane.axis, len(shape_of(self._source(node)))):
            self._reshaped(node, lane)
        else:
            self._block(node, f"used by {name} ({type(module).__name__})")

    def _layer(self, node: fx.Node, name: str, module: nn.Conv2d | nn.Linear, lane: _Lane | None) -> None:
        """Takes channels up, and makes others; or, a depthwise convolution, passes them on."""
        groups = getattr(module, "groups", 1)
        axis = 1 if isinstance(module, nn.Conv2d) else len(shape_of(node)) - 1
        why = self._why_fixed(name, module)
        if groups > 1 and module.weight.shape[:2] == (groups, 1):  # depthwise
            if lane and (lane.axis, lane.repeat, lane.times) == (axis, 1, 1) and not why:
                return self._pass(node, lane, name)
            return self._block(node, why or f"used by {name} along another axis")
        if groups > 1:
            why = f"{name} is a grouped convolution"
        if lane:
            fits = lane.axis == axis and (lane.repeat == lane.times == 1 or isinstance(module, nn.Linear))
            if why or not fits:
                lane.channels.stay(why or f"used by {name} along another axis")
            lane.channels.whole.consumers.append(Consumer(name, lane.repeat, lane.times))
        if shape_of(node)[0] % self.images:
            why = why or f"{name} is not given images"
        made = _Channels(module.weight.shape[0], [name], reason=why)
        self.made.append(made)
        self.lanes[node] = _Lane(made, axis)
        return None

    def _heads(self, node: fx.Node, name: str, module: HeadMixing, lane: _Lane) -> None:
        """The outputs of one layer, divided: queries and keys end here, values go on."""
        fused, last = lane.channels.whole, len(shape_of(node)) - 1
        alone = len(fused.producers) == 1 and not fused.between and not fused.consumers
        if not alone or self.calls[name] > 1 or len(self._source(node).users) > 1:
            return self._block(node, f"used by {name} together with others")
        self.made.remove(fused)
        (producer,), heads = fused.producers, module.heads
        normalised = NORMALISED if isinstance(module, NormalisedMixing) else ""
        queries = _Channels(
            module.qk, [producer], reason=fused.reason or normalised, part=QUERIES, times=2 * heads
        )
        queries.consumers.append(Consumer(name, times=2 * heads))
        values = _Channels(module.vo, [producer], [name], reason=fused.reason, part=VALUES, times=heads)
        values.start = 2 * heads * module.qk
        self.made += [queries, values]
        self.lanes[node] = _Lane(values, last, times=heads)
        return None

    def _why_fixed(self, name: str, module: nn.Module) -> str:
        """Why the layer's shape cannot change; empty if it can."""
        if self.calls[name] > 1:
            return f"{name} is called more than once"
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return f"the weight of {name} is computed by a hook or a parametrization"
        if self.owners[id(module.weight)] > 1:
            return f"{name} shares its weight with another layer"
        return ""

    def _pass(self, node: fx.Node, lane: _Lane, member: str) -> None:
        """Channels stay apart in a module that has entries of its own for each."""
        if self.calls[member] > 1:
            lane.channels.stay(f"{member} is called more than once")
        lane.channels.whole.between.append(member)
        self.lanes[node] = lane

    def _operation(self, node: fx.Node) -> None:
        name = channelwise.name_of(node.target)
        carrying = [(n, self.lanes[n]) for n in node.all_input_nodes if n in self.lanes]
        if not carrying or (name in channelwise.ABOUT_SHAPE and shape_of(node) is None):
            return
        if shape_of(node) is None:
            self._block(node, f"used by {name}")
        elif name in channelwise.PRODUCTS or name in channelwise.SUMS:
            self._combined(node, name)
        elif len(carrying) == 1 and name in channelwise.RESHAPING and carrying[0][0] is self._source(node):
            self._reshaped(node, carrying[0][1])
        else:
            verb = "concatenated with others" if name in ("cat", "concat", "concatenate") else f"used by {name}"
            self._block(node, verb)

    def _combined(self, node: fx.Node, name: str) -> None:
        """An element-wise operation on two values: a gate joins their channels, an addition makes them stay."""
        values = [n for n in node.all_input_nodes if shape_of(n) is not None]
        shape = shape_of(node)
        lanes = [self.lanes.get(n) for n in values]
        first = next(lane for lane in lanes if lane)
        axis = first.axis + len(shape) - len(shape_of(values[lanes.index(first)]))
        for value, lane in zip(values, lanes, strict=True):
            behind, own = len(shape) - axis, shape_of(value)
            wide = len(own) >= behind and own[len(own) - behind] != 1
            if lane is None and wide:
                return self._block(node, f"combined by {name} with what is not a layer's output")
            if lane is not None and lane is not first:
                aligned = wide and lane.axis + len(shape) - len(own) == axis and lane.repeat == first.repeat
                aligned = aligned and lane.times == first.times == 1
                if not aligned:
                    return self._block(node, f"combined by {name} with channels that lie otherwise")
                if name in channelwise.SUMS:
                    first.channels.stay(RESIDUAL)
                first.channels.join(lane.channels)
        self.lanes[node] = _Lane(first.channels, axis, first.repeat, first.times)
        return None

    def _reshaped(self, node: fx.Node, lane: _Lane) -> None:
        """An operation on one value that keeps channels apart, and may move, flatten or drop other axes."""
        moved = channelwise.moved(self._described(node), shape_of(self._source(node)), shape_of(node), lane.axis)
        if moved is None or (moved.repeat > 1 and lane.repeat > 1):
            return self._block(node, f"used by {channelwise.name_of(node.target)}")
        self.lanes[node] = _Lane(lane.channels, moved.axis, lane.repeat * moved.repeat, lane.times)
        return None

    def _described(self, node: fx.Node) -> channelwise.Operation:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return channelwise.Operation("flatten" if isinstance(module, nn.Flatten) else "module", (), {})
        return channelwise.Operation(channelwise.name_of(node.target), node.args[1:], node.kwargs)

    # ── what they share ────────────────────────────────────────────────────────────────────────────────────

    def _source(self, node: fx.Node) -> fx.Node:
        return node.all_input_nodes[0]

    def _only_lane(self, node: fx.Node) -> _Lane | None:
        """Of the one value that a module is given; what mixes tokens is given a bias, too, which has none."""
        alone = len(node.all_input_nodes) == 1 or isinstance(self.modules[str(node.target)], HeadMixing)
        return self.lanes.get(self._source(node)) if alone else None

    def _block(self, node: fx.Node, reason: str) -> None:
        """All channels that come here stay."""
        for source in node.all_input_nodes:
            if source in self.lanes:
                self.lanes[source].channels.stay(reason)
