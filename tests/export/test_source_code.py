"""A network written down as Python computes the same without this package, and reads like code."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.export.formats import ExportError
from dist_prune.export.source_code import write_down, write_source
from dist_prune.factorization.plan import Choice, Plan, choose
from dist_prune.factorization.project import rebuild
from dist_prune.network.models import build
from dist_prune.network.sites import survey

SIDE = 16
IMAGES = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def compressed(arch: str, side: int) -> nn.Module:
    """Half the channels of every site, and weights and statistics by which outputs depend on the images."""
    torch.manual_seed(0)
    dense = build(arch, 7).eval()
    found = survey(dense, torch.randn(1, 3, side, side))
    halves = (Choice(site.name, max(site.outputs // 2 // site.groups, 1) * site.groups) for site in found.sites)
    model = rebuild(dense, Plan(tuple(halves))).train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        model(torch.randn(8, 3, side, side))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def module_of(network: nn.Module, images: Tensor = IMAGES) -> tuple[str, nn.Module]:
    """The text that is written, and the network that it makes."""
    source = write_down(network.eval(), images)
    text = source.module("A title.", "net_weights.pt", images.shape[-1], ["MEAN = 0"])
    scope: dict[str, Any] = {"__file__": "net.py"}
    exec(compile(text, "net.py", "exec"), scope)
    made = scope["network"]()
    made.load_state_dict(source.state)
    return text, made.eval()


def require_same(network: nn.Module, images: Tensor = IMAGES) -> str:
    """Written down, the network computes the same, of one image and of several; the text."""
    text, made = module_of(network, images)
    with torch.no_grad():
        assert network(images).std(0).max() > 1e-3, "what it computes depends on the images"
        for batch in (images, images[:1]):
            torch.testing.assert_close(made(batch), network(batch))
    assert max(map(len, text.splitlines())) <= 120
    return text


# ── networks as they are ───────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_classes_and_layers_stand_in_one_place() -> None:
    text = require_same(compressed("resnet20", SIDE))
    assert text.count("class BasicBlock") == 1 and text.count("class Factored") == 1
    assert "layer1.0, layer1.1, layer1.2, layer2.0 and 5 more" in text
    assert "bn2 = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))" in text
    assert "return F.relu(bn2 + self.shortcut(x))" in text
    assert "reduce=nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)" in text
    assert "linear=Factored(reduce=nn.Linear(64, 3, bias=False), expand=nn.Linear(3, 7))" in text
    assert "for _ in range(3)" in text, "equal blocks are written once"
    imports = [line for line in text.splitlines() if line.startswith(("import", "from"))]
    assert all(line.split()[1].partition(".")[0] in ("__future__", "torch", "pathlib") for line in imports)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "side"),
    [
        ("resnet18", 64),
        ("mnist", 28),
        ("mobilenet_v2", 64),
        ("mobilenet_v3_small", 64),
        ("efficientnet_b0", 64),
        ("densenet121", 64),
        ("googlenet", 96),
        ("squeezenet1_1", 64),
        ("shufflenet_v2_x1_0", 64),
        ("regnet_y_400mf", 64),
        ("convnext_tiny", 64),
        ("vgg11_bn", 64),
        ("vit_b_32", 224),
        ("swin_t", 64),
        ("swin_v2_t", 64),
    ],
)
def test_networks_of_many_kinds_can_be_written_down(arch: str, side: int) -> None:
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    require_same(compressed(arch, side), images)


def test_chains_of_every_form_are_written_down() -> None:
    chosen = (("tucker", (4, 6)), ("vertical", (7,)), ("horizontal", (9,)), ("input", (5,)))
    torch.manual_seed(0)
    dense = build("resnet20", 7).eval()
    spatial = [site.name for site in survey(dense, IMAGES[:1]).sites if site.kernel == (3, 3)][4:]
    plan = Plan(tuple(choose(name, *option) for name, option in zip(spatial, chosen * 3, strict=False)))
    text = require_same(rebuild(dense, plan).eval())
    assert text.count("class Factored") == 2, "pairs, and chains of three layers"
    assert "kernel_size=(3, 1)" in text or "(3, 1), stride" in text


def test_what_is_written_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    network = compressed("resnet20", SIDE)
    agreement = write_source(tmp_path / "net.py", network, IMAGES, "A title.", [])
    assert agreement.same == len(IMAGES) and agreement.difference <= 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.py", "net_weights.pt"]
    assert "dist_prune" not in (tmp_path / "net.py").read_text()


# ── what networks do ───────────────────────────────────────────────────────────────────────────────────────


class Own(nn.Module):
    """Two layers, and `function` of both and of what they are given."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.function = function
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8, 1, 1), persistent=False)
        self.plain = torch.rand(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x).mean((2, 3))


