"""Which layers of a network can be factored at all, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from dist_prune.network.errors import ModelError
from dist_prune.network.padded import PaddedConv2d

LAYERS = (nn.Conv2d, PaddedConv2d, nn.Linear)  # that compute what their kind says
UNKNOWN = (_ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, of one that was compiled or made parallel.

    Raises:
        ModelError: it has no layers that could be replaced.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {type(model).__name__}; expected the torch.nn.Module that it was made of")
    while type(model).__name__ == "OptimizedModule" or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    require_layers(model)
    return model


def require_layers(model: nn.Module) -> None:
    """Refuse what has no layers to replace, and say what to give instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the network is TorchScript, whose layers cannot be replaced: give the nn.Module it was made of"
        )
    if "eval" in vars(model):  # torch.export forbids it so
        raise ModelError(
            "the network is an exported program: its layers are gone; give the nn.Module it was made of"
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ModelError(f"{lazy[0]} has no shape yet: run the network on a batch before, as lazy layers want it")
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to compress")


def why_dense(module: nn.Conv2d | nn.Linear, owners: Mapping[int, int]) -> str:
    """Why a module cannot be a site, whatever it is given; empty if it can.

    Args:
        module: with no hooks but its user's own.
        owners: how many modules have each parameter, by identity.
    """
    if type(module) not in LAYERS:
        own = f"{type(module).__name__} computes its output in its own way"
        way = ", not as a plain Conv2d behind padding: where it could, write it as one"
        return own + (way if isinstance(module, nn.Conv2d) else "")
    weight = module._parameters.get("weight")
    if weight is None:
        return "hooks make its weight: make it permanent first, as prune.remove and remove_weight_norm do"
    groups = getattr(module, "groups", 1)
    reasons = {
        "it has hooks of yours, which would be lost: remove them first": has_hooks(module),
        "shares its weight with another layer": owners[id(weight)] > 1,
        "depthwise: each group has one input channel": 1 < groups == getattr(module, "in_channels", 0),
        "one output channel per group": weight.shape[0] == groups,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
