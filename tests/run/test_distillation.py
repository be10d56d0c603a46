"""Training towards the dense network: what is compared, against the formula written out, and in lockstep."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import rebuild
from dist_prune.network.models import CifarResNet
from dist_prune.network.sites import survey
from dist_prune.run.distill import CHECKS, EVERY, Holdout, best_share, between, holding, is_checked, weights_of
from dist_prune.run.state import State, Weighed
from dist_prune.training.distillation_loss import answers, blocks, matched, relative_error, towards
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


@pytest.mark.parametrize("steps", [1, 8, 19, 20, 21, 160, 300, 2000])
def test_images_held_out_are_looked_at_after_the_last_step_and_eight_times_at_most(steps: int) -> None:
    shown = sorted({*range(EVERY, steps + 1, EVERY), steps})
    checked = [step for step in shown if is_checked(step, steps)]
    assert checked[-1] == steps and len(checked) == min(CHECKS, len(shown))
    gaps = [b - a for a, b in itertools.pairwise([0, *checked])]
    assert max(gaps) - min(gaps) <= 2 * EVERY or steps < CHECKS * EVERY


def test_the_weights_before_are_in_a_checkpoint() -> None:
    model = plain()
    before = Weighed(0.125, {name: value + 1 for name, value in model.state_dict().items()})
    later = State(model)
    later.load_state_dict(copy.deepcopy(State(model, undistilled=before).state_dict()))
    assert later.undistilled is not None and later.undistilled.kl == 0.125
    for name, value in model.state_dict().items():
        assert torch.equal(later.undistilled.weights[name], value + 1)


def test_a_point_between_weights_is_at_that_share_of_the_way_and_counters_are_the_last() -> None:
    one = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([4.0, 0.0]), "n": torch.tensor(7)}
    found = between(one, other, 0.25)
    assert (found["w"].tolist(), int(found["n"])) == ([1.0, 3.0], 7)
    lost = {"w": torch.full((2,), torch.nan), "n": torch.tensor(7)}
    assert between(one, lost, 0)["w"].tolist() == [0.0, 4.0]


def preferred(world: World) -> tuple[bool, bool, bool, bool]:
    """Between weights near to the dense network's and others; rank 0 has more images than the others together."""
    torch.manual_seed(0)
    dense, x = nn.Linear(6, 5).eval(), torch.randn(40, 6)
    own = x[: 25 if world.size > 1 else 40] if world.rank == 0 else x[25 + world.rank - 1 :: world.size - 1]
    with torch.no_grad():
        holdout = Holdout([(part, dense(part)) for part in own.split(8)], lambda pixels: pixels, world)
    exact = {name: value.clone() for name, value in dense.state_dict().items()}
    noise = {name: 0.05 * torch.randn_like(value) for name, value in exact.items()}

    def at(scale: float) -> dict[str, Tensor]:
        return {name: value + scale * noise[name] for name, value in exact.items()}

    def prefers(other: float, own: float) -> bool:
        dense.load_state_dict(at(own))
        found = holdout.prefers(at(other), dense)
        assert all(torch.equal(value, at(own)[name]) for name, value in dense.state_dict().items())
        return found

    with torch.no_grad():
        return prefers(0, 1), prefers(1, 0), prefers(1, 1), prefers(-1, 1) or prefers(1, -1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_earlier_weights_are_kept_only_where_they_are_better_by_more_than_chance(size: int) -> None:
    for clearly, worse, same, by_chance in run_ranks(preferred, size):
        assert clearly and not worse and not same and not by_chance


def shares(world: World) -> list[float]:
    """How far it is gone towards the dense network's own weights, past them by as much, away from them."""
    torch.manual_seed(0)
    dense, x = nn.Linear(6, 5).eval(), torch.randn(40, 6)
    own = x[: 25 if world.size > 1 else 40] if world.rank == 0 else x[25 + world.rank - 1 :: world.size - 1]
    with torch.no_grad():
        holdout = Holdout([(part, dense(part)) for part in own.split(8)], lambda pixels: pixels, world)
    exact = weights_of(dense)
    off = {name: value + 0.05 * torch.randn_like(value) for name, value in exact.items()}

    def share(start: float, end: float) -> float:
        with torch.no_grad(), holding(dense, between(exact, off, start)):
            before = Weighed(holdout.kl(dense), weights_of(dense))
        with torch.no_grad(), holding(dense, between(exact, off, end)):
            return best_share(dense, before, holdout)[0]

    return [share(1, 0), share(1, -1), share(1, -3), share(1, -1.1), share(0, 1), share(1, 2)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_weights_are_followed_as_far_as_they_help_on_images_held_out(size: int) -> None:
    assert run_ranks(shares, size) == [[1.0, 0.5, 0.25, 0.5, 0.0, 0.0]] * size


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


@pytest.mark.parametrize(("end", "kept"), [(0.9, 1.0), (1.1, 0.25)])
def test_an_end_no_better_than_the_beginning_is_not_kept_however_little_speaks_for_another_point(
    monkeypatch: pytest.MonkeyPatch, world: World, end: float, kept: float
) -> None:
    """Where nothing is clear, as with very few images held out: all the way, but only if that is better."""
    kls = iter([end, 1.0, 1.0, 0.8])  # at the end, at ¾, ½ and ¼ of the way to it; 1.0 at the beginning
    monkeypatch.setattr(Holdout, "kl", lambda *_: next(kls))
    monkeypatch.setattr(Holdout, "prefers", lambda *_: False)
    layer = nn.Linear(2, 2)
    share, _ = best_share(layer, Weighed(1.0, weights_of(layer)), Holdout([], lambda pixels: pixels, world))
    assert share == kept
