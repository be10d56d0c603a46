"""The alternating solver, against plain dense solves in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dist_prune.correction.alternating import Target, alternate

KERNEL = (3, 2)
SEEN = {"input": (1, 1), "vertical": (3, 1), "horizontal": (1, 2)}


def drawn(groups: int = 1, outputs: int = 5, channels: int = 4) -> Target:
    """A weight, a covariance that is no product of two, and a metric."""
    generator = torch.Generator().manual_seed(groups)
    inputs = channels * KERNEL[0] * KERNEL[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(groups, *size, generator=generator, dtype=torch.float64)

    x, g = normal(inputs, 3 * inputs), normal(outputs, 2 * outputs)
    return Target(normal(outputs, inputs), x @ x.mT / inputs, g @ g.mT)


def kernel_of(layers: list[Tensor]) -> Tensor:
    """The dense kernel that a chain computes, (g, C, c·kh·kw), layer by layer and place by place."""
    dense = layers[0]
    for layer in layers[1:]:
        tall, wide = (max(dense.shape[i], layer.shape[i]) for i in (3, 4))
        product = dense.new_zeros(*layer.shape[:2], dense.shape[2], tall, wide)
        for i in range(tall):
            for j in range(wide):
                a = layer[..., i % layer.shape[3], j % layer.shape[4]]
                product[..., i, j] = a @ dense[..., i % dense.shape[3], j % dense.shape[4]]
        dense = product
    return dense.flatten(2)


def start(form: str, rank: int, target: Target) -> Tensor:
    groups, channels = len(target.weight), target.weight.shape[2] // (KERNEL[0] * KERNEL[1])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(groups, rank, channels, *SEEN[form], generator=generator, dtype=torch.float64)


def losses(target: Target, form: str, rank: int, middle: int | None, rounds: list[int]) -> list[float]:
    found = (alternate(target, start(form, rank, target), KERNEL, middle, r, steps=40) for r in rounds)
    return [float(target.loss(kernel_of(layers)).sum()) for layers in found]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", SEEN)
@pytest.mark.parametrize("middle", [None, 2])
def test_no_round_makes_the_loss_larger(form: str, middle: int | None, groups: int) -> None:
    found = losses(drawn(groups), form, 2, middle, [0, 1, 2, 4, 8])
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(found))
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("form", SEEN)
def test_each_factor_is_the_dense_solution_given_the_other(form: str) -> None:
    """Kronecker normal equations: the loss as a plain quadratic in all numbers of one layer."""
    target = drawn()
    layers = alternate(target, start(form, 2, target), KERNEL, rounds=60, steps=60)
    for place in (0, 1):

        def loss(flat: Tensor, place: int = place) -> Tensor:
            own = [flat.reshape(each.shape) if i == place else each for i, each in enumerate(layers)]
            return target.loss(kernel_of(own)).sum()

        zero = torch.zeros(layers[place].numel(), dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(loss, zero)
        (slope,) = torch.autograd.functional.jacobian(loss, zero.requires_grad_()).unsqueeze(0)
        best = torch.linalg.lstsq(hessian, -slope).solution
        here = float(loss(layers[place].flatten()))
        assert here <= float(loss(best)) * (1 + 1e-6)


@pytest.mark.parametrize("form", SEEN)
def test_the_second_layer_is_least_squares_on_the_outputs_of_the_first(form: str) -> None:
    target = drawn(groups=2)
    first = start(form, 3, target)
    inner, outer = alternate(target, first, KERNEL, rounds=0)
    basis = torch.linalg.lstsq(first.flatten(2).mT, inner.flatten(2).mT)  # the same rows up to a basis
    torch.testing.assert_close(basis.solution.mT @ first.flatten(2), inner.flatten(2))
    units = [torch.zeros_like(outer[:1]).flatten() for _ in range(outer[0].numel())]
    for place, unit in enumerate(units):
        unit[place] = 1
    columns = torch.stack([kernel_of([inner[:1], unit.reshape(outer[:1].shape)])[0] for unit in units])
    weighted = torch.einsum("oa,nab,bd->nod", target.metric[0], columns, target.covariance[0]).flatten(1)
    right = weighted @ target.weight[0].flatten()
    torch.testing.assert_close(torch.linalg.solve(weighted @ columns.flatten(1).mT, right), outer[0].flatten())


@pytest.mark.parametrize(("form", "rank"), [("input", 4), ("vertical", 10), ("horizontal", 8)])
def test_full_rank_is_exact(form: str, rank: int) -> None:
    target = drawn()
    layers = alternate(target, start(form, rank, target), KERNEL, rounds=8, steps=20)
    torch.testing.assert_close(kernel_of(layers), target.weight)
    if form == "input":
        torch.testing.assert_close(kernel_of(alternate(target, start(form, 4, target), KERNEL, 5)), target.weight)


def test_rank_deficient_starts_and_covariances_are_solved() -> None:
    target = drawn()
    first = start("input", 3, target)
    first[:, 2] = first[:, 1]
    covariance = target.covariance.clone()
    covariance[:, :6] = covariance[:, :, :6] = 0  # a channel that is always zero
    for these in (target, Target(target.weight, covariance, target.metric)):
        layers = alternate(these, first, KERNEL)
        assert all(torch.isfinite(layer).all() for layer in layers)
        two = alternate(these, first[:, :2], KERNEL)
        assert these.loss(kernel_of(layers)) < these.loss(kernel_of(two))


def test_a_product_covariance_is_solved_in_one_step() -> None:
    """There the preconditioner is the inverse."""
    generator = torch.Generator().manual_seed(0)
    channels, places = (torch.randn(n, 2 * n, generator=generator, dtype=torch.float64) for n in (4, 6))
    covariance = torch.kron(channels @ channels.mT, places @ places.mT)[None]
    plain = drawn()
    target = Target(plain.weight, covariance, plain.metric)
    one, many = (
        target.loss(kernel_of(alternate(target, start("input", 2, target), KERNEL, None, 1, steps)))
        for steps in (1, 30)
    )
    torch.testing.assert_close(one, many, rtol=1e-9, atol=0)
