"""From a basis to layers: `k×k conv to r channels → 1×1 conv back`, and a network rebuilt from a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.factorization.bases import Basis
from dist_prune.factorization.plan import Plan
from dist_prune.network.memory_format import place_like
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Factored, Site, bias_of, describe, factored_like, weight_of


@dataclass(frozen=True)
class Factors:
    """A site's low-rank matrices: y ≈ outer·inner·x + bias.

    `outer` (g, c, r/g), `inner` (g, r/g, d), `bias` (g, c).
    """

    outer: Tensor
    inner: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        """Channels in the middle, all groups together."""
        return self.inner.shape[0] * self.inner.shape[1]


def project_output(weight: Tensor, bias: Tensor, basis: Basis, rank: int) -> Factors:
    """Project the outputs: y ≈ D·E·(Wx + b − ȳ) + ȳ, all constants gathered in the second layer's bias.

    Args:
        weight: (g, c, d), float64.
        bias: (g, c), float64.
        basis: of the outputs.
        rank: directions to keep, all groups together.
    """
    encode, decode = basis.kept(rank)
    offset = (decode @ (encode @ (bias - basis.mean)[..., None]))[..., 0]
    return Factors(decode, encode @ weight, basis.mean + offset)


def project_input(weight: Tensor, bias: Tensor, basis: Basis, rank: int) -> Factors:
    """Project the input patches: y ≈ W(D·E·(x − x̄) + x̄) + b. Arguments as in `project_output`; basis of x."""
    encode, decode = basis.kept(rank)
    lost = basis.mean - (decode @ (encode @ basis.mean[..., None]))[..., 0]
    return Factors(weight @ decode, encode, bias + (weight @ lost[..., None])[..., 0])


def factor(module: nn.Module, site: Site, factors: Factors) -> Factored:
    """The pair of layers that computes `factors`, balanced, with the geometry of `module`."""
    pair, factors = factored_like(module, site, factors.rank), balanced(factors)
    with torch.no_grad():
        for layer, matrix in ((pair.reduce, factors.inner), (pair.expand, factors.outer)):
            assert isinstance(layer.weight, Tensor)
            layer.weight.copy_(matrix.reshape(layer.weight.shape))
        assert isinstance(pair.expand.bias, Tensor)
        pair.expand.bias.copy_(factors.bias.flatten())
    return pair


def project(
    model: nn.Module, sites: Iterable[Site], bases: Mapping[str, Basis], plan: Plan, side: str = "output"
) -> nn.Module:
    """A copy of the network with every planned site projected on its basis. The network itself is untouched."""
    factors_of = project_output if side == "output" else project_input
    replacements = []
    for site in sites:
        if site.name in plan.ranks:
            module = model.get_submodule(site.name)
            weight, bias = weight_of(module, site).double(), bias_of(module, site).double()
            factors = factors_of(weight, bias, bases[site.name], plan.ranks[site.name])
            replacements.append((site.name, factor(module, site, factors)))
    return with_replaced(model, replacements)


def balanced(factors: Factors) -> Factors:
    """The same product, split by its singular values: B·A = (U√S)(√S·Vᵀ).

    Closed-form factors differ in scale by orders of magnitude, which no learning rate fits.
    """
    left, triangle = torch.linalg.qr(factors.outer)
    right, other = torch.linalg.qr(factors.inner.mT)
    u, s, v = torch.linalg.svd(triangle @ other.mT, full_matrices=False)
    root = s.sqrt()[:, None]
    unused = factors.inner.shape[1] - s.shape[1]  # of a rank beyond what the product can have
    inner, outer = F.pad((root.mT * v) @ right.mT, (0, 0, 0, unused)), F.pad(left @ (u * root), (0, unused))
    return Factors(outer, inner, factors.bias)


def balance(model: nn.Module) -> None:
    """Balance every factored pair, in place: the pair computes what it did."""
    for pair in model.modules():
        if isinstance(pair, Factored):
            groups = getattr(pair.reduce, "groups", 1)
            inner, outer = (_grouped(layer, groups) for layer in (pair.reduce, pair.expand))
            factors = balanced(Factors(outer, inner, inner.new_empty(0)))
            _set(pair.reduce, factors.inner)
            _set(pair.expand, factors.outer)


def _grouped(layer: nn.Module, groups: int) -> Tensor:
    """The layer's weight as (g, outputs/g, inputs), float64."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)


def _set(layer: nn.Module, matrix: Tensor) -> None:
    assert isinstance(layer.weight, Tensor)
    with torch.no_grad():
        layer.weight.copy_(matrix.reshape(layer.weight.shape))


def unfold(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy in which the named factored pairs are one dense layer each, which computes the same: W = B·A.

    Projected again, such a layer gives a pair: the new 1×1 layers are folded into the two that there were.
    """
    pairs = ((name, model.get_submodule(name)) for name in names)
    return with_replaced(model, [(name, _product(pair)) for name, pair in pairs if isinstance(pair, Factored)])


def _product(pair: Factored) -> nn.Module:
    """`reduce` with the outputs, and the bias, of `expand`."""
    reduce, expand = pair.reduce, pair.expand
    groups = getattr(reduce, "groups", 1)
    weight = _grouped(expand, groups) @ _grouped(reduce, groups)
    outputs = weight.shape[0] * weight.shape[1]
    if isinstance(reduce, nn.Linear):
        layer: nn.Module = nn.Linear(reduce.in_features, outputs)
    else:
        assert isinstance(reduce, nn.Conv2d)
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        geometry: dict[str, Any] = {name: getattr(reduce, name) for name in names}
        layer = nn.Conv2d(reduce.in_channels, outputs, **geometry)
    place_like(layer, reduce)
    _set(layer, weight)
    assert isinstance(expand.bias, Tensor)
    with torch.no_grad():
        layer.get_parameter("bias").copy_(expand.bias)
    return layer


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the network in the plan's shape, its factored layers yet without values."""
    replacements = []
    for name, rank in plan.ranks.items():
        module = model.get_submodule(name)
        replacements.append((name, factored_like(module, describe(name, module), rank)))
    return with_replaced(model, replacements)
