"""The closed-form correction against formulas written out in float64, and against what it is for."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_prune.correction.least_squares import (
    DualNormalEquations,
    NormalEquations,
    dual_normal_equations,
    least_squares,
    normal_equations,
    reduced_rank,
    refit,
)
from dist_prune.correction.solver import Solver, damped
from dist_prune.factorization.project import factor, project_output
from dist_prune.network.factored import Factored
from dist_prune.network.sites import Site, bias_of, describe, input_rows, output_rows, weight_of
from dist_prune.statistics.moments import Accumulator
from tests.layers import LAYERS, layer

# ── one site's equations ───────────────────────────────────────────────────────────────────────────────────


def rows_of(x: Tensor, t: Tensor) -> NormalEquations:
    """NormalEquations equations of rows x (g, d, n), t (g, c, n), from first principles."""
    n, mean_x, mean_t = x.shape[-1], x.mean(-1), t.mean(-1)
    x, t = x - mean_x[..., None], t - mean_t[..., None]
    return NormalEquations(mean_x, mean_t, x @ x.mT / n, t @ x.mT / n, n)


def problem(seed: int = 0, groups: int = 2, d: int = 6, c: int = 4, n: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs away from zero, targets that are not quite linear in them, and a weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(groups, d, d) @ normal(groups, d, n) + 3 * normal(groups, d, 1)
    weight = normal(groups, c, d)
    t = weight @ x + normal(groups, c, 1) + 2 * normal(groups, c, n) + normal(groups, c, d) @ x.tanh()
    return x, t, weight


def positive(groups: int, size: int, seed: int = 9) -> Tensor:
    root = torch.randn(groups, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def augmented(x: Tensor, t: Tensor, weight: Tensor, shift: float) -> np.ndarray:
    """min_P ‖t − Px‖²/n + shift‖P − W‖² of one group's centred rows, as one tall least-squares problem."""
    x, t = x - x.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    n, d = x.shape[-1], len(x)
    tall = np.vstack([x.T.numpy() / math.sqrt(n), math.sqrt(shift) * np.eye(d)])
    right = np.vstack([t.T.numpy() / math.sqrt(n), math.sqrt(shift) * weight.T.numpy()])
    return np.linalg.lstsq(tall, right, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_least_squares_is_the_augmented_problem(ridge: float) -> None:
    x, t, weight = problem()
    normal = rows_of(x, t)
    found, predicted = least_squares(normal, weight, ridge)
    for group in range(len(x)):
        shift = ridge * normal.xx[group].trace().item() / x.shape[1]
        expected = augmented(x[group], t[group], weight[group], shift)
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-8, atol=1e-9)
        shifted = normal.xx[group].numpy() + shift * np.eye(x.shape[1])
        np.testing.assert_allclose(predicted[group], expected @ shifted @ expected.T, rtol=1e-8, atol=1e-8)


def test_a_huge_ridge_keeps_the_weight() -> None:
    x, t, weight = problem()
    torch.testing.assert_close(least_squares(rows_of(x, t), weight, 1e12)[0], weight)


def test_full_rank_is_least_squares_whatever_the_metric() -> None:
    x, t, weight = problem()
    normal = rows_of(x, t)
    solved, _ = least_squares(normal, weight, 1e-3)
    for metric in (positive(2, 4), torch.eye(4, dtype=torch.float64).expand(2, 4, 4)):
        factors = reduced_rank(normal, weight, 8, 1e-3, metric)
        torch.testing.assert_close(factors.outer @ factors.inner, solved, rtol=1e-9, atol=1e-9)
        bias = normal.mean_t - (solved @ normal.mean_x[..., None])[..., 0]
        torch.testing.assert_close(factors.bias, bias, rtol=1e-9, atol=1e-9)


def test_ranks_beyond_the_outputs_are_zero() -> None:
    """The input side may have kept more directions than there are outputs."""
    x, t, weight = problem()
    normal = rows_of(x, t)
    factors = reduced_rank(normal, weight, 12, 1e-3, positive(2, 4))
    assert factors.rank == 12
    solved, _ = least_squares(normal, weight, 1e-3)
    torch.testing.assert_close(factors.outer @ factors.inner, solved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reduced_rank_is_the_closed_form_by_whitening(rank: int) -> None:
    """K = G^½ E[y x̂ᵀ] L^−ᵀ with E[x̂x̂ᵀ] = LLᵀ; the best map is G^−½ K_r L^−1."""
    x, t, weight = problem()
    normal, metric, tiny = rows_of(x, t), positive(2, 4), 1e-13
    factors = reduced_rank(normal, weight, 2 * rank, tiny, metric)
    for group in range(2):
        values, vectors = np.linalg.eigh(metric[group].numpy())
        root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
        lower = np.linalg.cholesky(normal.xx[group].numpy())
        u, s, vt = np.linalg.svd(root @ normal.tx[group].numpy() @ np.linalg.inv(lower).T)
        best = inverse @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(lower)
        product = (factors.outer @ factors.inner)[group].numpy()
        np.testing.assert_allclose(product, best, rtol=1e-7, atol=1e-7)
        bias = normal.mean_t[group].numpy() - best @ normal.mean_x[group].numpy()
        np.testing.assert_allclose(factors.bias[group].numpy(), bias, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-12, 0.3])
