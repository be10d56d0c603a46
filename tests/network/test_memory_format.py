"""Channels last: the same network, the same figures, laid out otherwise from the first pass to the last."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import rebuild, unfold
from dist_prune.network.memory_format import channels_last, lay_out, layout_of
from dist_prune.network.models import CifarResNet
from dist_prune.network.sites import survey
from dist_prune.statistics import collect as statistics
from dist_prune.training.trainer import Trainer
from tests.networks import seeded
from tests.runs import Bench, result_of

METHODS = [
    MethodConfig("pca"),
    MethodConfig("pca", side="input"),
    MethodConfig("fisher", draws=0),
    MethodConfig("gradient"),
    MethodConfig("hessian-local", draws=0),
    MethodConfig("hessian-local", draws=0, side="input"),
    MethodConfig("hessian-local", sampled=True, probes=8),
    MethodConfig("hessian-global", probes=8),
]


def network() -> nn.Module:
    return seeded(lambda: CifarResNet(20, 7)).double()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lies_last(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def kernels(model: nn.Module) -> list[Tensor]:
    """Those of which the layout can be text."""
    return [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]


def test_a_network_says_how_it_lies() -> None:
    model = network()
    assert layout_of(model) == torch.contiguous_format
    laid_out = channels_last(model)
    assert layout_of(laid_out) == torch.channels_last and all(map(lies_last, kernels(laid_out)))
    assert layout_of(model) == torch.contiguous_format, "of a copy"
    lay_out(laid_out, torch.contiguous_format)
    assert layout_of(laid_out) == torch.contiguous_format


@pytest.mark.parametrize("last", [False, True])
def test_what_is_built_of_a_network_lies_as_it_does(last: bool) -> None:
    dense = channels_last(network()) if last else network()
    plan = Plan((Choice("layer1.0.conv1", 5), Choice("layer2.0.conv1", 9)))
    factored = rebuild(dense, plan)
    for built in (factored, unfold(factored, plan.ranks)):
        assert {lies_last(kernel) for kernel in kernels(built)} == {last}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.method} {m.side} {m.sampled}")
def test_statistics_are_those_of_the_other_layout(world: World, method: MethodConfig) -> None:
    index = torch.arange(8)
    batches = [Batch(images(), index % 7, index)]
    model = network()
    sites = survey(model, images(1)).sites

    def collected(model: nn.Module) -> statistics.Statistics:
        return statistics.collect(model, sites, lambda _: batches, world, method, 0)

    expected, found = collected(model), collected(channels_last(model))
    for site in sites:
        for one, other in zip(_sums(found, site.name), _sums(expected, site.name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def _sums(found: statistics.Statistics, site: str) -> list[Tensor]:
    moments = [found.moments[site].mean, found.moments[site].covariance]
    return [*moments, found.curvature[site]] if site in found.curvature else moments


def test_training_lays_images_out_as_the_network(world: World) -> None:
    model = channels_last(network().float())
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    trainer = Trainer(model, TrainingConfig(epochs=1, batch_size=8), 1, world)
    list(trainer.epoch([Batch(images().float(), torch.arange(8) % 7, torch.arange(8))]))
    assert seen and all(map(lies_last, seen)) and all(map(lies_last, kernels(model)))


def test_kernels_of_1x1_are_trained_in_the_strides_of_their_gradients(world: World) -> None:
    """DDP copies each gradient that has others, and warns."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = rebuild(channels_last(small), Plan((Choice("1", 2),)))
    for kernel in model.get_submodule("1").parameters():
        nn.init.ones_(kernel)
    trainer = Trainer(model, TrainingConfig(epochs=1, batch_size=8, bf16=True), 1, world)
    list(trainer.epoch([Batch(images().float(), torch.arange(8) % 7, torch.arange(8))]))
    assert [p.stride() for p in model.parameters()] == [p.grad.stride() for p in model.parameters()]


def test_a_run_gives_the_same_figures(bench: Bench, tmp_path: Path) -> None:
    every = {"method": "fisher", "correct": "regression", "calibrate_images": 16, "epochs": 1}
    bench.commands.succeed(*bench.words(tmp_path / "first", **every), ranks=2)
    bench.commands.succeed(*bench.words(tmp_path / "last", **every, channels_last=True), ranks=2)
    first, last = result_of(tmp_path / "first"), result_of(tmp_path / "last")
    for stage in ("dense", "projected", "corrected"):
        assert last[stage]["loss"] == pytest.approx(first[stage]["loss"], rel=1e-4)
    assert last["macs"] == first["macs"]
