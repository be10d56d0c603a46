"""Self-attention taken apart: two linear layers, and between them what mixes the tokens.

Networks compute attention in modules that hide their linear layers, or have the number of dimensions of a head
written into them. Those that are known here can be replaced by one of `head_attention`, which computes the same
from `qkv`, `mix` and `proj`, and in which queries and keys may have other dimensions than values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dist_prune.network.head_attention import (
    HeadAttention,
    HeadMixing,
    MapHeadAttention,
    MultiheadHeadAttention,
    NormalisedMixing,
    PositionNetwork,
    PositionTable,
    ScaledUnitNorm,
    UnitNorm,
    WindowHeadAttention,
)
from dist_prune.network.layers import has_hooks
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Site, describe, evaluating, matches
from dist_prune.network.trial import StandInTrial, answer_of, tolerance_of


@dataclass(frozen=True)
class Opened:
    """A network whose attention was taken apart, with the names of the modules; `closed` are others, and why."""

    network: nn.Module
    names: tuple[str, ...]
    closed: Mapping[str, str]


def opened(model: nn.Module, image: Tensor, patterns: str = "*") -> Opened:
    """Take apart all attention that is known here and computes the same afterwards.

    Args:
        model: left as it is; the other network has the same parameters, biases of queries, keys and values joined.
        image: (1, …) that it takes.
        patterns: which layers may change, see `sites.matches`; attention with none of them stays as it is.
    """
    found, closed = dict[str, HeadAttention](), dict[str, str]()
    for name, module in model.named_modules():
        if not name or not _looks_like_attention(module):
            continue
        if reason := _why_closed(module):
            closed[name] = reason
        else:
            new = _open(module)
            if any(matches(site, patterns) for site in _sites(name, new)):
                found[name] = new
    closed |= _differing(model, image, found)
    names = tuple(name for name in found if name not in closed)
    return Opened(opened_as(model, names) if names else model, names, closed)


def opened_as(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The network with these modules taken apart, sharing all parameters; those that are so already stay.

    Raises:
        AttributeError: the network has no such module, or it is no attention that is known here.
    """
    found = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, HeadAttention):
            if not _looks_like_attention(module) or (reason := _why_closed(module)):
                what = reason or "expected attention: nn.MultiheadAttention, or a module with `qkv` and `proj`"
                raise AttributeError(f"{name} is a {type(module).__name__}; {what}")
            found[name] = _open(module)
    return with_replaced(model, found.items(), [*model.parameters(), *model.buffers()]) if found else model


