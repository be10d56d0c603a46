"""The closed-form correction against formulas written out in float64, and against what it is for."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.bases import solve
from dist_prune.config import MethodConfig
from dist_prune.models import CifarResNet
from dist_prune.moments import Accumulator, collect_moments
from dist_prune.probes import kl
from dist_prune.projection import factor, project, project_output
from dist_prune.ranks import Choice, Plan
from dist_prune.reconstruct import (
    Correction,
    Normal,
    Outcome,
    Pair,
    Solver,
    damped,
    least_squares,
    normal_equations,
    reduced_rank,
    refit,
)
from dist_prune.sites import Factored, Site, View, bias_of, describe, input_rows, output_rows, survey, weight_of
from dist_prune.statistics import Statistics
from dist_prune.walk import Pass, trace
from dist_prune.world import World
from tests.layers import LAYERS, layer
from tests.ranks import run_ranks

# ── one site's equations ───────────────────────────────────────────────────────────────────────────────────


def rows_of(x: Tensor, t: Tensor) -> Normal:
    """Normal equations of rows x (g, d, n), t (g, c, n), from first principles."""
    n, mean_x, mean_t = x.shape[-1], x.mean(-1), t.mean(-1)
    x, t = x - mean_x[..., None], t - mean_t[..., None]
    return Normal(mean_x, mean_t, x @ x.mT / n, t @ x.mT / n, n)


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


def equations(site: Site, module: nn.Module, x: Tensor, target: Tensor) -> Normal:
    rows = input_rows(site, module, x).reshape(site.groups, site.inputs, -1)
    return rows_of(rows, output_rows(site, target).reshape(site.groups, site.width, -1))


def halved(module: nn.Module, site: Site, x: Tensor, y: Tensor) -> Factored:
    """The layer at half its rank, on the principal directions of its outputs."""
    accumulator = Accumulator(site.groups, site.width, torch.device("cpu"))
    accumulator.add(output_rows(site, y))
    from dist_prune.bases import principal

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


# ── whole networks ─────────────────────────────────────────────────────────────────────────────────────────


class Unit(nn.Module):
    """A residual block; its shortcut is projected where the channels change."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        changes = channels_in != channels
        self.down = nn.Conv2d(channels_in, channels, 1, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(Unit(6, 6), Unit(6, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(F.relu(self.stem(x))).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small().double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.3, 0.6)
            nn.init.uniform_(norm.weight, 0.8, 1.5)
    nn.init.normal_(model.head.weight, std=2)
    return model


def pictures(count: int, seed: int = 3) -> Tensor:
    """Smooth, like pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, size=(8, 8), mode="bilinear")


def like(model: nn.Module) -> Tensor:
    """One picture, of the model's type."""
    return pictures(1).to(next(model.parameters()).dtype)


def compressed_copy(model: nn.Module, x: Tensor, world: World, share: float) -> nn.Module:
    sites = survey(model, x[:1]).sites
    moments = collect_moments(model, map(View, sites), [x], world)
    bases = solve(model, sites, Statistics(moments), MethodConfig(), 0, world)
    choices = [Choice(s.name, round(s.outputs * share)) for s in sites if s.name != "head"]
    return project(model, sites, bases, Plan(tuple(choices))).eval()


def walk_of(
    dense: nn.Module,
    compressed: nn.Module,
    x: Tensor,
    judged: Tensor,
    world: World,
    solver: Solver | None = None,
    residual_aware: bool = True,
    **options: int,
) -> Correction:
    """Batches of five."""
    program = trace(dense, [s.name for s in survey(dense, like(dense)).sites])
    if not residual_aware:
        object.__setattr__(program, "shortcuts", {})
    pairs = [Pair(Pass(program, dense, b), Pass(program, compressed, b)) for b in x.split(5) if len(b)]
    with torch.no_grad():
        pairs += [
            Pair(Pass(program, dense, b), Pass(program, compressed, b), dense(b))
            for b in judged.split(5)
            if len(b)
        ]
    sites = survey(dense, like(dense)).sites
    metrics = {s.name: positive(s.groups, s.width) for s in sites}
    solver = solver or Solver("regression", 1e-4, (0.1, math.inf))
    return Correction(program, dense, compressed, pairs, metrics, solver, world, **options)


def corrected(
    dense: nn.Module, compressed: nn.Module, *args: object, **options: object
) -> tuple[nn.Module, list[Outcome]]:
    network = copy.deepcopy(compressed)
    walk = walk_of(dense, network, *args, **options)
    return network, list(walk.run(survey(dense, like(dense)).sites))


@torch.no_grad()
def away(dense: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float((other(x) - dense(x)).square().mean())


@torch.no_grad()
def divergence(dense: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float(kl(dense(x), other(x)).mean())


@pytest.mark.parametrize("kind", ["refit", "regression"])
def test_nothing_changes_where_nothing_was_lost(kind: str, world: World) -> None:
    dense, x = small(), pictures(60)
    whole = compressed_copy(dense, x, world, 1.0)
    network, outcomes = corrected(dense, whole, x, pictures(10, 4), world, Solver(kind, 1e-4))
    assert len(outcomes) == 7
    torch.testing.assert_close(network(pictures(9, 5)), dense(pictures(9, 5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["refit", "regression"])
def test_the_network_comes_nearer_on_what_it_saw_and_on_what_it_did_not(kind: str, world: World) -> None:
    dense, x, judged, fresh = small(), pictures(120), pictures(30, 4), pictures(60, 5)
    projected = compressed_copy(dense, x, world, 0.5)
    network, outcomes = corrected(dense, projected, x, judged, world, Solver(kind, 1e-4, (math.inf,)))
    assert away(dense, network, x) < 0.7 * away(dense, projected, x)
    assert divergence(dense, network, judged) < divergence(dense, projected, judged)
    assert divergence(dense, network, fresh) < divergence(dense, projected, fresh)
    order = ["stem", "units.0.conv1", "units.0.conv2", "units.1.conv1", "units.1.down", "units.1.conv2", "head"]
    assert [o.site for o in outcomes] == order
    assert [o.rows for o in outcomes] == [120 * 64] * 6 + [120]


@torch.no_grad()
def test_each_choice_is_the_least_of_the_held_out_divergences_that_a_forward_pass_gives(world: World) -> None:
    """The loss told for the last site, after which nothing is dense, is that of the finished network."""
    dense, x, judged = small(), pictures(60), pictures(15, 4)
    projected = compressed_copy(dense, x, world, 0.5)
    network, outcomes = corrected(dense, projected, x, judged, world)
    for outcome in outcomes:
        assert outcome.tried[outcome.chosen] == min(outcome.tried.values()) <= outcome.tried["kept"]
    assert set(outcomes[0].tried) == {"kept", "regression, damping 0.1", "regression, damping inf"}
    assert set(outcomes[-1].tried) == {"kept", "re-solved"}
    last = outcomes[-1].tried[outcomes[-1].chosen]
    assert last == pytest.approx(divergence(dense, network, judged), rel=1e-9)
    hybrid = copy.deepcopy(dense)
    hybrid.stem = projected.stem
    assert outcomes[0].tried["kept"] == pytest.approx(divergence(dense, hybrid, judged), rel=1e-9)


@torch.no_grad()
def test_a_layer_is_kept_where_solving_makes_it_worse(world: World) -> None:
    """Images to solve from that have nothing in common with those that judge."""
    dense, judged = small(), pictures(30, 4)
    projected = compressed_copy(dense, judged, world, 0.9)
    wrong = 1e-3 * pictures(3, 8) + 5
    network, outcomes = corrected(dense, projected, wrong, judged, world, Solver("refit", 1e-9))
    kept = [o.site for o in outcomes if o.chosen == "kept"]
    assert kept
    for name in kept:
        before, after = projected.get_submodule(name), network.get_submodule(name)
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_layers_that_give_nonsense_are_not_chosen(world: World) -> None:
    dense, x, judged = small(), pictures(30), pictures(10, 4)
    projected = compressed_copy(dense, x, world, 0.5)
    projected.stem.expand.weight[0, 0] = float("nan")
    _, outcomes = corrected(dense, projected, x, judged, world, Solver("regression", 1e-4, (math.inf,)))
    assert outcomes[0].tried["kept"] == math.inf
    assert outcomes[0].chosen == "regression, damping inf"


@pytest.mark.parametrize("site", ["units.0.conv2", "units.1.conv2"])
def test_a_damaged_shortcut_is_repaired_by_the_residual_aware_target(site: str, world: World) -> None:
    """What the stem loses reaches the first block's end on the shortcut, and what `down` loses the second's."""
    dense, x, judged = small(), pictures(200), pictures(40, 4)
    damaged = copy.deepcopy(dense)
    with torch.no_grad():
        lost = damaged.stem if site == "units.0.conv2" else damaged.units[1].down
        lost.weight[0] = 0
    only = tuple(s for s in survey(dense, x[:1]).sites if s.name == site)
    errors = {}
    for aware in (True, False):
        network = copy.deepcopy(damaged)
        walk = walk_of(dense, network, x, judged, world, Solver("regression", 1e-6), residual_aware=aware)
        object.__setattr__(walk.program, "stops", {site: walk.program.stops[site]})
        list(walk.run(only))
        errors[aware] = away(dense, network, judged)
    assert errors[True] < 0.9 * errors[False]
    assert errors[True] < away(dense, damaged, judged)


@torch.no_grad()
def test_the_target_is_the_dense_output_and_what_the_shortcut_lost_before_the_norm(world: World) -> None:
    """bn(target) + ŝ is bn(y) + s, except in channels that the norm all but closes."""
    dense, x = small(), pictures(5)
    norm = dense.units[0].bn2
    norm.weight[2] = 0
    norm.weight[3] = -1e-6
    projected = compressed_copy(dense, x, world, 0.5)
    walk = walk_of(dense, projected, x, x, world)
    site = next(s for s in survey(dense, x[:1]).sites if s.name == "units.0.conv2")
    _, target = walk._advance(site, walk.pairs[0])
    shortcut, full = (F.relu(model.stem(x)) for model in (projected, dense))
    y = dense.units[0].conv2(F.relu(dense.units[0].bn1(dense.units[0].conv1(full))))
    wanted = norm(y) + full
    open_ = [0, 1, 4, 5]
    torch.testing.assert_close((norm(target) + shortcut)[:, open_], wanted[:, open_], rtol=1e-10, atol=1e-10)
    assert torch.equal(target[:, [2, 3]], y[:, [2, 3]])


class Spread(nn.Module):
    """One vector an image, added at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.context, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.context(x.mean((2, 3), keepdim=True))).mean((2, 3)))


def test_an_output_repeated_over_positions_keeps_the_plain_target(world: World) -> None:
    torch.manual_seed(0)
    dense, x = Spread().double().eval(), pictures(20)
    projected = compressed_copy(dense, x, world, 0.5)
    walk = walk_of(dense, projected, x, pictures(5, 4), world)
    assert set(walk.program.shortcuts) == {"context"}
    outcomes = list(walk.run(survey(dense, x[:1]).sites))
    assert [(o.site, o.rows) for o in outcomes] == [("stem", 20 * 64), ("context", 20), ("head", 20)]


def test_sites_too_wide_stay_as_they_are(world: World) -> None:
    dense, x = small(), pictures(20)
    projected = compressed_copy(dense, x, world, 0.5)
    network, outcomes = corrected(dense, projected, x, pictures(5, 4), world, widest=40)
    assert [o.site for o in outcomes] == ["stem", "units.1.down", "head"]
    assert torch.equal(network.units[0].conv1.reduce.weight, projected.units[0].conv1.reduce.weight)


def test_little_memory_changes_nothing_but_the_time(world: World) -> None:
    dense, x, judged = small(), pictures(20), pictures(5, 4)
    projected = compressed_copy(dense, x, world, 0.5)
    plain, _ = corrected(dense, projected, x, judged, world)
    spared, _ = corrected(dense, projected, x, judged, world, memory=1)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, spared.state_dict()[name])


def test_positions_are_a_seeded_subset(world: World) -> None:
    dense, x, judged = small(), pictures(40), pictures(10, 4)
    projected = compressed_copy(dense, x, world, 0.5)

    def solved(**options: int) -> tuple[Tensor, int]:
        network, outcomes = corrected(dense, projected, x, judged, world, Solver("refit", 1e-4), **options)
        return network.stem.expand.weight, outcomes[0].rows

    few, rows = solved(positions=16, seed=1)
    assert rows == 40 * 16
    assert torch.equal(few, solved(positions=16, seed=1)[0])
    assert not torch.equal(few, solved(positions=16, seed=2)[0])
    everything, rows = solved()
    assert rows == 40 * 64
    assert torch.equal(everything, solved(positions=64)[0])


def test_the_dense_network_and_float32_layers_keep_what_they_are(world: World) -> None:
    dense = CifarResNet(20).eval()
    x = pictures(8).float()
    before = copy.deepcopy(dense.state_dict())
    sites = survey(dense, x[:1]).sites
    bases = solve(dense, sites, Statistics({}), MethodConfig(method="weight-svd"), 0, world)
    projected = project(dense, sites, bases, Plan(tuple(Choice(s.name, s.outputs // 2) for s in sites))).eval()
    network, outcomes = corrected(dense, projected, x, pictures(4, 4).float(), world)
    assert len(outcomes) == len(sites) == 20
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


# ── any number of ranks ────────────────────────────────────────────────────────────────────────────────────


def share(world: World) -> tuple[dict[str, Tensor], list[str]]:
    """Uneven shards; of three ranks the last has nothing to solve from."""
    x, judged = pictures(40), pictures(11, 4)
    dense = small()
    cuts = {1: [0, 40], 2: [0, 27, 40], 3: [0, 12, 40, 40]}[world.size]
    held = {1: [0, 11], 2: [0, 0, 11], 3: [0, 4, 4, 11]}[world.size]
    mine = x[cuts[world.rank] : cuts[world.rank + 1]]
    own = judged[held[world.rank] : held[world.rank + 1]]
    projected = compressed_copy(dense, mine if len(mine) else x[:0], world, 0.5)
    network, outcomes = corrected(dense, projected, mine, own, world)
    return network.state_dict(), [o.chosen for o in outcomes]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_uneven_ranks_gives_the_same(size: int, world: World) -> None:
    alone, choices = share(world)
    results = run_ranks(share, size)
    for state, chosen in results:
        assert chosen == choices
        for name, expected in alone.items():
            assert torch.equal(state[name], results[0][0][name])
            torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-6)
