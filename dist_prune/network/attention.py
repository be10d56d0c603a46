"""Self-attention taken apart: two linear layers, and between them what mixes the tokens.

Networks compute attention in modules that hide their linear layers, or have the number of dimensions of a head
written into them. Those that are known here can be replaced by one that computes the same from `qkv`, `mix` and
`proj`, and in which queries and keys may have other dimensions than values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.network.layers import has_hooks
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Site, describe, evaluating, matches
from dist_prune.network.trial import StandInTrial, answer_of, tolerance_of


class HeadMixing(nn.Module):
    """softmax(QKᵀ · scale) V for each head: (…, tokens, heads · (2 qk + vo)) → (…, tokens, heads · vo).

    The input holds the queries of all heads, then their keys, then their values. The scale stays that of the
    dense network, whatever the dimensions.
    """

    def __init__(self, heads: int, qk: int, vo: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.qk, self.vo = heads, qk, vo
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        sizes = [self.heads * size for size in (self.qk, self.qk, self.vo)]
        parts = (torch.unflatten(part, -1, (self.heads, -1)) for part in torch.split(x, sizes, -1))
        queries, keys, values = (part.transpose(-2, -3) for part in parts)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, None, dropout, scale=self.scale)
        return mixed.transpose(-2, -3).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.heads}, qk={self.qk}, vo={self.vo}, scale={self.scale:.4g}"


class HeadAttention(nn.Module):
    """Attention of tokens (images, tokens, channels) among themselves, without a mask."""

    def __init__(self, qkv: nn.Module, mix: HeadMixing, proj: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.mix, self.proj, self.drop = qkv, mix, proj, nn.Dropout(dropout)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """The tokens mixed, (images, tokens, channels).

        Raises:
            ValueError: a mask, or causal attention.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention whose heads were compressed takes no mask: expected attn_mask=None")
        mixed: Tensor = self.drop(self.proj(self.mix(self.qkv(x))))
        return mixed


class MultiheadHeadAttention(HeadAttention):
    """The same, called as nn.MultiheadAttention is; returns no weights."""

    in_proj_bias = None  # with which nn.TransformerEncoderLayer does not read the weights by itself

    def __init__(self, qkv: nn.Module, mix: HeadMixing, proj: nn.Module, batch_first: bool) -> None:
        super().__init__(qkv, mix, proj)
        self.batch_first = batch_first

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: None = None,
        need_weights: bool = True,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """The tokens mixed, and None for the weights.

        Keys and values are not looked at: that they are the queries was seen when the module was taken apart.

        Raises:
            ValueError: a mask, or causal attention.
        """
        if key_padding_mask is not None:
            raise ValueError("attention whose heads were compressed takes no mask: expected key_padding_mask=None")
        if self.batch_first:
            return super().forward(query, attn_mask, is_causal), None
        return super().forward(query.transpose(0, 1), attn_mask, is_causal).transpose(0, 1), None


@dataclass(frozen=True)
class Opened:
    """A network whose attention was taken apart, with the names of the modules; `closed` are others, and why."""

    network: nn.Module
    names: tuple[str, ...]
    closed: Mapping[str, str]


def opened(model: nn.Module, image: Tensor, patterns: str = "*") -> Opened:
    """Take apart all attention that is known here and computes the same afterwards.

    Args:
        model: left as it is; the other network has the same parameters.
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
                raise AttributeError(f"{name}: a {type(module).__name__}, {reason or 'expected attention'}")
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
    except (TypeError, ValueError) as error:
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
            "it has parameters besides those of qkv and proj": _others(module, qkv, proj),
        }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _heads(module: nn.Module) -> int:
    heads = module.num_heads
    assert isinstance(heads, int)
    return heads


def _others(module: nn.Module, *known: nn.Module) -> bool:
    """Whether it has further parameters or buffers: norms, gates, biases of positions."""
    tensors = {id(tensor) for each in known for tensor in each.parameters()}
    return any(id(tensor) not in tensors for tensor in [*module.parameters(), *module.buffers()])


def _open(module: nn.Module) -> HeadAttention:
    if isinstance(module, nn.MultiheadAttention):
        size = module.head_dim
        mix = HeadMixing(module.num_heads, size, size, size**-0.5, module.dropout)
        qkv = _linear(module.in_proj_weight, module.in_proj_bias)
        proj = _linear(module.out_proj.weight, module.out_proj.bias)
        new: HeadAttention = MultiheadHeadAttention(qkv, mix, proj, module.batch_first)
    else:
        heads, output = _heads(module), module.get_submodule("proj")
        assert isinstance(output, nn.Linear)
        size = output.in_features // heads
        scale = getattr(module, "scale", size**-0.5)
        mix = HeadMixing(heads, size, size, float(scale), _probability(module, "attn_drop"))
        new = HeadAttention(module.get_submodule("qkv"), mix, output, _probability(module, "proj_drop"))
    return new.train(module.training)


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


def _probability(module: nn.Module, name: str) -> float:
    """Of a dropout."""
    dropout = getattr(module, name, None)
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
