"""Which channels can be removed, and why the others stay."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dist_prune.network.channels import Consumer, Group
from dist_prune.width.groups import RESIDUAL, Groups, find_groups
from dist_prune.width.listing import format_groups


class Block(nn.Module):
    """Expand, depthwise, a gate on the channels, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = F.silu(self.depthwise(F.relu6(self.norm(self.expand(x)))))
        gate = self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x + self.project(z * gate)).mean((2, 3)))


def groups_of(model: nn.Module, *shape: int) -> Groups:
    return find_groups(model, torch.randn(2, *(shape or (3, 16, 16))))


def reasons(found: Groups) -> dict[str, str]:
    return {name: each.reason for each in found.staying for name in each.producers}


def test_a_gate_belongs_to_the_channels_it_multiplies() -> None:
    found = groups_of(Block())
    gated = Group(24, ("expand", "excite"), ("norm", "depthwise"), (Consumer("squeeze"), Consumer("project")))
    inner = Group(6, ("squeeze",), (), (Consumer("excite"),))
    assert found.groups == (gated, inner)
    assert reasons(found) == {"stem": RESIDUAL, "project": RESIDUAL, "head": "the network's output"}


def test_flattened_channels_have_as_many_inputs_as_positions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
        nn.Tanh(),
        nn.Linear(7, 2),
    )
    found = groups_of(model)
    assert found.groups == (Group(4, ("0",), (), (Consumer("4", 4),)), Group(7, ("4",), (), (Consumer("6"),)))


def test_several_consumers_take_the_same_channels() -> None:
    found = groups_of(torchvision.models.squeezenet1_1(num_classes=5), 3, 48, 48)
    fire = next(g for g in found.groups if g.name == "features.3.squeeze")
    assert fire.consumers == (Consumer("features.3.expand1x1"), Consumer("features.3.expand3x3"))
    assert reasons(found)["features.3.expand1x1"] == "concatenated with others"


class Odd(nn.Module):
    """Each branch has channels that cannot go, for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 1)
        self.by_two = nn.Conv2d(6, 6, 3, groups=2)
        self.normed, self.norm, self.after_norm = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.split, self.after_split = nn.Linear(3, 8), nn.Linear(4, 4)
        self.scaled, self.scale, self.after_scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
        self.twice, self.after_twice = nn.Linear(3, 4), nn.Linear(4, 4)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.after_weighted = nn.Linear(4, 4)
        self.lost = nn.Linear(3, 4)
        self.table, self.after_table = nn.Linear(3, 4), nn.Linear(4, 4)
        self.register_buffer("constants", torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.by_two(self.grouped(x)).mean((2, 3))[:, :4]
        x = x.mean((2, 3))
        self.lost(x)
        first, second = self.split(x).chunk(2, 1)
        return (
            maps
            + self.after_norm(self.norm(self.normed(x)))
            + self.after_split(first * second)
            + self.after_scale(self.scaled(x) * self.scale)
            + self.after_twice(self.twice(x) + self.twice(-x))
            + self.after_weighted(self.weighted(x))
            + self.after_table(self.table(self.constants))
        )


def test_what_stays_has_a_reason() -> None:
    found = groups_of(Odd())
    assert found.groups == ()
    said = reasons(found)
    assert said["grouped"] == said["by_two"] == "by_two is a grouped convolution"
    assert said["normed"] == "used by norm (LayerNorm)"
    assert said["split"] == "used by chunk"
    assert said["scaled"] == "combined by mul with what is not a layer's output"
    assert said["twice"] == "twice is called more than once"
    assert said["weighted"] == "the weight of weighted is computed by a hook or a parametrization"
    assert said["lost"] == "no layer takes its output"
    assert said["table"] == "table is not given images"


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.sum() > 0 else self.second(-self.first(x))


def test_what_cannot_be_followed_stays_with_the_reason() -> None:
    (staying,) = groups_of(Deciding(), 3).staying
    assert staying.producers == ("first", "second")
    assert staying.reason.startswith("torch.fx cannot follow Deciding (symbolically traced variables")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 32, 8),  # the inner channels of each block
        ("resnet50", 32, 32 + 1),  # two for each block, and the stem, which the pooling leads into branches
        ("vgg11_bn", 32, 10),
        ("mobilenet_v2", 32, 20),
        ("vit_b_16", 224, 12),  # the hidden units of each block
        ("swin_t", 64, 12),
    ],
)
def test_torchvision(name: str, size: int, expected: int) -> None:
    found = groups_of(torchvision.models.get_model(name, weights=None), 3, size, size)
    assert len(found.groups) == expected
    names = [n for g in found.groups for n in g.producers]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_hidden_units_of_transformers_in_timm(name: str) -> None:
    """Linear, activation, dropout, linear: one group for each block."""
    found = groups_of(timm.create_model(name), 3, 224, 224)
    assert [
        (g.name.endswith("mlp.fc1"), [c.name.endswith("mlp.fc2") for c in g.consumers]) for g in found.groups
    ] == [(True, [True])] * 12


def test_people_see_groups_and_reasons() -> None:
    shown = format_groups(groups_of(Block()))
    assert shown.startswith("channels that can be removed: 2 of 4 groups\n")
    assert "expand" in shown and "excite, norm, depthwise" in shown and "squeeze, project" in shown
    assert RESIDUAL in shown