def opened_in(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that are taken apart."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, HeadAttention))


# ── what is known ──────────────────────────────────────────────────────────────────────────────────────────


def _differing(model: nn.Module, image: Tensor, found: Mapping[str, HeadAttention]) -> dict[str, str]:
    """Which of these do not compute what their modules do on what the network gives them, or change its answer."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:  # noqa: ANN401
            calls[name] = args, kwargs, _first_of(answer)

        return hook

    with ExitStack() as stack, evaluating(model):
        for name in found:
            hook = model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
            stack.callback(hook.remove)
        answer = answer_of(model, image)
    reasons = {name: "its forward never runs" for name in found if name not in calls}
    with evaluating(model):
        for name, (args, kwargs, expected) in calls.items():
            if reason := _difference(found[name], args, kwargs, expected):
                reasons[name] = reason
        alike = {name: module for name, module in found.items() if name not in reasons}
        return reasons | StandInTrial(model, image, answer, tolerance_of([answer])).altering(alike)


def _difference(new: HeadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor) -> str:
    try:
        found = _first_of(new(*args, **kwargs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a norm raises that is not of a head
        return str(error)
    off = (found - expected).double().norm() if found.shape == expected.shape else torch.inf
    return "" if off <= tolerance_of([expected]) * expected.double().norm() else "it computes something else"


def _first_of(answer: Any) -> Tensor:  # noqa: ANN401
    """The tokens, of what attention returns with or without weights."""
    tokens: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return tokens


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    fused = isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(
        getattr(module, "proj", None), nn.Linear
    )
    return fused and isinstance(getattr(module, "num_heads", None), int) and not isinstance(module, HeadAttention)


def _why_closed(module: nn.Module) -> str:
    """Why attention cannot be taken apart, as far as its structure says; empty if it can."""
    if has_hooks(module):
        return "it has hooks of yours, which would be lost: remove them first"
    if isinstance(module, nn.MultiheadAttention):
        reasons = {
            "keys and values are of other sizes than queries": not module._qkv_same_embed_dim,
            "it adds tokens of its own": module.bias_k is not None or module.add_zero_attn,
            "hooks make its weights": not isinstance(module._parameters.get("in_proj_weight"), nn.Parameter),
        }
    else:
        qkv, proj = module.qkv, module.proj
        assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
        inner = proj.in_features
        reasons = {
            "its layers are no plain nn.Linear": type(qkv) is not nn.Linear or type(proj) is not nn.Linear,
            "queries, keys and values are of different sizes": qkv.out_features != 3 * inner,
            "its heads are of different sizes": bool(inner % _heads(module)),
            "it has parameters besides those of qkv and proj": _others(module),
        }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _norms(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Of the queries and the keys of a head, as by timm's `qk_norm` and in Swin V2, where there are some."""
    if isinstance(scale := module._parameters.get("logit_scale"), nn.Parameter):
        return ScaledUnitNorm(scale), UnitNorm()
    first, second = (getattr(module, name, nn.Identity()) for name in ("q_norm", "k_norm"))
    known = isinstance(first, nn.Module) and isinstance(second, nn.Module)
    return (first, second) if known and not (type(first) is type(second) is nn.Identity) else None


def _heads(module: nn.Module) -> int:
    heads = module.num_heads
    assert isinstance(heads, int)
    return heads


def _others(module: nn.Module) -> bool:
    """Whether it has parameters or buffers that are not known: other norms, gates, other biases of positions."""
    parts = [module.qkv, module.proj, *(_norms(module) or ()), *filter(None, [_positions(module)])]
    known = [tensor for each in parts for tensor in (*each.parameters(), *each.buffers())]
    ids = {id(tensor) for tensor in (*known, *_biases(module))}
    return any(id(tensor) not in ids for tensor in (*module.parameters(), *module.buffers()))


def _biases(module: nn.Module) -> list[Tensor]:
    """Of queries, keys and values, in attention that keeps them beside `qkv`; empty if it does not."""
    found = [getattr(module, f"{part}_bias", None) for part in "qkv"]
    biases = [bias for bias in found if isinstance(bias, Tensor)]
    return biases if len(biases) == 3 and module.get_submodule("qkv").bias is None else []


def _positions(module: nn.Module) -> PositionTable | PositionNetwork | None:
    """What makes the bias of relative positions, in attention that has one for each pair of tokens."""
    index, coordinates = (module._buffers.get(f"relative_{name}") for name in ("position_index", "coords_table"))
    if index is None or math.isqrt(index.numel()) ** 2 != index.numel():
        return None
    saved = "relative_position_index" not in module._non_persistent_buffers_set
    if coordinates is not None and isinstance(network := getattr(module, "cpb_mlp", None), nn.Module):
        return PositionNetwork(network, coordinates, index, saved)
    table = module._parameters.get("relative_position_bias_table")
    return None if table is None or table.dim() != 2 else PositionTable(table, index, saved)


def _open(module: nn.Module) -> HeadAttention:
    new = _open_multihead(module) if isinstance(module, nn.MultiheadAttention) else _open_fused(module)
    return new.train(module.training)


def _open_multihead(module: nn.MultiheadAttention) -> HeadAttention:
    size = module.head_dim
    mix = HeadMixing(module.num_heads, size, size, size**-0.5, module.dropout)
    qkv = _linear(module.in_proj_weight, module.in_proj_bias)
    proj = _linear(module.out_proj.weight, module.out_proj.bias)
    return MultiheadHeadAttention(qkv, mix, proj, module.batch_first)


def _open_fused(module: nn.Module) -> HeadAttention:
    """Queries, keys and values from one layer; among all tokens, those of a window, or of windows of a map."""
    heads, qkv, proj = _heads(module), module.qkv, module.proj
    assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
    if biases := _biases(module):
        qkv = _linear(qkv.weight, nn.Parameter(torch.cat(biases).detach(), biases[0].requires_grad))
    size = proj.in_features // heads
    dropout, last = (
        _probability(module, "attn_drop", "attention_dropout"),
        _probability(module, "proj_drop", "dropout"),
    )
    scale = 1.0 if hasattr(module, "logit_scale") else float(getattr(module, "scale", size**-0.5))
    mix = HeadMixing(heads, size, size, scale, dropout)
    if norms := _norms(module):
        mix = NormalisedMixing(mix, *norms)
    positions = _positions(module)
    if positions is None:
        return HeadAttention(qkv, mix, proj, last)
    if isinstance(module, ShiftedWindowAttention):
        return MapHeadAttention(qkv, mix, proj, last, positions, module.window_size, module.shift_size)
    return WindowHeadAttention(qkv, mix, proj, last, positions)


def _sites(name: str, new: HeadAttention) -> Iterator[Site]:
    """The layers that it has once it is taken apart."""
    for part, layer in new.named_children():
        if isinstance(layer, nn.Linear):
            yield describe(f"{name}.{part}", layer)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these very parameters."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer._parameters = {"weight": weight, "bias": bias}  # type: ignore[dict-item]
    return layer


def _probability(module: nn.Module, *names: str) -> float:
    """Of a dropout that has one of these names, a module or a number."""
    found = next((getattr(module, name) for name in names if hasattr(module, name)), 0.0)
    if isinstance(found, nn.Dropout):
        return float(found.p)
    return float(found) if isinstance(found, float | int) else 0.0
