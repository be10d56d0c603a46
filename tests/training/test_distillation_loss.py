"""Training towards the dense network: what is compared, against the formula written out, and in lockstep."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dist_prune.config.training import TrainingConfig, TuningConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import rebuild
from dist_prune.network.models import CifarResNet
from dist_prune.network.sites import survey
from dist_prune.training.distillation_loss import (
    answers,
    blocks,
    distillation_loss,
    matched,
    relative_error,
    towards,
)
from dist_prune.training.trainer import Trainer
from tests.ranks import run_ranks


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=7)


@pytest.mark.parametrize(
    ("make", "count", "first", "last"),
    [
        (lambda: CifarResNet(20), 9, "layer1.0", "layer3.2"),
        (torchvision_model("resnet50"), 16, "layer1.0", "layer4.2"),
        (torchvision_model("mobilenet_v2"), 19, "features.0", "features.18"),
        (torchvision_model("efficientnet_b0"), 18, "features.0", "features.8"),
        (torchvision_model("swin_t"), 15, "features.1.0", "features.7.1"),
        (torchvision_model("vit_b_32"), 12, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
        (torchvision_model("vgg11"), 0, "", ""),
    ],
    ids=["resnet20", "resnet50", "mobilenet", "efficientnet", "swin", "vit", "vgg"],
)
def test_blocks_are_the_repeated_parts_in_order(
    make: Callable[[], nn.Module], count: int, first: str, last: str
) -> None:
    with torch.device("meta"):
        found = list(blocks(make()))
    assert len(found) == count
    assert (found[:1], found[-1:]) == (([first], [last]) if found else ([], []))


def blocky() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20, 5).eval()


def plain() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), head).eval()


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    """Every convolution at half its rank, with the factors' initial values."""
    torch.manual_seed(1)
    sites = survey(model, x[:1]).select("@conv").sites
    return rebuild(model, Plan(tuple(Choice(s.name, s.outputs // 2) for s in sites))).eval()


def images(count: int = 6) -> Batch:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return Batch(x, torch.full((count,), -1), torch.arange(count))


def outputs_of(model: nn.Module, names: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: found.update({name: y.clone()})
        )
        for name in names
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_without_blocks_the_factored_layers_are_compared() -> None:
    model, x = plain(), images().images
    assert matched(model, halved(model, x)) == ("0", "2")
    deep = blocky()
    assert matched(deep, halved(deep, x)) == tuple(blocks(deep))


@pytest.mark.parametrize("make", [blocky, plain])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.5, 4.0), (3.0, 1.0)])
def test_the_loss_is_the_divergence_and_the_mean_relative_error_of_the_blocks(
    make: Callable[[], nn.Module], weight: float, temperature: float
) -> None:
    dense, batch = make(), images()
    trained = halved(dense, batch.images)
    with towards(dense, trained, weight, temperature) as loss:
        logits = trained(batch.images)
        found = loss(logits, batch)
    names = matched(dense, trained)
    with torch.no_grad():
        f, g = (outputs_of(model, names, batch.images) for model in (dense, trained))
        target = (dense(batch.images) / temperature).log_softmax(1)
        apart = (target.exp() * (target - (logits / temperature).log_softmax(1))).sum(1).mean()
        expected = temperature**2 * apart
        errors = [(g[n] - f[n]).square().sum() / f[n].square().sum() for n in names]
    torch.testing.assert_close(found.detach(), expected + weight * sum(errors) / len(errors), rtol=1e-5, atol=1e-6)


def test_a_network_compared_with_itself_has_no_loss_and_no_hook_stays() -> None:
    dense, batch = blocky(), images()
    copied = copy.deepcopy(dense)
    with towards(dense, copied, 1.0, 4.0) as loss:
        assert loss(copied(batch.images), batch).item() == pytest.approx(0, abs=1e-6)
    assert not any(module._forward_hooks for model in (dense, copied) for module in model.modules())


def test_a_block_that_gives_nothing_does_not_divide_by_zero() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_modules_may_give_other_things_than_tensors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), x

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units, self.head = nn.Sequential(Two()), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.units(x)[0].mean((2, 3)))

    dense, batch = Network().eval(), images()
    assert list(blocks(dense)) == ["units.0"]
    with towards(dense, dense, 1.0, 4.0) as loss:
        assert loss(dense(batch.images), batch).item() == pytest.approx(0, abs=1e-6)


def distilled(world: World, features: float) -> tuple[str, float, float]:
    """The trained network's digest, and its divergence and its blocks' errors on other images."""
    dense = blocky().to(world.device)
    batch = images(12)
    trained = halved(dense, batch.images)
    how = TrainingConfig(batch_size=12, lr=0.2, bn="frozen", weight_decay=0)
    own = Batch(batch.images[world.rank :: world.size], batch.labels, batch.indices)
    with towards(dense, trained, features, 1.0) as loss:
        list(Trainer(trained, how, 12, world, loss).epoch([own] * 12))
    trained.eval()
    with torch.no_grad(), towards(dense, trained, 0, 1) as plain_loss, towards(dense, trained, 1, 1) as both:
        logits = trained(batch.images)
        divergence = plain_loss(logits, batch)
        return digest(trained), divergence.item(), (both(logits, batch) - divergence).item()


def test_all_ranks_end_with_the_same_bits() -> None:
    assert len({found[0] for found in run_ranks(distilled, 2, 1.0)}) == 1


def test_matching_brings_the_blocks_nearer(world: World) -> None:
    _, _, without = distilled(world, 0.0)
    _, _, matching = distilled(world, 3.0)
    assert matching < 0.8 * without


@pytest.mark.parametrize("bf16", [False, True])
def test_the_dense_network_answers_in_the_precision_of_the_training(bf16: bool) -> None:
    dense = nn.Linear(6, 5)
    images = torch.randn(40, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = dense(images).float()
    found = answers(dense, images, bf16)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found, dense(images)) is not bf16


def test_distillation_is_hinton_s_loss() -> None:
    dense, shown = plain(), images(6)
    batch = Batch(shown.images, torch.arange(6) % 5, shown.indices)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(5))
    settings = TuningConfig(label_smoothing=0.1, distill="0.3,4")
    assert settings.distillation is not None
    p, q = (dense(batch.images) / 4).softmax(1), (logits / 4).softmax(1)
    soft = 16 * (p * (p.log() - q.log())).sum(1).mean()
    hard = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    found = distillation_loss(dense, settings.distillation, settings)(logits, batch)
    torch.testing.assert_close(found, 0.3 * soft + 0.7 * hard)
    assert not found.requires_grad
