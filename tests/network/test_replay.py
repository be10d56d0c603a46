"""Networks that torch.fx cannot trace: the same inputs, outputs and corrections as where it can."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.correction.reconstruct import SiteCorrection
from dist_prune.correction.solver import Solver
from dist_prune.distributed.world import World
from dist_prune.network.replay import Listing, Rerun, follow, listing
from dist_prune.network.sites import survey
from dist_prune.network.tracing import Program, trace
from tests.correction.test_correction_walk import Small, Unit, away, compressed_copy, corrected, pictures
from tests.networks import NETWORKS, seeded
from tests.ranks import run_ranks


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    return [site.name for site in survey(model, x[:1]).sites]


def listed(model: nn.Module, x: Tensor) -> Listing:
    return listing(model, names_of(model, x), x, "to see whether it works")


# ── which way to go ────────────────────────────────────────────────────────────────────────────────────────


class Deciding(Small):
    """Two ways, chosen by the images; the second passes by a block."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 2:
            return self.head(self.units[1](F.relu(self.stem(x))).mean((2, 3)))
        return super().forward(x)


class Careful(Deciding):
    """Catches what goes wrong inside."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception:
            return self.head(x.new_zeros(x.shape[0], 8))


class Peeking(Small):
    """Notices that it is traced, and does something else then."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if type(x) is not Tensor else 2 * x)


def small_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double().eval()
    nn.init.normal_(model.head.weight, std=2)
    return model


ORDER = ["stem", "units.0.conv1", "units.0.conv2", "units.1.conv1", "units.1.conv2", "units.1.down", "head"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Deciding, "torch.fx cannot trace Deciding: "),
        (Careful, "what torch.fx traced of Careful computes something else than Careful"),
        (Peeking, "what torch.fx traced of Peeking computes something else than Peeking"),
    ],
)
def test_what_cannot_be_traced_right_is_listed_and_the_reason_kept(kind: type[nn.Module], reason: str) -> None:
    model, x = small_of(kind).train(), pictures(2)
    route = follow(model, ORDER, x)
    assert isinstance(route, Listing)
    assert route.reason.startswith(reason)
    assert list(route.stops) == ORDER
    assert list(route.stops.values()) == list(range(len(ORDER)))
    assert not route.shortcuts
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "vit", "resnet20"])
def test_what_can_be_traced_is(name: str) -> None:
    make, size = NETWORKS[name]
    model = seeded(make)
    x = torch.randn(1, 3, size, size)
    assert isinstance(follow(model, names_of(model, x), x), Program)


def test_sites_called_more_than_once_or_never_are_no_stops() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once, self.never = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.once(self.twice(self.twice(x.mean((2, 3)))))

    assert list(listing(Shared(), ["twice", "once", "never"], torch.zeros(1, 3, 2, 2), "").stops) == ["once"]


# ── passes ─────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "vit", "googlenet"])
def test_at_every_site_it_holds_what_a_traced_pass_holds(name: str) -> None:
    make, size = NETWORKS[name]
    model = seeded(make)
    x = torch.randn(2, 3, size, size)
    route = listed(model, x)
    plain, again = trace(model, list(route.stops)).begin(model, x, torch.clone), Rerun(route, model, x)
    for index, (site, place) in enumerate(plain.program.stops.items()):
        if index % 4 == 1:
            plain.advance(place)
            again.advance(route.stops[site])
            assert torch.equal(again.input_of(site), plain.input_of(site))
            assert again.bytes == again.input_of(site).untyped_storage().nbytes()
            assert torch.equal(again.output_of(site), plain.output_of(site))
    again.restart()
    assert not again.bytes


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "vit", "googlenet"])
def test_an_outcome_is_a_forward_pass_with_that_output_forced(name: str) -> None:
    """Everything before is one network's, everything after the other's; both are left as they were."""
    make, size = NETWORKS[name]
    dense = seeded(make)
    other = copy.deepcopy(dense)
    x = torch.randn(2, 3, size, size)
    route = listed(dense, x)
    for site in route.stops:
        other.get_submodule(site).weight.mul_(0.9)
    before = dict(other.named_modules())
    again = Rerun(route, other, x)
    for index, site in enumerate(route.stops):
        if index % 5 == 1:
            again.advance(index)
            forced = torch.randn_like(again.output_of(site))
            mixed = copy.deepcopy(other)
            for after in list(route.stops)[index + 1 :]:
                mixed.get_submodule(after).load_state_dict(dense.get_submodule(after).state_dict())
            mixed.get_submodule(site).register_forward_hook(lambda _m, _i, _y, forced=forced: forced.clone())
            as_it_was = forced.clone()
            assert torch.equal(again.outcome(dense, forced), mixed(x))
            assert torch.equal(forced, as_it_was)
    assert dict(other.named_modules()) == before


