"""Self-attention as `qkv`, `mix` and `proj`, in which queries and keys may have other dimensions than values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Size = Sequence[int]  # height and width


class HeadMixing(nn.Module):
    """softmax(QKᵀ · scale + bias) V for each head: (…, tokens, heads · (2 qk + vo)) → (…, tokens, heads · vo).

    The input holds the queries of all heads, then their keys, then their values. The scale stays that of the
    dense network, whatever the dimensions.
    """

    def __init__(self, heads: int, qk: int, vo: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.qk, self.vo = heads, qk, vo
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See the class; the bias is broadcast to (…, heads, tokens, tokens)."""
        sizes = [self.heads * size for size in (self.qk, self.qk, self.vo)]
        parts = (torch.unflatten(part, -1, (self.heads, -1)) for part in torch.split(x, sizes, -1))
        queries, keys, values = (part.transpose(-2, -3) for part in parts)
        queries, keys = self.compared(queries, keys)
        if self._padding_is_faster(x):
            queries, keys, values = (_filled(part, max(self.qk, self.vo)) for part in (queries, keys, values))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, bias, dropout, scale=self.scale)
        mixed = mixed[..., : self.vo]
        # A copy even where it is contiguous: ONNX's exporter replaces the operation by one of another layout.
        return mixed.transpose(-2, -3).clone(memory_format=torch.contiguous_format).flatten(-2)

    def compared(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared of them, (…, heads, tokens, qk) each."""
        return queries, keys

    def _padding_is_faster(self, x: Tensor) -> bool:
        """Whether zeros should make queries and values of one size, for which alone CPUs have a fused kernel.

        Zeros add nothing to logits; those of values are cut off. It is a fast path, as nn.MultiheadAttention has
        one: counting multiply-adds switches it off, and exporters write down what has to be computed.
        """
        fast = torch.backends.mha.get_fastpath_enabled() and not torch.compiler.is_exporting()
        return self.qk != self.vo and x.device.type == "cpu" and fast

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.heads}, qk={self.qk}, vo={self.vo}, scale={self.scale:.4g}"


class NormalisedMixing(HeadMixing):
    """The same of queries and keys that each go through a norm, which needs all of their dimensions."""

    def __init__(self, plain: HeadMixing, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__(plain.heads, plain.qk, plain.vo, plain.scale, plain.dropout)
        self.q_norm, self.k_norm = q_norm, k_norm

    def compared(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised over the dimensions of a head."""
        return self.q_norm(queries), self.k_norm(keys)


class UnitNorm(nn.Module):
    """Vectors along the last dimension scaled to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(x, dim=-1)


class ScaledUnitNorm(nn.Module):
    """Scaled to a length of each head, at most 100, whose logarithm is learned: (…, heads, tokens, qk)."""

    def __init__(self, logit_scale: nn.Parameter) -> None:
        super().__init__()
        self.logit_scale = logit_scale

    def forward(self, x: Tensor) -> Tensor:
        """See the class; heads are the dimension before the last two."""
        lengths = torch.clamp(self.logit_scale, max=math.log(100)).exp()
        return F.normalize(x, dim=-1) * lengths.view(-1, 1, 1)


def _filled(x: Tensor, size: int) -> Tensor:
    """With zeros up to a size along the last dimension."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


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
        return self.mixed(x)

    def mixed(self, x: Tensor, *bias: Tensor) -> Tensor:
        """All that is in it, one after the other; a bias is for the logits, see `HeadMixing`."""
        tokens: Tensor = self.drop(self.proj(self.mix(self.qkv(x), *bias)))
        return tokens


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


class PositionTable(nn.Module):
    """A bias for each pair of tokens by how they lie to each other, (1, heads, tokens, tokens).

    The table is (relative positions, heads), the index the relative position of each pair, (tokens, tokens) or
    flat; `saved` says whether it is part of the state dict.
    """

    relative_position_index: Tensor

    def __init__(self, table: nn.Parameter, index: Tensor, saved: bool) -> None:
        super().__init__()
        self.relative_position_bias_table = table
        self.register_buffer("relative_position_index", index, saved)

    def forward(self) -> Tensor:
        """See the class."""
        return position_bias(self.relative_position_bias_table, self.relative_position_index)


class PositionNetwork(nn.Module):
    """The same, its table made by a small network from coordinates (…, relative positions, 2), as in Swin V2."""

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, network: nn.Module, coordinates: Tensor, index: Tensor, saved: bool) -> None:
        super().__init__()
        self.cpb_mlp = network
        self.register_buffer("relative_coords_table", coordinates, saved)
        self.register_buffer("relative_position_index", index, saved)

    def forward(self) -> Tensor:
        """See the class; at most 16."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * torch.sigmoid(position_bias(table, self.relative_position_index))


class WindowHeadAttention(HeadAttention):
    """Attention among the tokens of a window, with a bias that depends on where they lie to each other.

    As in Swin (Liu et al. 2021) and Swin V2 (Liu et al. 2022).
    """

    def __init__(
        self, qkv: nn.Module, mix: HeadMixing, proj: nn.Module, dropout: float, positions: nn.Module
    ) -> None:
        super().__init__(qkv, mix, proj, dropout)
        self.positions = positions

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The tokens of each window mixed.

        Args:
            x: (images · windows, tokens, channels).
            mask: added to the logits of all heads, (windows, tokens, tokens).
        """
        bias = self.positions()
        return self.mixed(x, bias if mask is None else masked(bias, mask, x))


