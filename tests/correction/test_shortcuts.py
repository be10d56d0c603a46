"""Which additions a site can repair, and operations in place that forbid it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dist_prune.network.models import CifarResNet
from dist_prune.network.tracing import Pass, trace
from tests.networks import NETWORKS, at_every_stop, ended, seeded, tiny_vit, torchvision_model, traced


def shortcuts_of(make: Callable[[], nn.Module], size: int = 32) -> dict[str, tuple[str, str]]:
    """Site → what it is added to, and the batch norm in between."""
    model = seeded(make)
    program = traced(model, torch.zeros(1, 3, size, size))
    return {name: (str(s.other), s.affine) for name, s in program.shortcuts.items()}


def test_basic_blocks_repair_identity_and_projection() -> None:
    found = shortcuts_of(torchvision_model("resnet18"))
    assert found == {
        f"layer{stage}.{block}.conv2": (other, f"layer{stage}.{block}.bn2")
        for stage in (1, 2, 3, 4)
        for block, other in (
            (0, f"layer{stage}_0_downsample_1" if stage > 1 else "maxpool"),
            (1, f"layer{stage}_0_relu_1"),
        )
    }


def test_bottlenecks_repair_on_their_last_convolution() -> None:
    found = shortcuts_of(torchvision_model("resnet50"))
    assert len(found) == 16
    assert found["layer1.0.conv3"] == ("layer1_0_downsample_1", "layer1.0.bn3")
    assert all(name.endswith("conv3") for name in found)


def test_inverted_residuals_cifar_blocks_and_transformers_repair_too() -> None:
    mobile = shortcuts_of(torchvision_model("mobilenet_v2"))
    assert len(mobile) == 10
    assert mobile["features.3.conv.2"] == ("features_2_conv_3", "features.3.conv.3")
    cifar = shortcuts_of(lambda: CifarResNet(20), 16)
    assert set(cifar) == {f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1, 2)}
    vit = shortcuts_of(tiny_vit)
    assert {name: affine for name, (_, affine) in vit.items()} == {
        f"encoder.layers.encoder_layer_{i}.mlp.3": "" for i in (0, 1)
    }


def test_stochastic_depth_is_looked_through() -> None:
    """torchvision's is traced as a function."""
    efficient = shortcuts_of(torchvision_model("efficientnet_b0"))
    assert len(efficient) == 9
    assert efficient["features.2.1.block.3.0"][1] == "features.2.1.block.3.1"
    swin = shortcuts_of(torchvision_model("swin_t"))
    assert len(swin) == 12 and all(name.endswith("mlp.3") for name in swin)


class Block(nn.Module):
    """conv → what is given → + x, then a head; `before` may do something to x first."""

    def __init__(self, after: nn.Module, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.after = after
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.join(self.after(self.conv(x)), x).mean((2, 3)))


@pytest.mark.parametrize(
    "join",
    [torch.add, lambda y, x: y + x, lambda y, x: x + y, lambda y, x: y.add(x), lambda y, x: y.add_(x)],
    ids=["add", "+", "reversed", "method", "in place"],
)
@pytest.mark.parametrize("after", [nn.Identity(), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4), nn.Identity())])
def test_every_way_to_add_is_seen(join: Callable[[Tensor, Tensor], Tensor], after: nn.Module) -> None:
    found = shortcuts_of(lambda: Block(after, join), 8)
    assert found == {"conv": ("relu", "" if isinstance(after, nn.Identity) else "after.1")}


@pytest.mark.parametrize(
    ("after", "join"),
    [
        (nn.ReLU(), torch.add),
        (nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), torch.add),
        (nn.BatchNorm2d(4, track_running_stats=False), torch.add),
        (nn.Identity(), torch.mul),
        (nn.Identity(), torch.sub),
        (nn.Identity(), lambda y, x: torch.add(y, x, alpha=2)),
        (nn.Identity(), lambda y, x: y + y),
        (nn.Identity(), lambda y, x: y + 1),
    ],
)
def test_what_is_not_a_plain_addition_is_no_shortcut(after: nn.Module, join: Any) -> None:
    torch.manual_seed(0)
    model = Block(after, join).eval()
    assert not trace(model, ["stem", "conv", "head"]).shortcuts


class Two(nn.Module):
    """Both branches end in sites, one twice as long; the addition comes after both."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long1, self.long2 = (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.long2(F.relu(self.long1(x)))
        return self.head((y + self.short(x)).mean((2, 3)))


def test_of_two_branches_the_longer_repairs_and_waits_for_the_other() -> None:
    model = Two().eval()
    program = traced(model, torch.zeros(1, 3, 4, 4))
    assert {name: str(s.other) for name, s in program.shortcuts.items()} == {"long2": "short"}
    assert list(program.stops) == ["long1", "short", "long2", "head"]
    x = torch.randn(2, 3, 4, 4)
    walk = Pass(program, model, x)
    for site in at_every_stop(walk):
        if site == "long2":
            assert torch.equal(walk.shortcut_of(site), model.short(x))
    assert torch.equal(ended(walk), model(x))


class Crossed(nn.Module):
    """Each of two additions has the other's branch as its shortcut: to compute both first is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        c = nn.functional.dropout(a, training=False) + b
        return self.head(c.mean((2, 3)))