def test_a_network_that_catches_exceptions_is_stopped_all_the_same() -> None:
    model, x = small_of(Careful), pictures(2)
    found = Rerun(listed(model, x), model, x).input_of("units.0.conv1")
    torch.testing.assert_close(found, F.relu(model.stem(x)))


def test_a_site_that_is_passed_by_is_given_an_empty_batch() -> None:
    model, x = small_of(Deciding), pictures(2)
    route = listed(model, x)
    passing = Rerun(route, model, x + 5)
    assert passing.input_of("units.0.conv1").shape == (0, 6, 8, 8)
    assert passing.output_of("units.0.conv1").shape == (0, 6, 8, 8)
    assert passing.input_of("units.1.conv1").shape == (2, 6, 8, 8)


# ── corrections ────────────────────────────────────────────────────────────────────────────────────────────


class Same(Small):
    """No projection, so that the traced order is the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.head = nn.Sequential(Unit(6, 6), Unit(6, 6)), nn.Linear(6, 5)


def both_ways(world: World, make: Callable[[], nn.Module]) -> list[tuple[dict[str, Tensor], list[SiteCorrection]]]:
    """Corrected along the traced graph with plain targets, and along the list of sites; an uneven share each."""
    dense, x, judged = make(), pictures(40), pictures(15, 4)
    projected = compressed_copy(dense, x[world.rank :: world.size], world, 0.5)
    mine = x[: 25 if world.size > 1 else 40] if world.rank == 0 else x[25:]
    own = judged[world.rank :: world.size]
    routes = trace(dense, names_of(dense, x)), listed(dense, x[:1])
    found = []
    for route in routes:
        solver = Solver("regression", 1e-4, (0.1,))
        network, outcomes = corrected(
            dense, projected, mine, own, world, solver, residual_aware=False, route=route
        )
        found.append((network.state_dict(), outcomes))
    return found


def same() -> nn.Module:
    return small_of(Same)


@pytest.mark.parametrize("size", [1, 2])
def test_the_correction_is_that_of_a_traced_network_with_plain_targets(size: int) -> None:
    for (plain, text), (again, text_again) in run_ranks(both_ways, size, same):
        assert [o.chosen for o in text] == [o.chosen for o in text_again]
        assert any(o.chosen != "kept" for o in text)
        for first, second in zip(text, text_again, strict=True):
            assert first.tried == pytest.approx(second.tried, rel=1e-9)
        for name, tensor in plain.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-9, atol=1e-12)


def test_sites_that_some_batches_pass_by_are_solved_from_the_others(world: World) -> None:
    dense, x, judged = small_of(Deciding), pictures(40), pictures(15, 4)
    projected = compressed_copy(dense, x, world, 0.5)
    mixed, both = torch.cat([x, x[:10] + 5]), torch.cat([judged, judged[:5] + 5])
    network, outcomes = corrected(dense, projected, mixed, both, world, route=listed(dense, x[:1]))
    rows = {o.site: o.rows for o in outcomes}
    assert rows["stem"] == 50 * 64 and rows["units.0.conv1"] == 40 * 64 and rows["head"] == 50
    assert away(dense, network, judged) < away(dense, projected, judged)