def test_nothing_near_the_solution_is_better(ridge: float) -> None:
    """Neither random changes of all three parts nor other directions of the same rank lower the loss."""
    x, t, weight = problem()
    normal, metric = rows_of(x, t), positive(2, 4)
    factors = reduced_rank(normal, weight, 4, ridge, metric)
    shift = ridge * normal.xx.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]

    def loss(outer: Tensor, inner: Tensor, bias: Tensor) -> float:
        error = t - outer @ inner @ x - bias[..., None]
        fit = torch.einsum("gcn,gce,gen->", error, metric, error) / x.shape[-1]
        away = outer @ inner - weight
        return float(fit + (shift * (away.mT @ metric @ away)).diagonal(dim1=-2, dim2=-1).sum())

    best = loss(factors.outer, factors.inner, factors.bias)
    generator = torch.Generator().manual_seed(5)
    for scale in (1e-4, 1e-2, 0.3):
        for _ in range(100):
            changed = [
                part + scale * part.std() * torch.randn(part.shape, generator=generator, dtype=part.dtype)
                for part in (factors.outer, factors.inner, factors.bias)
            ]
            assert loss(*changed) >= best - 1e-9 * best


def test_refit_is_least_squares_on_the_encoded_inputs() -> None:
    x, t, weight = problem()
    inner, outer = weight[:, :2], torch.linalg.pinv(weight[:, :2]).mT[..., :0].new_ones(2, 4, 2)
    factors = refit(rows_of(x, t), inner, outer, 1e-13)
    assert torch.equal(factors.inner, inner)
    for group in range(2):
        encoded = (inner @ x)[group]
        tall = np.vstack([encoded.numpy(), np.ones(x.shape[-1])]).T
        expected = np.linalg.lstsq(tall, t[group].T.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(factors.outer[group], expected[:, :2], rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(factors.bias[group], expected[:, 2], rtol=1e-7, atol=1e-7)
    kept = refit(rows_of(x, t), inner, outer, 1e12)
    torch.testing.assert_close(kept.outer, outer)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
def test_few_rows_are_solved_to_the_same(n: int, ridge: float) -> None:
    """In as many dimensions as there are rows."""
    x, t, weight = problem(n=n)
    whole, few = rows_of(x, t), dual_normal_equations(torch.cat([x, t], 1).flatten(0, 1)[:, None], 2, x.shape[1])
    assert isinstance(few, DualNormalEquations) and few.rows == n
    for expected, found in ((whole, few), (whole.uncentred(), few.uncentred())):
        for first, second in zip(
            least_squares(expected, weight, ridge), least_squares(found, weight, ridge), strict=True
        ):
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)
    for expected, found in (
        (
            reduced_rank(whole, weight, 4, ridge, positive(2, 4)),
            reduced_rank(few, weight, 4, ridge, positive(2, 4)),
        ),
        (refit(whole, weight[:, :2], weight[..., :2], ridge), refit(few, weight[:, :2], weight[..., :2], ridge)),
    ):
        torch.testing.assert_close(
            found.outer @ found.inner, expected.outer @ expected.inner, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-6, atol=1e-6)


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "duplicated": lambda x: torch.cat([x[:, :3], x[:, :3]], 1),
    "one row": lambda x: x[..., :1],
    "fewer rows than inputs": lambda x: x[..., :3],
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, math.pi),
    "one group zero": lambda x: x * torch.tensor([0.0, 1.0]).double()[:, None, None],
    "dead channels": lambda x: x * (torch.arange(6) < 2)[:, None],
    "far apart in scale": lambda x: x * 10.0 ** torch.arange(-9, 9, 3)[:, None],
    "tiny": lambda x: x * 1e-150,
    "far from zero": lambda x: x * 1e-9 + 1e3,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("ridge", [1e-9, 1e-3])
def test_hard_inputs_give_finite_layers(kind: str, ridge: float) -> None:
    x, t, weight = problem()
    x = HARD[kind](x)
    t = t[..., : x.shape[-1]]
    accumulator = Accumulator(2, 10, torch.device("cpu"))
    accumulator.add(torch.cat([x, t], 1).flatten(0, 1)[:, None])
    normal = normal_equations(accumulator.moments(), 6)
    solved, _ = least_squares(normal, weight, ridge)
    factors = reduced_rank(normal, weight, 4, ridge, positive(2, 4))
    again = refit(normal, weight[:, :2], torch.ones(2, 4, 2).double(), ridge)
    for part in (solved, factors.outer, factors.inner, factors.bias, again.outer, again.bias):
        assert torch.isfinite(part).all()
        assert kind == "tiny" or part.abs().max() < 1e13
    if kind in ("zero", "constant"):
        torch.testing.assert_close(solved, weight, rtol=1e-3, atol=1e-3)
    if kind == "far apart in scale" and ridge > 1e-6:
        return  # the ridge keeps the weight, right or wrong, in all directions but the largest
    error = t - factors.outer @ factors.inner @ x - factors.bias[..., None]
    assert (
        error.square().mean() <= 1.5 * (t - t.mean(-1, keepdim=True)).square().mean() + 1e-6
    )  # what the bias alone would do