class MapHeadAttention(WindowHeadAttention):
    """The same of whole maps (images, height, width, channels), which it cuts into windows.

    Windows are `window` = (height, width); their borders lie `shift` further down and right, and what meets in a
    window from two sides of the map is kept apart.
    """

    def __init__(
        self,
        qkv: nn.Module,
        mix: HeadMixing,
        proj: nn.Module,
        dropout: float,
        positions: nn.Module,
        window: Size,
        shift: Size,
    ) -> None:
        super().__init__(qkv, mix, proj, dropout, positions)
        self.window, self.shift = tuple(window), tuple(shift)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The tokens of each window mixed, in their places."""
        bias = self.positions()
        bias = shifted_bias(bias, x, self.window, self.shift)
        return map_of(self.mixed(windows_of(x, self.window, self.shift), bias), x, self.window, self.shift)


# ── windows: torch.fx takes each function as one operation, as what it does depends on sizes ─────────────────

for _operation in ("position_bias", "masked", "shifted_bias", "windows_of", "map_of"):
    fx.wrap(_operation)
APART = -100.0  # added to logits, as Swin does


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each pair of tokens, (1, heads, tokens, tokens)."""
    tokens = math.isqrt(index.numel())
    bias: Tensor = table[index.flatten()].view(1, tokens, tokens, -1).permute(0, 3, 1, 2).contiguous()
    return bias


def masked(bias: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """With the mask of each window, (images · windows, heads, tokens, tokens)."""
    return (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)


def shifted_bias(bias: Tensor, x: Tensor, window: Size, shift: Size) -> Tensor:
    """With a mask between tokens that only the shift brought into one window; as it is where there is none."""
    height, width = (size + pad for size, pad in zip(x.shape[1:3], _missing(x, window), strict=True))
    down, right = _shifts(x, window, shift)
    if not down and not right:
        return bias
    below = torch.arange(height, device=bias.device) >= height - down
    beyond = torch.arange(width, device=bias.device) >= width - right
    sides = (2 * below[:, None] + beyond)[None, :, :, None]
    tokens = windows_of(sides, window, (0, 0))[..., 0]
    mask = torch.where(tokens[:, :, None] == tokens[:, None], 0.0, APART).to(bias.dtype)
    return (bias + mask[:, None]).repeat(x.shape[0], 1, 1, 1)


def windows_of(x: Tensor, window: Size, shift: Size) -> Tensor:
    """Maps (n, h, w, c), filled up with zeros and shifted, as (n · windows, tokens, c)."""
    (down, right), (below, beyond) = _shifts(x, window, shift), _missing(x, window)
    x = F.pad(x, (0, 0, 0, beyond, 0, below))
    x = torch.roll(x, (-down, -right), (1, 2)) if down or right else x
    columns = torch.unflatten(x, 2, (-1, window[1]))
    cut = torch.unflatten(columns, 1, (-1, window[0])).transpose(2, 3)
    return cut.flatten(3, 4).flatten(0, 2)


def map_of(windows: Tensor, x: Tensor, window: Size, shift: Size) -> Tensor:
    """The reverse, with the height and width of x."""
    (down, right), (_, beyond) = _shifts(x, window, shift), _missing(x, window)
    across = (x.shape[2] + beyond) // window[1]
    cut = torch.unflatten(torch.unflatten(windows, 1, tuple(window)), 0, (x.shape[0], -1, across)).transpose(2, 3)
    whole = cut.flatten(3, 4).flatten(1, 2)
    whole = torch.roll(whole, (down, right), (1, 2)) if down or right else whole
    return whole[:, : x.shape[1], : x.shape[2]].contiguous()


def _missing(x: Tensor, window: Size) -> tuple[int, int]:
    """How many rows and columns fill up the last windows."""
    return -x.shape[1] % window[0], -x.shape[2] % window[1]


def _shifts(x: Tensor, window: Size, shift: Size) -> tuple[int, int]:
    """None along an axis on which there is a single window."""
    down, right = (s if size > w else 0 for size, w, s in zip(x.shape[1:3], window, shift, strict=True))
    return down, right
