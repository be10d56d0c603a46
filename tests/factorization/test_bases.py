import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import (
    at_random,
    by_fisher,
    by_gradient,
    by_weight,
    eigenbasis,
    principal,
    solve,
    spread,
    whitened,
)
from dist_prune.network.sites import describe
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.moments import Accumulator, Moments
from tests.ranks import run_ranks


def rows(groups: int = 2, width: int = 6, count: int = 400, seed: int = 0) -> Tensor:
    """Correlated rows, (g·k, 1, count)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, width, count, generator=generator, dtype=torch.float64)
    return (mix @ x + 3).reshape(groups * width, 1, count)


def moments(groups: int = 2, width: int = 6, seed: int = 0) -> Moments:
    accumulator = Accumulator(groups, width, torch.device("cpu"))
    accumulator.add(rows(groups, width, seed=seed))
    return accumulator.moments()


def symmetric(groups: int, width: int, seed: int = 1) -> Tensor:
    half = torch.randn(groups, width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half + half.mT


def positive(groups: int, width: int, seed: int = 1) -> Tensor:
    half = symmetric(groups, width, seed)
    return half @ half


ALL = {
    "pca": lambda: principal(moments()),
    "whitened-svd": lambda: whitened(moments(), torch.ones(2, 6, dtype=torch.float64)),
    "gradient": lambda: by_gradient(symmetric(2, 6), moments().mean, greedy=False),
    "greedy": lambda: by_gradient(symmetric(2, 6), moments().mean, greedy=True),
    "fisher": lambda: by_fisher(moments(), positive(2, 6), 0.01),
    "weight-svd": lambda: by_weight(symmetric(2, 6), moments().mean, "output"),
    "random": lambda: at_random(principal(moments()), 3),
    "hessian": lambda: eigenbasis(symmetric(2, 6), moments().mean),
}


@pytest.mark.parametrize("name", ALL)
def test_encode_and_decode_are_inverse_and_the_spectrum_descends(name: str) -> None:
    basis = ALL[name]()
    identity = torch.eye(6).double().expand(2, 6, 6)
    torch.testing.assert_close(basis.decode @ basis.encode, identity, rtol=0, atol=1e-9)
    assert (basis.spectrum.diff(dim=-1) <= 1e-12).all()
    encode, decode = basis.kept(4)
    assert encode.shape == (2, 2, 6)
    assert decode.shape == (2, 6, 2)


def test_pca_spectrum_is_the_variance_along_its_directions() -> None:
    basis, x = principal(moments()), rows().reshape(2, 6, -1)
    along = basis.encode @ (x - basis.mean[..., None])
    torch.testing.assert_close(along.var(-1, correction=0), basis.spectrum, rtol=1e-9, atol=1e-12)


def test_gradient_orders_by_magnitude_or_greedily_by_predicted_rise() -> None:
    matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0, -2.0], dtype=torch.float64))[None]
    mean = torch.zeros(1, 4, dtype=torch.float64)
    by_size = by_gradient(matrix, mean, greedy=False)
    assert by_size.decode[0].abs().argmax(0).tolist() == [1, 0, 3, 2]
    assert by_size.spectrum[0].tolist() == [5, 3, 2, 1]
    greedy = by_gradient(matrix, mean, greedy=True)
    assert greedy.decode[0].abs().argmax(0).tolist() == [1, 3, 2, 0]  # removing −5 costs most, removing 3 gains
    assert greedy.spectrum[0].tolist() == [5, 2, -1, -3]


def test_fisher_in_the_metric_of_the_identity_is_pca() -> None:
    pca = principal(moments())
    fisher = by_fisher(moments(), torch.eye(6).double().expand(2, 6, 6), damping=1e-12)
    torch.testing.assert_close(fisher.spectrum, pca.spectrum, rtol=1e-9, atol=1e-12)
    for rank in (2, 6, 10):
        projections = [b.kept(rank)[1] @ b.kept(rank)[0] for b in (fisher, pca)]
        torch.testing.assert_close(projections[0], projections[1], rtol=1e-8, atol=1e-9)


def test_fisher_keeps_what_loses_least_in_its_metric() -> None:
    """Its rank-r projection P minimises E[(y−Py)ᵀG(y−Py)], the minimum being the eigenvalues left out."""
    metric = positive(1, 6)
    stats = moments(1)
    basis = by_fisher(stats, metric, damping=1e-14)
    x = rows(1).reshape(1, 6, -1) - stats.mean[..., None]

    def loss(projection: Tensor) -> Tensor:
        lost = x - projection @ x
        return (lost * (metric @ lost)).sum() / x.shape[-1]

    for rank in (1, 3, 5):
        encode, decode = basis.kept(rank)
        found = loss(decode @ encode)
        torch.testing.assert_close(found, basis.spectrum[0, rank:].sum(), rtol=1e-6, atol=1e-9)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(20):  # no other projection of that rank does better
            noise = torch.randn(2, 1, 6, rank, generator=generator, dtype=torch.float64) * 0.05
            near = (decode + noise[0]) @ torch.linalg.pinv(decode + noise[1])
            assert loss(near) >= found - 1e-12
    assert loss(principal(stats).kept(3)[1] @ principal(stats).kept(3)[0]) > loss(
        basis.kept(3)[1] @ basis.kept(3)[0]
    )


def test_damping_bounds_the_metric_from_below() -> None:
    metric = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))[None]
    basis = by_fisher(moments(1, 3), metric, 0.01)
    assert torch.isfinite(basis.decode).all()
    for empty in (torch.zeros_like(metric),):
        assert torch.isfinite(by_fisher(moments(1, 3), empty, 0.01).decode).all()


@pytest.mark.parametrize("side", ["output", "input"])
def test_weight_svd_is_eckart_young_of_the_weight(side: str) -> None:
    weight = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias = torch.randn(2, 5, dtype=torch.float64)
    encode, decode = by_weight(weight, bias, side).kept(6)
    low = decode @ encode @ weight if side == "output" else weight @ decode @ encode
    u, s, v = torch.linalg.svd(weight)
    expected = u[..., :3] * s[:, None, :3] @ v[:, :3]
    torch.testing.assert_close(low, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_whitened_svd_is_the_truncated_svd_of_the_weight_times_the_root_of_the_second_moment(groups: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, bias, x = (
        torch.randn(groups, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (5,), (7, 90))
    )
    x = x + 2  # far from centred
    accumulator = Accumulator(groups, 5, torch.device("cpu"))
    accumulator.add((weight @ x + bias[..., None]).flatten(0, 1)[:, None])
    basis = whitened(accumulator.moments(), bias)
    encode, decode = basis.kept(3 * groups)

    values, vectors = torch.linalg.eigh(x @ x.mT / 90)
    root = vectors * values.sqrt()[:, None] @ vectors.mT
    u, s, v = torch.linalg.svd(weight @ root)
    expected = u[..., :3] * s[:, None, :3] @ v[:, :3] @ torch.linalg.inv(root)
    torch.testing.assert_close(decode @ encode @ weight, expected)
    torch.testing.assert_close(basis.spectrum, s.square())
    assert torch.equal(basis.mean, bias)


def test_random_directions_differ_by_seed_only() -> None:
    like = principal(moments())
    assert torch.equal(at_random(like, 1).encode, at_random(like, 1).encode)
    assert not torch.allclose(at_random(like, 1).encode, at_random(like, 2).encode)


LAYERS = {"0": (7, 6), "1": (6, 30), "2": (30, 20), "3": (20, 6)}  # inputs, outputs
CUBES = [outputs**3 for _, outputs in LAYERS.values()]


def solve_on(world: World, method: str) -> dict[str, list[Tensor]]:
    """Every rank has statistics only of the layers that are its share: no other may be solved there."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*shape) for shape in LAYERS.values())).double()
    owners = dict(zip(LAYERS, spread(CUBES, world.size), strict=True))
    own = {name: outputs for name, (_, outputs) in LAYERS.items() if owners[name] == world.rank}
    statistics = Statistics(
        {name: moments(1, outputs) for name, outputs in own.items()},
        {name: positive(1, outputs) for name, outputs in own.items()},
    )
    sites = [describe(name, layer) for name, layer in model.named_children()]
    found = solve(model, sites, statistics, MethodConfig(method=method), 0, world)
    return {name: [b.encode, b.decode, b.mean, b.spectrum] for name, b in found.items()}


def solve_all(world: World) -> list[dict[str, list[Tensor]]]:
    return [solve_on(world, method) for method in ("pca", "fisher", "random")]


def test_layers_are_shared_out_and_any_number_of_ranks_gets_the_same_bits(world: World) -> None:
    alone = solve_all(world)
    assert [list(found) for found in alone] == 3 * [list(LAYERS)]
    for found in (*run_ranks(solve_all, 2), *run_ranks(solve_all, 3)):
        for mine, theirs in zip(alone, found, strict=True):
            pairs = ((a, b) for name in LAYERS for a, b in zip(mine[name], theirs[name], strict=True))
            assert all(torch.equal(a, b) for a, b in pairs)


def test_the_longest_work_is_shared_out_first() -> None:
    assert spread(CUBES, 1) == [0, 0, 0, 0]
    assert spread(CUBES, 2) == [1, 0, 1, 1]
    assert spread(CUBES, 3) == [2, 0, 1, 2]
    assert spread([1, 1], 5) == [0, 1]
    assert spread([], 2) == []
