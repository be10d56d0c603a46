"""What a site can become: chains of small convolutions, and what each chain costs.

A form is a chain of two or three layers. One of them has the kernel's height, and with it the vertical stride,
dilation and padding; one has its width; the channels in between are the form's ranks:

| form | layers | source |
|---|---|---|
| `output` | k×k c→r, 1×1 r→C | Zhang et al. 2016 |
| `input` | 1×1 c→r, k×k r→C | the same on the other side |
| `vertical` | k×1 c→r, 1×k r→C | Jaderberg et al. 2014 |
| `horizontal` | 1×k c→r, k×1 r→C | the same, the other way round |
| `tucker` | 1×1 c→r₁, k×k r₁→r₂, 1×1 r₂→C | Kim et al. 2016 |

Groups stay groups, block by block; ranks count the channels of all groups together. A linear layer is a
convolution of one position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.config.flags import ConfigError, did_you_mean
from dist_prune.factorization.knapsack import Ints
from dist_prune.network.factored import Factored
from dist_prune.network.memory_format import place_like
from dist_prune.network.padded import convolution, sides_of
from dist_prune.network.sites import Site, SiteError

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A chain of layers.

    Attributes:
        name: of the form.
        layers: names of the layers, in order.
        tall: the layer that has the kernel's height.
        wide: the layer that has its width.
    """

    name: str
    layers: tuple[str, ...]
    tall: str
    wide: str

    def why_not(self, site: Site) -> str:
        """Why the site cannot take this form; empty if it can."""
        if self.name == "output":
            return ""
        if site.kernel == (1, 1):
            return "a 1×1 kernel and a linear layer are one matrix: use output"
        if self.tall != self.wide and 1 in site.kernel:
            return f"its {site.kernel[0]}×{site.kernel[1]} kernel has one axis only: use output or input"
        return ""

    def full_ranks(self, site: Site) -> Ranks:
        """The ranks at which every site of this shape fits; larger ones gain nothing."""
        tall, wide = site.kernel
        if self.name == "output":
            return (site.outputs,)
        if self.name == "input":
            return (site.groups * site.channels,)
        if self.name == "tucker":
            return site.groups * site.channels, site.outputs
        first, second = (tall, wide) if self.name == "vertical" else (wide, tall)
        return (site.groups * min(site.channels * first, site.width * second),)

    def require(self, site: Site, ranks: Ranks, most: int | None = None) -> None:
        """Refuse what cannot be; `most` is the largest rank of `output`, if not that of either side.

        Raises:
            SiteError: a form that does not fit, or ranks that it cannot have.
        """
        if reason := self.why_not(site):
            fitting = ", ".join(fitting_forms(site))
            raise SiteError(f"{site.name} cannot take the form {self.name}: {reason} (forms that fit: {fitting})")
        full = (most or site.max_rank,) if self.name == "output" else self.full_ranks(site)
        if len(ranks) != len(full):
            raise SiteError(
                f"{site.name}: the form {self.name} has {len(full)} rank(s), got {format_ranks(ranks)}"
            )
        for rank, limit in zip(ranks, full, strict=True):
            if not 1 <= rank <= limit or rank % site.groups:
                groups = f", a multiple of {site.groups}" if site.groups > 1 else ""
                raise SiteError(f"{site.name} has {self.name} rank {rank}; expected 1 to {limit}{groups}")

    def weights(self, site: Site, ranks: Sequence[int | Ints]) -> list[Any]:
        """Weights of each layer, without bias; ranks may be arrays."""
        ends = [site.groups * site.channels, *ranks, site.outputs]
        areas = [prod(n for n, owner in self._axes(site.kernel) if owner == layer) for layer in self.layers]
        return [a * b * area // site.groups for a, b, area in zip(ends, ends[1:], areas, strict=False)]

    def params(self, site: Site, ranks: Sequence[int | Ints]) -> Any:  # noqa: ANN401  as the ranks are
        """Weights of all layers, without bias."""
        return sum(self.weights(site, ranks))

    def macs(self, site: Site, ranks: Sequence[int | Ints]) -> Any:  # noqa: ANN401  as the ranks are
        """Multiply-adds of all layers for one image."""
        return sum(self.layer_macs(site, ranks))

    def layer_macs(self, site: Site, ranks: Sequence[int | Ints]) -> list[Any]:
        """Multiply-adds of each layer for one image: it works on the map that the strides up to it leave."""
        weights = self.weights(site, ranks)
        return [n * self._rows(site, set(self.layers[: i + 1])) for i, n in enumerate(weights)]

    def _rows(self, site: Site, done: set[str]) -> int:
        tall, wide = self.tall in done, self.wide in done
        whole, rows_strided, columns_strided = site.maps
        if tall and wide:
            return site.rows
        return rows_strided if tall else columns_strided if wide else whole

    def _axes(self, values: tuple[Any, Any]) -> tuple[tuple[Any, str], tuple[Any, str]]:
        return (values[0], self.tall), (values[1], self.wide)

    def build(self, module: nn.Module, ranks: Ranks) -> Factored:
        """The chain in the place of `module`, without values yet, of the same device, type and memory format."""
        ends = [_ends(module)[0], *ranks, _ends(module)[1]]
        made = {
            layer: self._layer(module, layer, a, b)
            for layer, a, b in zip(self.layers, ends, ends[1:], strict=False)
        }
        chain = Factored(**made, form=self.name)
        place_like(chain, module)
        return chain

    def _layer(self, module: nn.Module, layer: str, inputs: int, outputs: int) -> nn.Module:
        bias = layer == self.layers[-1]
        if isinstance(module, nn.Linear):
            return nn.Linear(inputs, outputs, bias=bias)
        assert isinstance(module, nn.Conv2d)
        geometry: dict[str, Any] = {
            name: tuple(own if owner == layer else none for own, owner in self._axes(getattr(module, name)))
            for name, none in (("kernel_size", 1), ("stride", 1), ("dilation", 1))
        }
        sides = sides_of(module)
        if not isinstance(sides, str):
            rows, columns = (own if owner == layer else (0, 0) for own, owner in self._axes(sides))
            sides = rows, columns
        pads = layer in (self.tall, self.wide)
        return convolution(
            inputs,
            outputs,
            sides=sides,
            groups=module.groups,
            bias=bias,
            padding_mode=module.padding_mode if pads else "zeros",
            **geometry,
        )

    def fold(self, chain: Factored) -> nn.Module:
        """One dense layer that computes the same."""
        layers = [chain.get_submodule(name) for name in self.layers]
        weight, groups = folded(chain), getattr(layers[0], "groups", 1)
        ends = _ends(layers[0])[0], _ends(layers[-1])[1]
        if isinstance(layers[0], nn.Linear):
            dense: nn.Module = nn.Linear(*ends)
        else:
            tall, wide = chain.get_submodule(self.tall), chain.get_submodule(self.wide)
            assert isinstance(tall, nn.Conv2d) and isinstance(wide, nn.Conv2d)
            names = ("kernel_size", "stride", "dilation")
            geometry: dict[str, Any] = {n: (getattr(tall, n)[0], getattr(wide, n)[1]) for n in names}
            rows, columns = sides_of(tall), sides_of(wide)
            sides = rows if isinstance(rows, str) or isinstance(columns, str) else (rows[0], columns[1])
            dense = convolution(*ends, sides=sides, groups=groups, padding_mode=tall.padding_mode, **geometry)
        place_like(dense, layers[0])
        set_weight(dense, weight)
        with torch.no_grad():
            dense.get_parameter("bias").copy_(layers[-1].get_parameter("bias"))
        return dense


def _ends(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, nn.Conv2d)
    return module.in_channels, module.out_channels


FORMS = {
    form.name: form
    for form in (
        Form("output", ("reduce", "expand"), "reduce", "reduce"),
        Form("input", ("reduce", "expand"), "expand", "expand"),
        Form("vertical", ("reduce", "expand"), "reduce", "expand"),
        Form("horizontal", ("reduce", "expand"), "expand", "reduce"),
        Form("tucker", ("reduce", "core", "expand"), "core", "core"),
    )
}
DENSE = "dense"


def form_of(name: str) -> Form:
    """The form of that name.

    Raises:
        ConfigError: there is none; close ones are offered.
    """
    if name not in FORMS:
        raise ConfigError(f"unknown form {name!r}; {did_you_mean(name, FORMS, 'forms: ' + ', '.join(FORMS))}")
    return FORMS[name]


def fitting_forms(site: Site, forms: Iterable[Form] = FORMS.values()) -> list[str]:
    """Names of the forms that the site can take."""
    return [form.name for form in forms if not form.why_not(site)]


def format_ranks(ranks: Ranks) -> str:
    """`12`, or `12x16`."""
    return "x".join(map(str, ranks))


# ── weights as tensors ─────────────────────────────────────────────────────────────────────────────────────


def kernels(layer: nn.Module, groups: int) -> Tensor:
    """The layer's weight as (g, outputs/g, inputs/g, kh, kw), float64."""
    weight = layer.get_parameter("weight").detach().double()
    shape = (groups, weight.shape[0] // groups, weight.shape[1])
    return weight.reshape(*shape, *(weight.shape[2:] if weight.dim() == 4 else (1, 1)))


def set_weight(layer: nn.Module, values: Tensor) -> None:
    """Give the layer these weights, of any shape with as many numbers in the same order."""
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        weight.copy_(values.reshape(weight.shape))


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The kernels of two layers one after the other, each axis of the kernel being of one of them alone.

    Args:
        outer: (g, C, r, kh or 1, kw or 1).
        inner: (g, r, c, kh or 1, kw or 1).

    Returns:
        (g, C, c, kh, kw).
    """
    tall, wide = (max(outer.shape[i], inner.shape[i]) for i in (3, 4))
    outer, inner = (t.expand(*t.shape[:3], tall, wide) for t in (outer, inner))
    return torch.einsum("gorhw,grihw->goihw", outer, inner)


def folded(chain: Factored) -> Tensor:
    """The kernel of the chain, (g, C, c, kh, kw), float64."""
    layers = [chain.get_submodule(name) for name in FORMS[chain.form].layers]
    groups = getattr(layers[0], "groups", 1)
    kernel = kernels(layers[0], groups)
    for layer in layers[1:]:
        kernel = composed(kernels(layer, groups), kernel)
    return kernel


def rank_grid(full: int, step: int, most: int = 24) -> Ints:
    """Ranks from `step` to `full` in steps; of more than `most`, so many at equal ratios."""
    every = np.arange(step, full + 1, step, dtype=np.int64)
    if len(every) <= most:
        return every
    places = np.geomspace(1, len(every), most).round().astype(np.int64) - 1
    return every[np.unique(places)]
