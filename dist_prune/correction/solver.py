"""One site: which layers are tried in its place, each solved from the site's normal equations."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_prune.correction.alternating import Target, alternate, lifted
from dist_prune.correction.least_squares import (
    DualNormalEquations,
    NormalEquations,
    bias,
    least_squares,
    reduced_rank,
    refit,
    shift_of,
)
from dist_prune.factorization.forms import FORMS, composed, kernels
from dist_prune.factorization.project import chain, factor
from dist_prune.network.factored import Factored
from dist_prune.network.sites import Site, weight_of
from dist_prune.utils.decompositions import eigvalsh

Equations = NormalEquations | DualNormalEquations


@dataclass(frozen=True)
class Solver:
    """How sites are solved: `refit` or `regression`; `ridge` as in `least_squares`; dampings of the metric to try.

    Dampings are shares of the metric's largest eigenvalue; infinity stands for no metric.
    """

    kind: str = "regression"
    ridge: float = 1e-3
    dampings: tuple[float, ...] = (0.01, 0.1, math.inf)

    def names(self, module: nn.Module) -> tuple[str, ...]:
        """What is tried in the place of a layer."""
        if not isinstance(module, Factored):
            return ("re-solved",)
        return ("refit",) if self.kind == "refit" else tuple(f"regression, damping {d:g}" for d in self.dampings)

    def solve(
        self, name: str, present: nn.Module, dense: nn.Module, site: Site, normal: Equations, metric: Tensor
    ) -> nn.Module:
        """The layer that `name` stands for: of the form that `present` has, or dense."""
        if not isinstance(present, Factored):
            return _resolved(dense, site, normal if site.bias else normal.uncentred(), self.ridge)
        layers = [kernels(present.get_submodule(layer), site.groups) for layer in FORMS[present.form].layers]
        if name == "refit":
            return _refitted(dense, site, present.form, layers, normal, self.ridge)
        damping = self.dampings[self.names(present).index(name)]
        return _regressed(dense, site, present.form, layers, normal, damped(metric, damping), self.ridge)


def _refitted(
    dense: nn.Module, site: Site, form: str, layers: Sequence[Tensor], normal: Equations, ridge: float
) -> Factored:
    """The last layer, and the bias, solved again on the outputs of those before it."""
    *before, last = layers
    inner = lifted(_together(before), site.kernel)
    factors = refit(normal, inner, last.flatten(2), ridge)
    return chain(dense, FORMS[form], [*before, factors.outer.reshape(last.shape)], factors.bias)


def _regressed(
    dense: nn.Module,
    site: Site,
    form: str,
    layers: Sequence[Tensor],
    normal: Equations,
    metric: Tensor,
    ridge: float,
) -> Factored:
    """All layers solved again; a pair of the form `output` in closed form, others by turns from what they are."""
    weight = weight_of(dense, site).double()
    if form == "output":
        rank = layers[0].shape[0] * layers[0].shape[1]
        return factor(dense, site, reduced_rank(normal, weight, rank, ridge, metric))
    solved, _ = least_squares(normal, weight, ridge)
    target = Target(solved, normal.shifted(shift_of(normal, ridge)), metric)
    middle = layers[1].shape[1] if len(layers) > 2 else None
    found = alternate(target, layers[0], site.kernel, middle)
    return chain(dense, FORMS[form], found, bias(normal, _together(found).flatten(2)))


def _together(layers: Sequence[Tensor]) -> Tensor:
    """The kernel of layers one after the other."""
    kernel = layers[0]
    for layer in layers[1:]:
        kernel = composed(layer, kernel)
    return kernel


def damped(metric: Tensor, damping: float) -> Tensor:
    """The metric, its largest eigenvalue scaled to 1, plus `damping`; the identity for an infinite one."""
    identity = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device).expand_as(metric)
    if math.isinf(damping):
        return identity
    largest: Tensor = eigvalsh(metric)[:, -1:, None]
    # Scaled, or a metric of 1e-60 would give layers of 1e-30 and 1e30, which float32 multiplies to nothing.
    return torch.where(largest > 0, metric / torch.where(largest > 0, largest, 1) + damping * identity, identity)


def _resolved(dense: nn.Module, site: Site, normal: Equations, ridge: float) -> nn.Module:
    solved, _ = least_squares(normal, weight_of(dense, site).double(), ridge)
    module = copy.deepcopy(dense)
    state = {"weight": solved, "bias": bias(normal, solved)} if site.bias else {"weight": solved}
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name].reshape(parameter.shape))
    return module