@pytest.mark.parametrize("scale", [0.0, 1e-100, 1.0, 1e100])
@pytest.mark.parametrize("damping", [0.0, 0.01, math.inf])
def test_metrics_of_any_scale_give_layers_that_float32_holds(scale: float, damping: float) -> None:
    x, t, weight = problem()
    metric = scale * positive(2, 4)
    factors = reduced_rank(rows_of(x, t), weight, 4, 1e-3, damped(metric, damping))
    for part in (factors.outer.float(), factors.inner.float()):
        assert torch.isfinite(part).all()
        assert 1e-4 < part.abs().max() < 1e4
    if scale and not damping:
        expected = reduced_rank(rows_of(x, t), weight, 4, 1e-3, positive(2, 4))
        torch.testing.assert_close(factors.outer @ factors.inner, expected.outer @ expected.inner)


def test_damping_is_a_share_of_the_largest_eigenvalue() -> None:
    metric = positive(2, 4)
    largest = torch.linalg.eigvalsh(metric)[:, -1:, None]
    expected = metric + 0.1 * largest * torch.eye(4).double()
    torch.testing.assert_close(damped(metric, 0.1) * largest, expected)


# ── one layer of every kind ────────────────────────────────────────────────────────────────────────────────


def equations(site: Site, module: nn.Module, x: Tensor, target: Tensor) -> NormalEquations:
    rows = input_rows(site, module, x).reshape(site.groups, site.inputs, -1)
    return rows_of(rows, output_rows(site, target).reshape(site.groups, site.width, -1))


def halved(module: nn.Module, site: Site, x: Tensor, y: Tensor) -> Factored:
    """The layer at half its rank, on the principal directions of its outputs."""
    accumulator = Accumulator(site.groups, site.width, torch.device("cpu"))
    accumulator.add(output_rows(site, y))
    from dist_prune.factorization.bases import principal

    rank = max(site.groups, site.outputs // 2 // site.groups * site.groups)
    weight, bias = weight_of(module, site), bias_of(module, site)
    return factor(module, site, project_output(weight, bias, principal(accumulator.moments()), rank))


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", ["refit", "regression"])
def test_disturbed_inputs_are_compensated_in_layers_of_every_kind(kind: str, way: str) -> None:
    """Given x̂ ≠ x, the solved layer comes nearer to y than the projected one, and its error has mean zero."""
    module, x = layer(kind)
    site = describe("0", module)
    y = module(x)
    generator = torch.Generator().manual_seed(1)
    disturbed = 0.5 * x + 1 + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    present = halved(module, site, x, y)
    solver = Solver(way, 1e-9, (math.inf,))
    (name,) = solver.names(present)
    metric = torch.eye(site.width, dtype=x.dtype).expand(site.groups, -1, -1)
    normal = equations(site, module, disturbed, y)
    found = solver.solve(name, present, module, site, normal, metric)
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in present.named_parameters()}
    error = output_rows(site, found(disturbed) - y)
    assert error.square().sum() < 0.9 * output_rows(site, present(disturbed) - y).square().sum()
    torch.testing.assert_close(error.mean((1, 2)), torch.zeros(site.outputs).double(), rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_dense_layers_are_solved_anew_with_the_parameters_they_have(kind: str) -> None:
    """With enough rows the best layer is numpy's, with a column of ones only where there is a bias."""
    module, x = layer(kind)
    site = describe("0", module)
    generator = torch.Generator().manual_seed(1)
    many = torch.randn((60, *x.shape[1:]), generator=generator, dtype=x.dtype) + 0.5
    y = module(many)
    disturbed = many + 0.3 * torch.randn(many.shape, generator=generator, dtype=x.dtype) - 0.2
    normal = equations(site, module, disturbed, y)
    found = Solver("regression", 1e-13).solve("re-solved", module, module, site, normal, torch.zeros(0))
    assert (found.bias is None) == (module.bias is None)
    rows = input_rows(site, module, disturbed).reshape(site.groups, site.inputs, -1)
    for group in range(site.groups):
        tall = rows[group].T.numpy()
        if site.bias:
            tall = np.hstack([tall, np.ones((len(tall), 1))])
        wanted = output_rows(site, y).reshape(site.groups, site.width, -1)[group].T.numpy()
        expected = np.linalg.lstsq(tall, wanted, rcond=None)[0].T
        weight = weight_of(found, site)[group].numpy()
        np.testing.assert_allclose(weight, expected[:, : site.inputs], rtol=1e-6, atol=1e-7)
        if site.bias:
            np.testing.assert_allclose(bias_of(found, site)[group], expected[:, -1], rtol=1e-6, atol=1e-6)
