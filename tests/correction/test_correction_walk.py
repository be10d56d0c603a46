"""Correction from site to site through whole networks, on any number of ranks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.correction.reconstruct import Correction, Pair, SiteCorrection, choose, left_out
from dist_prune.correction.solver import Solver
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import project
from dist_prune.network.models import CifarResNet
from dist_prune.network.replay import AnyPass, Route
from dist_prune.network.sites import View, survey
from dist_prune.network.tracing import trace
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.moments import collect_moments
from dist_prune.statistics.probes import kl
from tests.correction.test_reconstruct import positive
from tests.ranks import run_ranks


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
    route: Route | None = None,
    **options: int,
) -> Correction:
    """Batches of five."""
    route = route or trace(dense, [s.name for s in survey(dense, like(dense)).sites])
    if not residual_aware:
        object.__setattr__(route, "shortcuts", {})

    def passes(batch: Tensor) -> tuple[AnyPass, AnyPass]:
        return route.begin(dense, batch, torch.clone), route.begin(compressed, batch, torch.clone)

    pairs = [Pair(*passes(b)) for b in x.split(5) if len(b)]
    with torch.no_grad():
        pairs += [Pair(*passes(b), dense(b)) for b in judged.split(5) if len(b)]
    sites = survey(dense, like(dense)).sites
    metrics = {s.name: positive(s.groups, s.width) for s in sites}
    solver = solver or Solver("regression", 1e-4, (0.1, math.inf))
    return Correction(route, dense, compressed, pairs, metrics, solver, world, **options)


def corrected(
    dense: nn.Module, compressed: nn.Module, *args: object, **options: object
) -> tuple[nn.Module, list[SiteCorrection]]:
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
def test_each_choice_is_the_best_solved_by_the_held_out_divergence_that_a_forward_pass_gives(world: World) -> None:
    """The loss text for the last site, after which nothing is dense, is that of the finished network."""
    dense, x, judged = small(), pictures(60), pictures(15, 4)
    projected = compressed_copy(dense, x, world, 0.5)
    network, outcomes = corrected(dense, projected, x, judged, world)
    for outcome in outcomes:
        solved = {name: loss for name, loss in outcome.tried.items() if name != "kept"}
        assert outcome.chosen == "kept" or outcome.tried[outcome.chosen] == min(solved.values())
    assert sum(outcome.chosen != "kept" for outcome in outcomes) >= len(outcomes) - 1
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


def test_a_solved_layer_is_taken_unless_it_is_clearly_worse() -> None:
    assert choose([0.2, 0.3, 0.1], [0.0, 0.01, 0.01]) == 2
    assert choose([0.20, 0.22], [0.0, 0.01]) == 1, "within three standard errors"
    assert choose([0.20, 0.24], [0.0, 0.01]) == 0
    assert choose([0.20, 9.0], [0.0, math.inf]) == 1, "of one image nothing is known"
    assert choose([math.inf, 9.0], [math.inf, math.inf]) == 1
    assert choose([0.2, math.inf], [0.0, math.inf]) == 0


@torch.no_grad()
def test_standard_errors_are_of_paired_differences(world: World) -> None:
    dense, x, judged = small(), pictures(30), pictures(11, 4)
    walk = walk_of(dense, compressed_copy(dense, x, world, 0.5), x, judged, world)
    site = survey(dense, like(dense)).sites[0]
    for pair in walk.pairs:
        walk._advance(site, pair)
    layers = [walk.compressed.get_submodule(site.name), dense.get_submodule(site.name)]
    losses, errors = walk._holdout_kls(site, layers)
    hybrid = copy.deepcopy(dense)
    hybrid.set_submodule(site.name, layers[0])
    each = [kl(dense(judged), network(judged)) for network in (hybrid, dense)]
    assert losses == pytest.approx([float(v.mean()) for v in each], rel=1e-9, abs=1e-12)
    assert errors[0] == 0
    assert errors[1] == pytest.approx(float((each[1] - each[0]).std()) / 11**0.5, rel=1e-6)


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
    solved = ["stem", "units.1.down", "head"]
    assert [o.site for o in outcomes] == solved
    sites = survey(dense, like(dense)).sites
    left = left_out(sites, trace(dense, [site.name for site in sites]), 40)
    assert set(left) == {site.name for site in sites} - set(solved)
    assert left["units.0.conv1"] == "54 + 6 dimensions, more than 40"
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


def test_few_images_are_solved_to_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From their rows instead of the products of these; the head has one row an image."""
    dense, x, judged = small(), pictures(4), pictures(10, 4)
    projected = compressed_copy(dense, pictures(60), world, 0.5)
    few, outcomes = corrected(dense, projected, x, judged, world)
    assert outcomes[-1].rows == 4
    monkeypatch.setattr(Correction, "_rows_to_come", lambda *_: 1 << 30)
    many, expected = corrected(dense, projected, x, judged, world)
    assert [o.chosen for o in outcomes] == [o.chosen for o in expected]
    for name, tensor in many.state_dict().items():
        torch.testing.assert_close(few.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


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