def test_the_order_never_runs_in_a_circle() -> None:
    model = Crossed().eval()
    program = traced(model, torch.zeros(1, 3, 4, 4))
    assert len(program.shortcuts) == 1
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ended(Pass(program, model, x)), model(x))


class Additions(TorchFunctionMode):
    """Keeps the result of every addition of two tensors, before anything changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.__name__ in ("add", "add_", "__add__", "__iadd__"):
            self.sums.append(result.clone())
        return result


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "vit"])
def test_at_a_site_its_shortcut_is_what_the_output_is_added_to(name: str) -> None:
    make, size = NETWORKS[name]
    model = seeded(make).double()  # one product rounds otherwise than the same within a fused one
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    walk = Pass(traced(model, x), model, x)
    shortcuts = walk.program.shortcuts
    ready = {site: walk.shortcut_of(site).clone() for site in at_every_stop(walk) if site in shortcuts}
    assert ready
    outputs: dict[str, Tensor] = {}
    for site in ready:
        last = model.get_submodule(shortcuts[site].affine or site)
        last.register_forward_hook(lambda _m, _x, y, site=site: outputs.update({site: y.clone()}))
    with Additions() as seen:
        model(x)
    for site, shortcut in ready.items():
        total = outputs[site] + shortcut
        assert any(total.shape == one.shape and torch.allclose(total, one) for one in seen.sums), site


# ── operations that change what they are given ─────────────────────────────────────────────────────────────


class InPlaceShortcut(nn.Module):
    """The shortcut changes x, which the convolution has already read; computed first, it would spoil it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.relu = nn.ReLU(inplace=True)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        return self.head((y + self.change(self, x)).mean((2, 3)))


def add_to_itself(_model: nn.Module, x: Tensor) -> Tensor:
    x += 1
    return x


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: model.relu(x),
        lambda _, x: F.relu(x, inplace=True),
        lambda _, x: F.relu(x, True),
        lambda _, x: x.relu_(),
        lambda _, x: torch.relu_(x),
        lambda _, x: torch.relu(x),
        add_to_itself,
    ],
    ids=["module", "inplace=True", "positional", "method", "function", "not in place", "+="],
)
def test_a_shortcut_that_changes_its_source_is_not_moved(change: Any) -> None:
    torch.manual_seed(0)
    model = InPlaceShortcut(change).eval()
    x = torch.randn(2, 3, 4, 4)
    program = traced(model, x)
    expected = model(x)
    walk = Pass(program, model, x)
    list(at_every_stop(walk))
    assert torch.equal(ended(walk), expected)


class PreActivation(nn.Module):
    """The block's first operation changes the very value that is the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.relu(x))
        y += x
        x.mul_(2)
        return self.head((self.relu(y) + x).mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("make", [PreActivation, NETWORKS["resnet18"][0], NETWORKS["densenet121"][0]])
def test_an_outcome_leaves_the_pass_and_what_it_is_given_alone(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    x = torch.randn(1, 3, 32, 32)
    walk, expected = Pass(traced(model, x), model, x), model(x)
    for index, site in enumerate(at_every_stop(walk)):
        if index % 9 < 3:
            given = walk.input_of(site)
            before, output = copy.deepcopy(list(walk.values.values())), model.get_submodule(site)(given)
            as_it_was = output.clone()
            assert torch.equal(walk.outcome(model, output), expected)
            assert torch.equal(output, as_it_was)
            held = zip(before, walk.values.values(), strict=True)
            assert all(torch.equal(a, b) for a, b in held if isinstance(a, Tensor))
    assert torch.equal(ended(walk), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "vit", "googlenet"])
def test_an_outcome_is_a_forward_pass_with_that_output_forced(name: str) -> None:
    """Everything before is one network's, everything after the other's."""
    make, size = NETWORKS[name]
    dense = seeded(make)
    other = copy.deepcopy(dense)
    x = torch.randn(1, 3, size, size)
    program = traced(dense, x)
    for site in program.stops:
        other.get_submodule(site).weight.mul_(0.9)
    walk = Pass(program, other, x)
    for index, site in enumerate(at_every_stop(walk)):
        if index % 5 == 1:
            forced = torch.randn_like(other.get_submodule(site)(walk.input_of(site)))
            later = list(program.stops)[index + 1 :]
            mixed = copy.deepcopy(other)
            for after in later:
                mixed.get_submodule(after).load_state_dict(dense.get_submodule(after).state_dict())
            mixed.get_submodule(site).register_forward_hook(lambda _m, _i, _y, forced=forced: forced.clone())
            assert torch.equal(walk.outcome(dense, forced), mixed(x))


def test_the_images_stay_as_they_are() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.sub_(1).mean((2, 3)))

    model = Normalising().eval()
    x = torch.randn(2, 3, 4, 4)
    walk = Pass(trace(model, ["head"]), model, x)
    results = []
    for _ in range(2):
        results.append(ended(walk))
        walk.restart()
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], model(x.clone()))
