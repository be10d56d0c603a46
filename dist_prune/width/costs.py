"""What a network costs at every width of its groups and in every form of its layers: exact, none is built."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import Tensor, nn

from dist_prune.factorization.forms import FORMS, Ranks
from dist_prune.factorization.knapsack import Floats, Ints
from dist_prune.network.channels import Group
from dist_prune.network.head_attention import HeadMixing
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.sites import Site, evaluating

Total = int | Ints  # an array where several widths are compared
Widths = Sequence[Total]  # one of each group
Part = tuple[int, int, int]  # of a layer's side: which group, how wide, and how many entries each channel has
DENSE = -1  # the option to leave a layer as it is


@dataclass(frozen=True, eq=False)
class Forms:
    """What a layer can become besides a dense one: (n,) losses, and costs that are linear in its widths."""

    losses: Floats
    per_input: Ints
    per_output: Ints
    fixed: Ints


@dataclass(frozen=True)
class _Side:
    """Outputs or inputs of a layer: `fixed` of them, and for each channel of some groups as many as are said."""

    fixed: int
    per_channel: tuple[tuple[int, int], ...] = ()  # (group, entries)

    def at(self, widths: Widths) -> Total:
        total: Total = self.fixed
        for group, many in self.per_channel:
            total = total + widths[group] * many
        return total

    @property
    def groups(self) -> set[int]:
        return {group for group, _ in self.per_channel}


@dataclass(frozen=True)
class LayerCosts:
    """A layer that costs `unit` for each output and input, and `each` for each output; or is in one of `forms`."""

    outputs: _Side
    inputs: _Side
    unit: int
    each: int = 0
    forms: Forms | None = None

    def cost(self, widths: Widths, option: int = DENSE) -> Total:
        """Left dense, or in that form."""
        outputs, inputs = self.outputs.at(widths), self.inputs.at(widths)
        if option == DENSE or self.forms is None:
            return (self.unit * inputs + self.each) * outputs
        forms = self.forms
        first, last = int(forms.per_input[option]), int(forms.per_output[option])
        return first * inputs + last * outputs + int(forms.fixed[option])

    def values(self, widths: Widths, price: float) -> Floats:
        """Loss + price · cost of each option, the dense layer last, (n + 1,), or (m, n + 1) at m widths."""
        dense = price * np.asarray(self.cost(widths), np.float64)[..., None]
        if self.forms is None:
            return dense
        outputs, inputs = (np.asarray(side.at(widths))[..., None] for side in (self.outputs, self.inputs))
        costs = self.forms.per_input * inputs + self.forms.per_output * outputs + self.forms.fixed
        options = self.forms.losses + price * costs
        return np.concatenate([options, np.broadcast_to(dense, (*options.shape[:-1], 1))], -1)

    def best(self, widths: Sequence[int], price: float) -> int:
        """The option of least loss + price · cost."""
        option = int(self.values(widths, price).argmin())
        return DENSE if self.forms is None or option == len(self.forms.losses) else option


@dataclass(frozen=True)
class WidthCosts:
    """Multiply-adds of one image, or parameters, as a function of the widths of all groups and of layers' forms.

    A layer between two groups costs the product of their widths; what is in none of `layers` is `fixed`.
    """

    layers: tuple[LayerCosts, ...]
    full: tuple[int, ...]
    fixed: int
    total: int

    def at(self, widths: Sequence[int], options: Sequence[int] | None = None) -> int:
        """Of the whole network; without `options` all layers are dense."""
        chosen = options or [DENSE] * len(self.layers)
        return self.fixed + sum(int(layer.cost(widths, o)) for layer, o in zip(self.layers, chosen, strict=True))

    def more(self, widths: Sequence[int], place: int, width: int, options: Sequence[int]) -> int:
        """What it costs more if one group gets another width."""
        wider = (*widths[:place], width, *widths[place + 1 :])
        layers = [(self.layers[each], options[each]) for each in self.changing[place]]
        return sum(int(layer.cost(wider, o)) - int(layer.cost(widths, o)) for layer, o in layers)

    @cached_property
    def changing(self) -> tuple[tuple[int, ...], ...]:
        """For each group, the places of the layers that its width changes."""
        touched = [layer.outputs.groups | layer.inputs.groups for layer in self.layers]
        return tuple(
            tuple(each for each, groups in enumerate(touched) if place in groups)
            for place in range(len(self.full))
        )

    @cached_property
    def of_group(self) -> tuple[tuple[LayerCosts, ...], ...]:
        """For each group, the layers that its width changes."""
        return tuple(tuple(self.layers[each] for each in places) for places in self.changing)


def width_costs(
    model: nn.Module,
    groups: Sequence[Group],
    image: Tensor,
    of: str = "macs",
    forms: Mapping[str, Forms] | None = None,
) -> WidthCosts:
    """Run one image through the network and count.

    Args:
        model: the dense network; left as it is.
        groups: of the network.
        image: (1, …), on the network's device.
        of: `macs` or `params`.
        forms: layer's name → what it can become.
    """
    forms = forms or {}
    made: defaultdict[str, list[Part]] = defaultdict(list)
    taken: defaultdict[str, list[Part]] = defaultdict(list)
    for place, group in enumerate(groups):
        for name in (*group.producers, *group.between):
            made[name].append((place, group.width, group.times))
        for consumer in group.consumers:
            taken[consumer.name].append((place, group.width, consumer.repeat * consumer.times))
    modules = {n: m for n, m in model.named_modules() if n in {*made, *taken, *forms}}
    values, macs = _counted(model, modules, image)
    layers = [_layer(module, values[n], made[n], taken[n], of, forms.get(n)) for n, module in modules.items()]
    full = tuple(group.width for group in groups)
    now = sum(int(layer.cost(full)) for layer in layers)
    if of == "macs":
        return WidthCosts(tuple(layers), full, macs - now, macs)
    params = sum(p.numel() for p in model.parameters())
    solved = {consumer.name for group in groups for consumer in group.solved}
    given = sum(len(modules[n].weight) for n in solved if modules[n].bias is None)  # a consumer gets a bias
    return WidthCosts(tuple(layers), full, params + given - now, params)


def _layer(
    module: nn.Module,
    values: int,
    made: Sequence[Part],
    taken: Sequence[Part],
    of: str,
    forms: Forms | None,
) -> LayerCosts:
    if isinstance(module, HeadMixing):  # each head's queries by keys, and that by its values
        dims = tuple((place, module.heads) for place, _, _ in (*made, *taken))
        fixed = module.heads * (module.qk + module.vo - sum(width for _, width, _ in (*made, *taken)))
        return LayerCosts(_Side(fixed, dims), _Side(1), values if of == "macs" else 0)
    if not isinstance(module, nn.Conv2d | nn.Linear):  # batch norm and the like: entries alone
        entries = sum(p.numel() // len(p) for p in module.parameters())
        return LayerCosts(_side(0, made), _Side(0), 0, entries if of == "params" else 0)
    outputs, inputs = module.weight.shape[:2]
    area = module.weight[0, 0].numel()
    sides = _side(outputs, made), _side(inputs, taken)
    if of == "macs":
        return LayerCosts(*sides, values // outputs * area, 0, forms)
    biased = module.bias is not None or bool(taken)
    return LayerCosts(*sides, area, int(biased), forms)


def _side(size: int, parts: Sequence[Part]) -> _Side:
    """Of so many entries, of which groups have some."""
    theirs = sum(width * many for _, width, many in parts)
    return _Side(max(0, size - theirs), tuple((place, many) for place, _, many in parts))


def _counted(model: nn.Module, modules: Mapping[str, nn.Module], image: Tensor) -> tuple[Counter[str], int]:
    """How many values each module gives, or pairs of tokens it compares, and the multiply-adds of the whole."""
    values: Counter[str] = Counter()

    def count(name: str, module: nn.Module, _inputs: object, y: Tensor) -> None:
        values[name] += y.numel() // y.shape[-1] * y.shape[-2] if isinstance(module, HeadMixing) else y.numel()

    hooks = [module.register_forward_hook(partial(count, name)) for name, module in modules.items()]
    try:
        with evaluating(model), MultiplyAdds() as counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return values, counter.total


def forms_of(site: Site, options: Sequence[tuple[str, Ranks]], losses: Floats, of: str) -> Forms:
    """A layer's forms.

    Args:
        site: the dense layer.
        options: forms with ranks.
        losses: of each.
        of: `macs` or `params`.
    """
    rows = []
    for name, ranks in options:
        form = FORMS[name]
        parts = form.layer_macs(site, ranks) if of == "macs" else form.weights(site, ranks)
        bias = int(of == "params")  # the last layer has one
        rows.append((parts[0] // site.channels, parts[-1] // site.outputs + bias, sum(parts[1:-1])))
    per_input, per_output, fixed = np.array(rows, np.int64).reshape(-1, 3).T
    return Forms(losses, per_input, per_output, fixed)
