from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dist_prune.distributed.world import World
from dist_prune.network.sites import View, input_rows, output_rows, survey, weight_of
from dist_prune.statistics import symmetric
from dist_prune.statistics.moments import Accumulator, StatisticsError, collect_moments
from tests.ranks import run_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).double()


def images(count: int = 23) -> torch.Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def views(model: nn.Module) -> list[View]:
    return [View(site) for site in survey(model, images(1)).sites]


def plain_covariance(side: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and covariance of all rows at once, by numpy's formula."""
    model, x = network().eval(), images()
    result = {}
    for index in (0, 3, 6):
        site = next(s for s in survey(model, x[:1]).sites if s.name == str(index))
        before, module = model[:index](x), model[index]
        rows = output_rows(site, module(before)) if side == "output" else input_rows(site, module, before)
        rows = rows.reshape(site.groups, -1, rows.shape[1] * rows.shape[2]).detach()
        covariance = torch.stack([torch.cov(group, correction=0) for group in rows])
        result[site.name] = (rows.mean(-1), covariance)
    return result


def collect_share(world: World, side: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """An uneven share: rank 0 has most images, the last rank begins with an empty batch."""
    x, model = images(), network()
    sites = survey(model, x[:1]).sites
    cuts = {1: [0, 23], 2: [0, 17, 23], 3: [0, 17, 22, 23]}[world.size]
    mine = x[cuts[world.rank] : cuts[world.rank + 1]]
    batches = [mine[:0], *mine.split(5)] if world.rank == world.size - 1 else mine.split(5)
    moments = collect_moments(model, [View(s, side) for s in sites], batches, world)
    return {name: (m.mean, m.covariance, int(m.count)) for name, m in moments.items()}


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_in_blocks_are_the_parts_of_longer_rows(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(groups * k, 4, 5, generator=generator, dtype=torch.float64) for k in (3, 2))
    accumulator = Accumulator(groups, 5, torch.device("cpu"))
    for images in (slice(0, 1), slice(1, 4)):
        accumulator.add(first[:, images] + 7, second[:, images])
    rows = torch.cat([first.reshape(groups, 3, 20) + 7, second.reshape(groups, 2, 20)], 1)
    found = accumulator.moments()
    torch.testing.assert_close(found.mean, rows.mean(-1))
    torch.testing.assert_close(found.covariance, torch.stack([torch.cov(group, correction=0) for group in rows]))


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_uneven_ranks_gives_the_plain_covariance(size: int, side: str) -> None:
    expected = plain_covariance(side)
    for found in run_ranks(collect_share, size, side):
        assert list(found) == ["0", "3", "6"]
        for name, (mean, covariance, _count) in found.items():
            torch.testing.assert_close(mean, expected[name][0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(covariance, expected[name][1], rtol=1e-9, atol=1e-11)
        assert found["0"][2] == 23 * 81


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_a_thousand_times_the_deviation_costs_no_accuracy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = (torch.randn(4, 3, 1000, generator=generator, dtype=torch.float64) + 1000).to(dtype)
    accumulator = Accumulator(1, 4, torch.device("cpu"))
    for part in rows.split(1, dim=1):
        accumulator.add(part)
    expected = torch.cov(rows.double().flatten(1), correction=0)[None]
    tolerance = 1e-9 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(accumulator.moments().covariance, expected, rtol=tolerance, atol=tolerance)


def test_moving_the_shift_changes_nothing_but_the_shift() -> None:
    accumulator = Accumulator(2, 3, torch.device("cpu"))
    accumulator.add(torch.randn(6, 5, 7, dtype=torch.float64))
    before = accumulator.moments()
    after = replace(before, outer=before.outer.clone()).moved_(torch.full((2, 3), 3.0, dtype=torch.float64))
    torch.testing.assert_close(after.mean, before.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.covariance, before.covariance, rtol=1e-10, atol=1e-12)


def test_bfloat16_outputs_are_summed_in_float32_and_more() -> None:
    rows = torch.randn(4, 10, 50).bfloat16()
    accumulator = Accumulator(1, 4, torch.device("cpu"))
    accumulator.add(rows)
    expected = torch.cov(rows.double().flatten(1), correction=0)[None]
    torch.testing.assert_close(accumulator.moments().covariance, expected, rtol=1e-5, atol=1e-6)


def test_the_pass_leaves_no_hook_and_keeps_the_mode(world: World) -> None:
    model = network().train()
    collect_moments(model, views(model), [images(4)], world)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_non_finite_statistics_name_the_site(world: World) -> None:
    model = network()
    sites = survey(model, images(1)).sites
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(StatisticsError, match=r"^3: its statistics hold NaN or infinity"):
        collect_moments(model, map(View, sites), [images(4)], world)


def test_no_images_name_the_site(world: World) -> None:
    model = network()
    with pytest.raises(StatisticsError, match=r"^0: no rows were seen"):
        collect_moments(model, views(model), [images(4)[:0]], world)


def test_output_covariance_follows_from_the_input_covariance(world: World) -> None:
    """Cov(Wx + b) = W Cov(x) Wᵀ: both sides of one pass must agree."""
    model = network()
    sites = survey(model, images(1)).sites
    outputs = collect_moments(model, map(View, sites), [images()], world)
    inputs = collect_moments(model, [View(s, "input") for s in sites], [images()], world)
    for site in sites:
        weight = weight_of(model.get_submodule(site.name), site)
        expected = weight @ inputs[site.name].covariance @ weight.mT
        torch.testing.assert_close(outputs[site.name].covariance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("panel", [8, 40], ids=["as wide", "wider"])
def test_saved_between_two_batches_it_continues_with_the_same_bits_from_the_lower_panels_alone(
    panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "CPU_TILES", symmetric.Tiles(1 << 20, 8, 1, False))
    first, second = torch.randn(2, 2 * 48, 5, 7, generator=torch.Generator().manual_seed(0))
    whole, stopped, resumed = (Accumulator(2, 48, torch.device("cpu")) for _ in range(3))
    for batch in (first, second):
        whole.add(batch)
    expected = whole.moments()
    stopped.add(first)
    state = stopped.state_dict()
    assert (
        sum(t.numel() for name, t in state.items() if name.startswith("outer/"))
        < 0.54 * stopped.outer.total.numel()
    )
    monkeypatch.setattr(symmetric, "CPU_TILES", symmetric.Tiles(1 << 20, panel, 1, False))  # as on another device
    resumed.load_state_dict(state)
    resumed.add(second)
    found = resumed.moments()
    same = torch.equal if panel == 8 else partial(torch.allclose, atol=1e-4)
    assert same(found.outer, expected.outer) and torch.equal(found.total, expected.total)


@pytest.mark.parametrize("batches", [1, 4])
def test_float32_products_of_several_batches_are_flushed_to_float64_and_when_they_are_asked_for(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "CPU_TILES", symmetric.Tiles(1 << 20, 8, batches, False))
    rows = torch.randn(2 * 24, 10, 30, generator=torch.Generator().manual_seed(0))
    accumulator, resumed = (Accumulator(2, 24, torch.device("cpu")) for _ in range(2))
    for part in rows[:, :6].split(1, dim=1):
        accumulator.add(part)
    resumed.load_state_dict(accumulator.state_dict())
    for part in rows[:, 6:].split(1, dim=1):
        accumulator.add(part)
        resumed.add(part)
    expected = torch.stack([torch.cov(g, correction=0) for g in rows.double().view(2, 24, 300)])
    for each in (accumulator, resumed):
        torch.testing.assert_close(each.moments().covariance, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_channels_that_are_always_zero_and_others_are_counted_alike_on_processors_without_denormals(
    dtype: torch.dtype,
) -> None:
    rows = (10 + torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows[1], rows[2] = 0, -1e-30
    torch.set_flush_denormal(True)
    try:
        accumulator = Accumulator(1, 4, torch.device("cpu"))
        for part in rows.split(2, dim=1):
            accumulator.add(part)
        found = accumulator.moments()
    finally:
        torch.set_flush_denormal(False)
    plain = rows.double().flatten(1)
    torch.testing.assert_close(found.mean[0], plain.mean(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.covariance[0], torch.cov(plain, correction=0), rtol=1e-5, atol=1e-9)
