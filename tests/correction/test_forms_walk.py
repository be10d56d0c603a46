"""Networks whose sites have all forms: projected, then solved again one by one, on any number of ranks."""

import math

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.correction.solver import Solver
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Choice, Plan, choose
from dist_prune.factorization.project import project
from dist_prune.network.sites import describe, survey
from dist_prune.statistics.collect import collect
from tests.correction.test_correction_walk import away, corrected, divergence, like, pictures, small
from tests.ranks import run_ranks

PLAN = Plan(
    (
        choose("stem", "input", (2,)),
        choose("units.0.conv1", "vertical", (6,)),
        choose("units.0.conv2", "horizontal", (6,)),
        choose("units.1.conv1", "tucker", (4, 5)),
        choose("units.1.conv2", "output", (4,)),
        Choice("head", None),
    )
)
FULL = Plan(
    tuple(
        choose(c.site, c.form, FORMS[c.form].full_ranks(describe(c.site, small().get_submodule(c.site))))
        for c in PLAN.factored.values()
    )
)


def projected(dense: nn.Module, x: Tensor, plan: Plan, world: World) -> nn.Module:
    """Every rank has all images here: what is shared out is what is solved."""
    sites, method = survey(dense, like(dense)).sites, MethodConfig("pca")
    mine = x if world.is_first else x[:0]
    indices = torch.arange(len(mine))
    sums = collect(dense, sites, lambda _: [Batch(mine, indices, indices)], world, method, 0, patches=True)
    bases = solve(dense, sites, sums, method, 0, world)
    nested = nested_of(dense, sites, FORMS, bases, sums, 0.0, world)
    return project(dense, sites, bases, plan, "output", nested).eval()


def test_at_full_ranks_the_network_is_the_dense_one_projected_and_solved(world: World) -> None:
    dense, x = small(), pictures(30)
    network = projected(dense, x, FULL, world)
    assert away(dense, network, x) < 1e-18
    for kind in ("regression", "refit"):
        again, outcomes = corrected(dense, network, x, x[:5], world, Solver(kind, 1e-3, (0.1,)))
        assert away(dense, again, x) < 1e-16
        assert len(outcomes) == 7


@pytest.mark.parametrize("kind", ["regression", "refit"])
def test_solving_brings_every_form_nearer(kind: str, world: World) -> None:
    dense, x = small(), pictures(30)
    network = projected(dense, x, PLAN, world)
    again, outcomes = corrected(dense, network, x, pictures(20, 4), world, Solver(kind, 1e-4, (math.inf,)))
    assert divergence(dense, again, x) < 0.8 * divergence(dense, network, x)
    layers = {name: getattr(again.get_submodule(name), "form", "dense") for name in PLAN.factored}
    assert layers == {name: choice.form for name, choice in PLAN.factored.items()}
    taken = {o.site: o.chosen for o in outcomes}
    assert sum(taken[name].startswith(kind) for name in PLAN.factored) >= 2
    rank = [again.get_submodule(name)[0].weight.shape[0] for name in PLAN.factored]
    assert rank == [choice.ranks[0] for choice in PLAN.factored.values()]


def share(world: World) -> dict[str, Tensor]:
    """Uneven: the last of three ranks has nothing to solve from."""
    dense, x = small(), pictures(24)
    network = projected(dense, x, PLAN, world)
    cuts = {1: [0, 24], 2: [0, 17, 24], 3: [0, 17, 24, 24]}[world.size]
    mine = x[cuts[world.rank] : cuts[world.rank + 1]]
    held = pictures(10, 4) if world.is_first else x[:0]
    return corrected(dense, network, mine, held, world)[0].state_dict()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_uneven_ranks_solves_the_same(size: int, world: World) -> None:
    alone, results = share(world), run_ranks(share, size)
    for found in results:
        for name, expected in alone.items():
            assert torch.equal(found[name], results[0][name])
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
