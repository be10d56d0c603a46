from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dist_prune.config.compression import MethodConfig
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis, principal, solve
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import balance, factor, project, project_output, rebuild, unfold
from dist_prune.network.factored import Factored
from dist_prune.network.sites import Site, View, bias_of, describe, input_rows, output_rows, survey, weight_of
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.moments import Moments, collect_moments
from tests.layers import LAYERS, layer
from tests.ranks import run_ranks


def wrapped(module: nn.Module) -> nn.Module:
    """The layer as a classifier."""
    return nn.Sequential(module, nn.Flatten())


def pca(model: nn.Module, sites: Sequence[Site], moments: dict[str, Moments], world: World) -> dict[str, Basis]:
    return solve(model, sites, Statistics(moments), MethodConfig(), 0, world)


def projected(kind: str, share: float, world: World) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    module, x = layer(kind)
    model = wrapped(module)
    site = describe("0", module)
    moments = collect_moments(model, [View(site)], [x], world)
    bases = pca(model, [site], moments, world)
    rank = max(site.groups, int(share * site.outputs) // site.groups * site.groups)
    return model, project(model, [site], bases, Plan((Choice("0", rank),))), x


@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_is_the_identity_for_every_kind(kind: str, world: World) -> None:
    model, compressed, x = projected(kind, 1.0, world)
    torch.testing.assert_close(compressed(x), model(x), rtol=1e-9, atol=1e-9)
    single, x = compressed.float(), x.float()
    torch.testing.assert_close(single(x), model.float()(x), rtol=1e-4, atol=1e-4)
    model.double()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_input_side_at_full_rank_is_the_identity_for_every_kind(kind: str, world: World) -> None:
    module, x = layer(kind)
    model, site = wrapped(module), describe("0", module)
    view = View(site, "input")
    moments = collect_moments(model, [view], [x], world)
    bases = solve(model, [site], Statistics(moments), MethodConfig(side="input"), 0, world)
    plan = Plan((Choice("0", view.full_rank),))
    compressed = project(model, [site], bases, plan, "input")
    torch.testing.assert_close(compressed(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["3×3", "strided", "dilated", "grouped", "linear"])
def test_the_input_side_projects_the_patches_themselves(kind: str, world: World) -> None:
    """Reduced patches, put back and multiplied by W, give what the factored layers give."""
    module, x = layer(kind)
    model, site = wrapped(module), describe("0", module)
    moments = collect_moments(model, [View(site, "input")], [x], world)
    bases = solve(model, [site], Statistics(moments), MethodConfig(side="input"), 0, world)
    rank = 3 * site.groups
    compressed = project(model, [site], bases, Plan((Choice("0", rank),)), "input")
    patches = input_rows(site, module, x).reshape(site.groups, site.inputs, -1)
    encode, decode = bases["0"].kept(rank)
    mean = moments["0"].mean[..., None]
    expected = weight_of(module, site) @ (decode @ (encode @ (patches - mean)) + mean)
    expected = expected + bias_of(module, site)[..., None]
    found = output_rows(site, compressed[0](x)).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["3×3", "strided", "grouped", "linear", "linear on tokens"])
def test_half_the_rank_reaches_the_analytic_optimum(kind: str, world: World) -> None:
    """Eckart-Young: the best affine rank-r approximation of rows loses n·Σ_{i>r} λ_i, group by group."""
    model, compressed, x = projected(kind, 0.5, world)
    module = model[0]
    site = describe("0", module)
    rows = output_rows(site, module(x)).reshape(site.groups, site.width, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    singular = torch.linalg.svdvals(centred)  # independent of any covariance
    rank = compressed[0].reduce.weight.shape[0] // site.groups
    lost = (compressed(x) - model(x)).square().sum()
    torch.testing.assert_close(lost, singular[:, rank:].square().sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_balancing_changes_the_scale_of_the_factors_and_nothing_else(
    kind: str, share: float, world: World
) -> None:
    _model, compressed, x = projected(kind, share, world)
    pair = compressed[0]
    with torch.no_grad():
        pair.reduce.weight.mul_(1e3)
        pair.expand.weight.div_(1e3)
    before = compressed(x).detach()
    balance(compressed)
    torch.testing.assert_close(compressed(x), before, rtol=1e-8, atol=1e-8)
    groups = getattr(pair.reduce, "groups", 1)
    inner = pair.reduce.weight.reshape(groups, -1, pair.reduce.weight[0].numel())
    outer = pair.expand.weight.reshape(groups, -1, pair.expand.weight.shape[1])
    torch.testing.assert_close(inner @ inner.mT, outer.mT @ outer, rtol=1e-7, atol=1e-9)


def test_a_smaller_rank_loses_more(world: World) -> None:
    losses = []
    for share in (0.25, 0.5, 0.75, 1.0):
        model, compressed, x = projected("3×3", share, world)
        losses.append((compressed(x) - model(x)).square().sum().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-20 < losses[-2]


def test_bias_sits_in_the_second_layer_and_padding_sees_zeros(world: World) -> None:
    _model, compressed, _x = projected("3×3", 0.5, world)
    assert compressed[0].reduce.bias is None
    assert compressed[0].expand.kernel_size == (1, 1)


def test_projection_equals_projecting_the_outputs_themselves(world: World) -> None:
    model, compressed, x = projected("grouped", 0.5, world)
    site = describe("0", model[0])
    moments = collect_moments(model, [View(site)], [x], world)["0"]
    encode, decode = principal(moments).kept(4)
    rows = output_rows(site, model[0](x)).reshape(site.groups, site.width, -1)
    mean = moments.mean[..., None]
    expected = decode @ (encode @ (rows - mean)) + mean
    found = output_rows(site, compressed[0](x)).reshape(expected.shape)
    torch.testing.assert_close(found, expected)


def test_factors_keep_the_type_and_place_of_the_layer() -> None:
    module, _x = layer("linear")
    module = module.to(torch.float32)
    site = describe("l", module)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 6, 50, generator=generator, dtype=torch.float64)
    from dist_prune.statistics.moments import Accumulator

    accumulator = Accumulator(1, 6, torch.device("cpu"))
    accumulator.add(rows.view(6, 1, 50))
    basis = principal(accumulator.moments())
    weight, bias = weight_of(module, site).double(), bias_of(module, site).double()
    pair = factor(module, site, project_output(weight, bias, basis, 3))
    assert {p.dtype for p in pair.parameters()} == {torch.float32}
    module.double()


def compress_small(world: World) -> tuple[str, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(200, 4))
    x = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(4))
    sites = survey(model, x[:1]).sites
    moments = collect_moments(model, map(View, sites), x[world.rank :: world.size].split(4), world)
    bases = pca(model, sites, moments, world)
    compressed = project(model, sites, bases, Plan(tuple(Choice(s.name, 3) for s in sites)))
    return digest(compressed), compressed(x).detach()


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_hold_the_same_bits_and_their_number_does_not_matter(size: int) -> None:
    (_, alone), *_ = run_ranks(compress_small, 1)
    results = run_ranks(compress_small, size)
    assert len({hash_ for hash_, _ in results}) == 1
    torch.testing.assert_close(results[0][1], alone, rtol=1e-4, atol=1e-5)


def doubly_projected(kind: str, first: float, second: float, world: World):
    """A layer, its pair, the pair unfolded, and that projected again to a smaller share of the outputs."""
    model, once, x = projected(kind, first, world)
    dense_again = unfold(once, ["0"])
    site = describe("0", model[0])
    moments = collect_moments(dense_again, [View(site)], [x], world)
    rank = max(site.groups, int(second * site.outputs) // site.groups * site.groups)
    bases = pca(dense_again, [site], moments, world)
    return once, dense_again, project(dense_again, [site], bases, Plan((Choice("0", rank),))), bases["0"], rank, x


@pytest.mark.parametrize("kind", LAYERS)
def test_an_unfolded_pair_is_one_layer_that_computes_the_same(kind: str, world: World) -> None:
    once, dense_again, *_, x = doubly_projected(kind, 0.75, 0.5, world)
    assert type(dense_again[0]) in (nn.Conv2d, nn.Linear)
    torch.testing.assert_close(dense_again(x), once(x), rtol=1e-9, atol=1e-9)
    assert isinstance(once[0], Factored), "the network itself is left as it was"


@pytest.mark.parametrize("kind", LAYERS)
def test_a_pair_projected_again_is_the_triple_folded_into_two_layers(kind: str, world: World) -> None:
    """Against reduce → expand → encode, decode about the mean, layer by layer."""
    once, _, twice, basis, rank, x = doubly_projected(kind, 0.75, 0.5, world)
    assert [type(m) for m in twice[0].children()] == [type(m) for m in once[0].children()]
    assert twice[0].reduce.weight.shape[0] == rank
    encode, decode = basis.kept(rank)
    y = once[0](x)
    site = describe("0", once[0].expand)
    rows = output_rows(site, y).reshape(len(encode), site.outputs // len(encode), -1)
    mean = basis.mean[..., None]
    triple = decode @ (encode @ (rows - mean)) + mean
    found = output_rows(site, twice[0](x)).reshape(triple.shape)
    torch.testing.assert_close(found, triple, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_projecting_a_pair_again_at_its_own_rank_changes_nothing(kind: str, world: World) -> None:
    once, *_, twice, _, _, x = doubly_projected(kind, 0.5, 0.5, world)
    torch.testing.assert_close(twice(x), once(x), rtol=1e-8, atol=1e-8)


def test_rebuilding_gives_the_same_shape_from_the_plan_alone(world: World) -> None:
    model, compressed, x = projected("strided", 0.5, world)
    plan = Plan((Choice("0", 4),))
    again = rebuild(model, plan)
    again.load_state_dict(compressed.state_dict())
    assert torch.equal(again(x), compressed(x))


def test_a_module_used_twice_is_replaced_in_both_places(world: World) -> None:
    shared = nn.Linear(6, 6).double()
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3).double())
    x = torch.randn(40, 6, dtype=torch.float64)
    from dist_prune.network.outputs import logits_of

    site = describe("0", shared)
    moments = collect_moments(model, [View(site)], [x], world)
    assert int(moments["0"].count) == 80
    compressed = project(model, [site], pca(model, [site], moments, world), Plan((Choice("0", 6),)))
    assert compressed[0] is compressed[2] is not shared
    torch.testing.assert_close(logits_of(compressed(x)), model(x))