def changed_in_place(own: Own, x: Tensor) -> Tensor:
    y = own.first(x)
    z = y.view(y.shape)
    y += 1
    return torch.relu_(own.second(z)) + y


def order_of_changes(own: Own, x: Tensor) -> Tensor:
    y = own.first(x)
    before = own.second(y)
    y.mul_(2)
    return before + own.second(y)


def masked(own: Own, x: Tensor) -> Tensor:
    mask = x.new_zeros(x.shape[2:])
    for row in range(0, x.shape[2], 2):
        mask[row : row + 1, :] = row
    return own.first(x * mask)


def sizes_decide(own: Own, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    if height % 2 or width > 64:
        raise ValueError("another size")
    return own.first(x).reshape(batch * 2, 4, height, width).reshape(batch, 8, -1, width)


def with_constants(own: Own, x: Tensor) -> Tensor:
    ramp = torch.linspace(0, 1, x.shape[-1]) ** 2
    return own.first(x) * own.scale + own.shift - own.plain * ramp


def with_operators(own: Own, x: Tensor) -> Tensor:
    y = own.first(x)
    return ((y - 1) * (y + 2) / (1 + y * y) - -y) ** 2 % 3


def with_lists(own: Own, x: Tensor) -> Tensor:
    a, b = own.first(x).chunk(2, dim=1)
    return torch.cat([b, a[:, ::2], a[..., :, :][:, 1::2]], dim=1)


def twice(own: Own, x: Tensor) -> Tensor:
    return own.second(own.second(own.first(x)))


def of_numbers(own: Own, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(own.first(x), x.size(-1) // 4) * len(x.shape)


DOES = [changed_in_place, order_of_changes, masked, sizes_decide, with_constants, with_operators, with_lists]
DOES += [twice, of_numbers]


@pytest.mark.parametrize("function", DOES, ids=operator.attrgetter("__name__"))
def test_what_networks_do_is_written_down(function: Callable[..., Tensor]) -> None:
    require_same(Own(function))


class Attending(nn.Module):
    """Layers called by name, with options, from lists; one option is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList(Block(12) for _ in range(2))
        self.heads = nn.ModuleDict({"one": nn.Linear(12, 5)})

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, mask=unused, scaled=True)
        return self.heads["one"](x.mean(1))


class Block(nn.Module):
    """Attention, scaled where one asks for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, scaled: bool = False) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, attn_mask=mask, need_weights=False)
        return x + (0.5 * y if scaled else y)


def test_lists_dictionaries_and_options_are_followed() -> None:
    text = require_same(Attending())
    assert "nn.MultiheadAttention(12, 2, batch_first=True)" in text
    assert text.count("class Block") == 1


# ── what cannot be written down ────────────────────────────────────────────────────────────────────────────


def values_decide(own: Own, x: Tensor) -> Tensor:
    y = own.first(x)
    return y if y.sum() > 0 else -y


def images_decide(own: Own, x: Tensor) -> Tensor:
    return own.first(x) if len(x) == 2 else own.first(x) + 1


def by_hand(own: Own, x: Tensor) -> Tensor:
    return own.first(torch.tensor(x.tolist()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (values_decide, r"Own ''.*test_source_code\.py:\d+\): the values of a tensor decide what is computed"),
        (images_decide, r"Own ''.*test_source_code\.py:\d+\): (it loops over|the number of) .*images"),
        (by_hand, r"Own ''.*test_source_code\.py:\d+\): "),
    ],
    ids=["values", "images", "no operations"],
)
def test_what_cannot_be_followed_is_named_with_its_line(function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ExportError, match="--format python cannot write this network down: " + message):
        write_down(Own(function), IMAGES)


def test_a_layer_that_does_not_say_how_it_was_made_is_named() -> None:
    network = nn.Sequential(nn.Flatten(), nn.LSTM(3 * SIDE * SIDE, 4))
    with pytest.raises(ExportError, match=r"1: nn\.LSTM\(\) cannot be constructed like this"):
        write_down(network, IMAGES)
