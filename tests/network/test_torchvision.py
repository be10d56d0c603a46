"""Every classification network of torchvision, untrained, at the smallest image it takes: all of it must run.

The default suite has a few light ones; `-m slow` has them all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import parse_rule
from dist_prune.correction.reconstruct import Correction, Pair
from dist_prune.correction.solver import Solver
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis, solve
from dist_prune.factorization.plan import Choice, Plan, cost, make_plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.memory_format import lay_out
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import Site, survey
from dist_prune.network.tracing import Pass, trace
from dist_prune.statistics.collect import Statistics

ALL = torchvision.models.list_models(module=torchvision.models)
LIGHT = ["mnasnet0_5", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"]
TOO_LARGE = {
    "convnext_large": "200 M parameters, and float64 bases of them",
    "regnet_y_128gf": "645 M parameters",
    "vit_h_14": "632 M parameters",
    "vit_l_16": "304 M parameters, and float64 bases of them",
    "vit_l_32": "307 M parameters, and float64 bases of them",
}
SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28}
SIZES |= {f"swin_{size}": 224 for size in "tsb"}  # smaller images are padded to whole windows, and the attention's
SIZES |= {f"swin_v2_{size}": 256 for size in "tsb"}  # own products, which no site has, exceed half of all MACs
WIDEST = 600  # wider sites are projected but not corrected: that takes minutes for some


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Untrained, in evaluation mode, with six images."""
    size = SIZES.get(name, 32)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return model.eval(), torch.randn(6, 3, size, size)


class Solved(Mapping[str, Basis]):
    """Bases of the weights, solved when they are asked for: all of them at once can take gigabytes."""

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], world: World) -> None:
        self.model, self.world = model, world
        self.sites = {site.name: site for site in sites}

    def __getitem__(self, name: str) -> Basis:
        method = MethodConfig(method="weight-svd")
        return solve(self.model, [self.sites[name]], Statistics({}), method, 0, self.world)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


@torch.no_grad()
def check(name: str, world: World) -> None:
    model, x = network(name)
    found = survey(model, x[:1])
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {s.name for s in found.sites} | {s.name for s in found.skipped} == every
    assert all(skipped.reason for skipped in found.skipped)
    dense = logits_of(model(x))

    lay_out(model, torch.channels_last)
    assert (logits_of(model(x)) - dense).abs().max() <= 1e-3 * dense.abs().max()
    lay_out(model, torch.contiguous_format)

    bases = Solved(model, found.sites, world)
    whole = project(model, found.sites, bases, Plan(tuple(Choice(s.name, s.outputs) for s in found.sites)))
    assert (logits_of(whole(x)) - dense).abs().max() <= 1e-3 * dense.abs().max()
    del whole

    spectra = Spectra({name: bases[name].spectrum for name in bases})
    plan = make_plan(parse_rule("budget:macs=0.5"), found, 1, "output", spectra)
    assert plan.ranks
    assert {choice.site for choice in plan.choices} == every
    assert all(choice.reason for choice in plan.choices if choice.rank is None)
    compressed = project(model, found.sites, bases, plan).eval()
    after = survey(compressed, x[:1])
    assert after.macs == cost(found, plan).macs <= found.macs / 2
    assert logits_of(compressed(x)).shape == dense.shape

    correct(model, compressed, found.sites, x, dense, world)
    assert survey(compressed, x[:1]).macs == after.macs
    outputs = logits_of(compressed(x))
    assert outputs.shape == dense.shape
    assert torch.isfinite(outputs).all()


def correct(
    model: nn.Module, compressed: nn.Module, sites: tuple[Site, ...], x: Tensor, dense: Tensor, world: World
) -> None:
    """Solve from four images, judge by two."""
    program = trace(model, [site.name for site in sites])
    pairs = [
        Pair(Pass(program, model, x[:4]), Pass(program, compressed, x[:4])),
        Pair(Pass(program, model, x[4:]), Pass(program, compressed, x[4:]), dense[4:]),
    ]
    metrics = {s.name: torch.eye(s.width, dtype=torch.float64).expand(s.groups, -1, -1) for s in sites}
    solver = Solver("regression", dampings=(float("inf"),))
    widest = max(WIDEST, min(s.inputs + s.width for s in sites))  # at least one is
    walk = Correction(program, model, compressed, pairs, metrics, solver, world, positions=64, widest=widest)
    outcomes = list(walk.run(sites))
    assert [o.site for o in outcomes] == [n for n in program.stops if n in {o.site for o in outcomes}]
    assert outcomes
    for outcome in outcomes:  # the best of those solved, unless the present one is clearly better
        best = min(value for name, value in outcome.tried.items() if name != "kept")
        assert outcome.tried[outcome.chosen] in (best, min(outcome.tried.values()))


@pytest.mark.parametrize("name", LIGHT)
def test_light_networks_run(name: str, world: World) -> None:
    check(name, world)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ALL)
def test_every_network_runs(name: str, world: World) -> None:
    if name in TOO_LARGE:
        pytest.skip(f"{name} takes more than 8 GB: {TOO_LARGE[name]}")
    check(name, world)
