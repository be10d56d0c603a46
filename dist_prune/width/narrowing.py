"""Channels taken out of a network: its layers made narrower, and their consumers solved for what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dist_prune.config.flags import did_you_mean
from dist_prune.factorization.plan import PlanError
from dist_prune.network.channels import QUERIES, Consumer, Group, KeptChannels
from dist_prune.network.head_attention import HeadMixing, NormalisedMixing
from dist_prune.network.padding import plain
from dist_prune.network.replacing import with_replaced
from dist_prune.width.elimination import Prediction
from dist_prune.width.moments import channel_weights

_ENTRIES = ("weight", "bias", "running_mean", "running_var")  # of a module that has one for each channel


def narrowed(
    model: nn.Module,
    kept: Iterable[KeptChannels],
    predictions: Mapping[str, Prediction] | None = None,
    shared: bool = False,
) -> nn.Module:
    """A copy of the network without the other channels. Every consumer of a narrowed group has a bias.

    Args:
        model: the dense network.
        kept: of all groups that become narrower.
        predictions: consumer's name → how what it loses follows from what it keeps: its weights and its bias take
            that up. Without, the values of all that is left stay as they are.
        shared: whether modules that do not change are the dense network's own, for a network to look at only.
    """
    kept = tuple(kept)
    changed: dict[str, nn.Module] = {}

    def own(name: str) -> nn.Module:
        if name not in changed:
            changed[name] = plain(copy.deepcopy(model.get_submodule(name)))
        return changed[name]

    for each in kept:
        for consumer in each.group.solved:
            _give_bias(own(consumer.name))
            if predictions is not None:
                _take_up(own(consumer.name), consumer, each, predictions[consumer.name])
    for name, index in kept_outputs(model, kept).items():
        _keep_outputs(own(name), index)
    for each in kept:
        index = torch.tensor(each.channels)
        for name in each.group.between:
            _keep_entries(own(name), index)
        for consumer in each.group.consumers:
            _keep_inputs(own(consumer.name), consumer.inputs(each.group.width, each.channels), len(index))
    return with_replaced(model, changed.items(), _without_any(model, changed) if shared else [])


def _without_any(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that hold none of these and are none of them."""
    modules = list(model.named_modules(remove_duplicate=False))
    above = {".".join(parts[:end]) for parts in (n.split(".") for n in names) for end in range(len(parts) + 1)}
    around = {id(module) for name, module in modules if name in above}
    return [module for _, module in modules if id(module) not in around]


def kept_outputs(model: nn.Module, kept: Iterable[KeptChannels]) -> dict[str, Tensor]:
    """Which outputs stay, ascending, of all layers that make channels of these groups, perhaps of several."""
    stays: dict[str, Tensor] = {}
    for each in kept:
        gone = sorted({*range(each.group.width)} - {*each.channels})
        for name in each.group.producers:
            every = torch.ones(len(model.get_submodule(name).get_parameter("weight")), dtype=torch.bool)
            stays.setdefault(name, every)[each.group.outputs(gone)] = False
    return {name: mask.nonzero()[:, 0] for name, mask in stays.items()}


def require_channels(model: nn.Module, kept: Iterable[KeptChannels]) -> None:
    """Refuse groups of channels that are not those of this network.

    Raises:
        PlanError: a layer that it has not, of another width, or channels that are not among the group's.
    """
    modules = dict(model.named_modules())
    for each in kept:
        group, channels = each.group, each.channels
        for name in group.members:
            if name not in modules:
                raise PlanError(
                    f"the network has no layer {name}; {did_you_mean(name, modules, 'see named_modules()')}"
                )
        if not channels or list(channels) != sorted({*channels} & {*range(group.width)}):
            raise PlanError(f"channels kept of {group.name}: expected some of 0 to {group.width - 1}, ascending")
        for name, heads in _heads_of(modules, group):
            if heads != group.heads:
                raise PlanError(f"{name} has {heads} heads here; the plan is of a network with {group.heads}")
        normalised = [
            n for n in group.members if group.part == QUERIES and isinstance(modules[n], NormalisedMixing)
        ]
        if normalised:
            raise PlanError(
                f"{normalised[0]} normalises queries and keys here, of which the plan removes dimensions"
            )
        for name, width in _widths_of(modules, group):
            if width != group.width:
                raise PlanError(f"{name} has {width} channels here; the plan is of a network with {group.width}")


def _heads_of(modules: Mapping[str, nn.Module], group: Group) -> Iterator[tuple[str, int]]:
    """Of what mixes the tokens, where the group is of attention."""
    for name in group.members if group.part else ():
        if isinstance(module := modules[name], HeadMixing):
            yield name, module.heads


def _widths_of(modules: Mapping[str, nn.Module], group: Group) -> Iterator[tuple[str, int]]:
    """Of all layers of a group, the channels that they make or take of it."""
    for name in (*(group.producers if not group.part else ()), *group.between):
        weight = getattr(modules[name], "weight", None)
        yield name, len(weight) if isinstance(weight, Tensor) else _dimensions(modules[name], group)
    for consumer in group.consumers:
        module, inputs = modules[consumer.name], consumer.repeat * consumer.times
        weight = getattr(module, "weight", None)
        wide = weight.shape[1] // inputs if isinstance(weight, Tensor) else _dimensions(module, group)
        yield consumer.name, wide


def _dimensions(module: nn.Module, group: Group) -> int:
    """Of what has no weights: those of a head, or, of operations that keep channels apart, any."""
    if not group.part:
        return group.width
    if not isinstance(module, HeadMixing):
        return 0
    return module.qk if group.part == QUERIES else module.vo


def _give_bias(module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if module.bias is None:
        module.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)


@torch.no_grad()
def _take_up(module: nn.Module, consumer: Consumer, kept: KeptChannels, found: Prediction) -> None:
    """Weights W P in the columns of the channels kept; what is constant in the others goes to the bias."""
    weight = channel_weights(module, consumer)
    solved = torch.einsum("ocs,ck->oks", weight.double(), found.weights)
    offset = torch.einsum("ocs,c->o", weight.double(), found.offset)
    weight[:, consumer.channels(kept.group.width, kept.channels)] = solved.to(weight.dtype)
    assert isinstance(module.bias, Tensor)
    module.bias += offset


def _keep_outputs(module: nn.Module, index: Tensor) -> None:
    _keep_entries(module, index, ("weight", "bias"))


def _keep_entries(module: nn.Module, index: Tensor, names: Sequence[str] = _ENTRIES) -> None:
    """The first dimension of all that has one, and the numbers that say how long it is."""
    if isinstance(module, HeadMixing):
        module.vo = len(index)
    for name in names:
        _select(module, name, 0, index)
    for name in ("out_channels", "out_features", "num_features", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, len(index))
    if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise
        module.in_channels = module.groups = len(index)


def _keep_inputs(module: nn.Module, index: Tensor, width: int) -> None:
    if isinstance(module, HeadMixing):
        module.qk = width
    _select(module, "weight", 1, index)
    for name in ("in_channels", "in_features"):
        if hasattr(module, name):
            setattr(module, name, len(index))


def _select(module: nn.Module, name: str, dimension: int, index: Tensor) -> None:
    tensor = getattr(module, name, None)
    if isinstance(tensor, Tensor):
        part = tensor.detach().index_select(dimension, index.to(tensor.device))
        setattr(
            module, name, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
        )
