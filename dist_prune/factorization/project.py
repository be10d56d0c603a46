"""From directions to layers: each site in the form that the plan gives it, and a network rebuilt from a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.factorization.bases import Basis
from dist_prune.factorization.forms import FORMS, Form, Ranks, composed, kernels, set_weight
from dist_prune.factorization.nested import Nested
from dist_prune.factorization.plan import Plan, PlanError
from dist_prune.network.attention import opened_as
from dist_prune.network.factored import Factored
from dist_prune.network.layers import LAYERS
from dist_prune.network.padding import plain
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Site, SiteError, bias_of, describe, weight_of
from dist_prune.utils.decompositions import svd


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
    FORMS["output"].require(site, (factors.rank,))
    pair, factors = FORMS["output"].build(module, (factors.rank,)), balanced(factors)
    set_weight(pair.reduce, factors.inner)
    set_weight(pair.expand, factors.outer)
    _set_bias(pair, factors.bias)
    return pair


def chain(module: nn.Module, form: Form, layers: Sequence[Tensor], bias: Tensor) -> Factored:
    """The layers of any form, balanced, with the geometry of `module`.

    Args:
        module: the dense layer.
        form: of the chain.
        layers: kernels, first to last, (g, outputs, inputs, kh or 1, kw or 1).
        bias: (g, C).
    """
    ranks = tuple(kernel.shape[0] * kernel.shape[1] for kernel in layers[:-1])
    made = form.build(module, ranks)
    for name, kernel in zip(form.layers, balanced_kernels(layers), strict=True):
        set_weight(made.get_submodule(name), kernel)
    _set_bias(made, bias)
    return made


def _set_bias(made: Factored, bias: Tensor) -> None:
    with torch.no_grad():
        made.expand.get_parameter("bias").copy_(bias.flatten())


def project(
    model: nn.Module,
    sites: Iterable[Site],
    bases: Mapping[str, Basis],
    plan: Plan,
    side: str = "output",
    nested: Mapping[str, Mapping[str, Nested]] | None = None,
) -> nn.Module:
    """A copy of the network with every planned site in its form. The network itself is untouched.

    Args:
        model: the network.
        sites: to look at.
        bases: of the sites, for the form `output` and the outer half of `tucker`.
        plan: forms and ranks.
        side: of the bases.
        nested: of the sites, by form, for the other forms.
    """
    factors_of = project_output if side == "output" else project_input
    replacements = []
    for site in sites:
        if (choice := plan.factored.get(site.name)) is None:
            continue
        module, basis, form = model.get_submodule(site.name), bases[site.name], FORMS[choice.form]
        form.require(site, choice.ranks)
        weight, bias = weight_of(module, site).double(), bias_of(module, site).double()
        if form.name == "output":
            layers = factor(module, site, factors_of(weight, bias, basis, choice.ranks[0]))
        else:
            layers = _projected(module, site, form, choice.ranks, basis, (nested or {})[site.name])
        replacements.append((site.name, layers))
    return with_replaced(model, replacements)


def _projected(
    module: nn.Module, site: Site, form: Form, ranks: Ranks, basis: Basis, nested: Mapping[str, Nested]
) -> Factored:
    """One site; the bias makes up for what is lost of the mean output."""
    own = nested["input" if form.name == "tucker" else form.name]
    first, second = own.kept(ranks[0])
    layers = [first, second]
    if form.name == "tucker":
        encode, decode = basis.kept(ranks[1])
        layers = [first, torch.einsum("gso,gorhw->gsrhw", encode, second), decode[..., None, None]]
    kernel = layers[0]
    for layer in layers[1:]:
        kernel = composed(layer, kernel)
    weight, bias = weight_of(module, site).double(), bias_of(module, site).double()
    lost = weight - kernel.flatten(2)
    return chain(module, form, layers, bias + (lost @ own.mean[..., None])[..., 0])


def balanced(factors: Factors) -> Factors:
    """The same product, split by its singular values: B·A = (U√S)(√S·Vᵀ).

    Closed-form factors differ in scale by orders of magnitude, which no learning rate fits. What is not finite
    stays as it is, for who looks at the network as a whole.
    """
    if not torch.isfinite(factors.outer.sum() + factors.inner.sum()):
        return factors
    left, triangle = torch.linalg.qr(factors.outer)
    right, other = torch.linalg.qr(factors.inner.mT)
    u, s, v = svd(triangle @ other.mT)
    root = s.sqrt()[:, None]
    unused = factors.inner.shape[1] - s.shape[1]  # of a rank beyond what the product can have
    inner, outer = F.pad((root.mT * v) @ right.mT, (0, 0, 0, unused)), F.pad(left @ (u * root), (0, unused))
    return Factors(outer, inner, factors.bias)


def balanced_kernels(layers: Sequence[Tensor]) -> list[Tensor]:
    """Kernels of a chain that compute the same, each two in a row split by the singular values of their product.

    Args:
        layers: (g, outputs, inputs, kh or 1, kw or 1), first to last.
    """
    found = list(layers)
    for place in range(len(found) - 1):
        inner, outer = found[place], found[place + 1].transpose(1, 2)  # the channels in between are axis 1 of both
        rows = outer.flatten(2).mT  # g, C·kh·kw, r
        factors = balanced(Factors(rows, inner.flatten(2), rows.new_empty(0)))
        found[place] = factors.inner.reshape(inner.shape)
        found[place + 1] = factors.outer.mT.reshape(outer.shape).transpose(1, 2)
    if len(found) > 2:  # the second split has moved scale between its two
        norms = torch.stack([layer.flatten(1).norm(dim=1) for layer in found])
        mean = norms.clamp(min=1e-300).log().mean(0).exp()
        alike = (norms > 0).all(0)
        scales = torch.where(alike, mean / norms.clamp(min=1e-300), 1)
        found = [layer * scale[:, None, None, None, None] for layer, scale in zip(found, scales, strict=True)]
    return found


def balance(model: nn.Module) -> None:
    """Balance every factored site, in place: it computes what it did."""
    for made in model.modules():
        if isinstance(made, Factored):
            layers = [made.get_submodule(name) for name in FORMS[made.form].layers]
            groups = getattr(layers[0], "groups", 1)
            for layer, kernel in zip(layers, balanced_kernels([kernels(x, groups) for x in layers]), strict=True):
                set_weight(layer, kernel)


def is_balanced(model: nn.Module, within: float = 0.01) -> bool:
    """Whether the layers of every factored site are as large as each other, by their norms."""
    for made in model.modules():
        if isinstance(made, Factored):
            layers = [made.get_submodule(name) for name in FORMS[made.form].layers]
            norms = [float(kernels(layer, 1).norm()) for layer in layers]
            if not max(norms) <= (1 + within) * min(norms):
                return False
    return True


def unfold(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy in which the named factored sites are one dense layer each, which computes the same.

    Projected again, such a layer gives a chain: new layers are folded into those that there were.
    """
    chains = ((name, model.get_submodule(name)) for name in names)
    folds = [(name, FORMS[made.form].fold(made)) for name, made in chains if isinstance(made, Factored)]
    return with_replaced(model, folds)


def opened_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The network with the attention taken apart that the plan is of, see `attention.opened_as`.

    Raises:
        PlanError: it has no such attention.
    """
    try:
        return opened_as(model, plan.attention)
    except AttributeError as error:
        raise PlanError(f"the plan does not fit this network: {error}") from error


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the network in the plan's shape, its factored layers yet without values.

    Raises:
        SiteError: a form or ranks that a layer of this network cannot have, or a layer of a class of its own.
    """
    return with_replaced(model, chains(model, plan).items())


def chains(model: nn.Module, plan: Plan) -> dict[str, Factored]:
    """What stands in the place of each factored layer, yet without values.

    Raises:
        SiteError: see `rebuild`.
    """
    found = {}
    for name, choice in plan.factored.items():
        module, form = plain(model.get_submodule(name)), FORMS[choice.form]
        if type(module) not in LAYERS:
            raise SiteError(f"{name} is a {type(module).__name__} here, which computes its output in its own way")
        form.require(describe(name, module), choice.ranks)
        found[name] = form.build(module, choice.ranks).train(module.training)
    return found
