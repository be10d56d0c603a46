"""What a network costs at every width of its groups: exact, without building it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_prune.network.sites import evaluating
from dist_prune.width.groups import Group

Widths = Sequence[int]  # one of each group


@dataclass(frozen=True)
class _Side:
    """Outputs or inputs of a layer: `size` of them, or `repeat` for each channel of a group."""

    size: int
    group: int | None = None
    repeat: int = 1

    def at(self, widths: Widths) -> int:
        return self.size if self.group is None else widths[self.group] * self.repeat


@dataclass(frozen=True)
class _Layer:
    """A layer that some group makes narrower: it costs `unit` for each output and input."""

    unit: int
    outputs: _Side
    inputs: _Side


@dataclass(frozen=True)
class WidthCosts:
    """Multiply-adds of one image, as a function of the widths of all groups.

    A layer between two groups costs the product of their widths; all else is fixed.
    """

    layers: tuple[_Layer, ...]
    full: tuple[int, ...]
    total: int

    def macs(self, widths: Widths) -> int:
        """Of the whole network."""
        return self.total + self._narrow(widths) - self._narrow(self.full)

    def _narrow(self, widths: Widths) -> int:
        return sum(layer.unit * layer.outputs.at(widths) * layer.inputs.at(widths) for layer in self.layers)

    def per_channel(self, widths: Widths) -> list[int]:
        """What one channel more of each group costs, all other widths as they are."""
        slopes = [0] * len(self.full)
        for layer in self.layers:
            for side, other in ((layer.outputs, layer.inputs), (layer.inputs, layer.outputs)):
                if side.group is not None:
                    slopes[side.group] += layer.unit * side.repeat * other.at(widths)
        return slopes


def width_costs(model: nn.Module, groups: Sequence[Group], image: Tensor) -> WidthCosts:
    """Run one image through the network and count.

    Args:
        model: the dense network; left as it is.
        groups: of the network.
        image: (1, …), on the network's device.
    """
    made = {n: place for place, g in enumerate(groups) for n in (*g.producers, *g.between)}
    taken = {c.name: (place, c) for place, g in enumerate(groups) for c in g.consumers}
    modules = {
        n: m for n, m in model.named_modules() if n in {*made, *taken} and isinstance(m, nn.Conv2d | nn.Linear)
    }
    values: Counter[str] = Counter()

    def count(name: str, _module: nn.Module, _inputs: object, y: Tensor) -> None:
        values[name] += y.numel()

    hooks = [module.register_forward_hook(partial(count, name)) for name, module in modules.items()]
    try:
        with evaluating(model), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for name, module in modules.items():
        outputs, inputs = module.weight.shape[:2]
        unit = values[name] // outputs * module.weight[0, 0].numel()
        sides = [_Side(outputs, made.get(name)), _Side(inputs)]
        if name in taken:
            place, consumer = taken[name]
            sides[1] = _Side(inputs, place, consumer.repeat)
        layers.append(_Layer(unit, *sides))
    full = tuple(group.width for group in groups)
    return WidthCosts(tuple(layers), full, counter.get_total_flops() // 2)
