"""Convolutions that pad by themselves become padding and a plain convolution, where they compute what these do."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

from dist_prune import apply, compress, load_compressed
from dist_prune.export.formats import write_onnx, write_program
from dist_prune.export.source_code import write_source
from dist_prune.network.padding import PaddedConv2d, explicitly_padded, spelled_out, with_explicit_padding
from dist_prune.network.sites import survey
from dist_prune.network.tracing import trace
from dist_prune.width.groups import find_groups


class Ahead(nn.Conv2d):
    """Pads above and to the left alone, as a causal convolution does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 2, 0)))


class Renamed(nn.Conv2d):
    """Nothing of its own."""


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Noisy(nn.Conv2d):
    """As a plain one, but for training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class Adapted(nn.Conv2d):
    """With a parameter that counts for nothing yet."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.more = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more


class OfBigImages(nn.Conv2d):
    """Pads small images only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)) if x.shape[-1] < 12 else x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2dSame(3, 12, 3, 2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 1),
        nn.ReLU(),
        Conv2dSame(24, 24, 5, 2, groups=24),
        nn.ReLU(),
        Conv2dSame(24, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def images(count: int, side: int = 17) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [(3, 2, 1, 1), (3, 1, 1, 1), (5, 2, 1, 4), ((3, 5), (2, 1), (2, 1), 2), (2, 1, 1, 1), (4, 3, 1, 1), (7, 2, 2, 8)],
)
def test_same_padding_is_recognised_and_computes_the_same_at_sizes_that_were_not_tried(
    kernel: int, stride: int, dilation: int, groups: int
) -> None:
    module = Conv2dSame(8, 16, kernel, stride, dilation=dilation, groups=groups)
    found = spelled_out(module)
    assert isinstance(found, PaddedConv2d) and type(found.conv) is nn.Conv2d
    assert found.conv.weight is module.weight and found.conv.bias is module.bias
    for height, width in [(31, 47), (32, 33), (64, 20), (20, 29)]:
        x = torch.randn(1, 8, height, width)
        torch.testing.assert_close(found(x), module(x))


def test_fixed_padding_of_any_sides_and_the_convolutions_own_are_recognised() -> None:
    x = images(2, 30)
    for stride in (1, 2, 3):
        ahead = Ahead(3, 8, 3, stride)
        found = spelled_out(ahead)
        assert isinstance(found, PaddedConv2d) and isinstance(found.pad, nn.ZeroPad2d)
        for side in (29, 30, 31):
            torch.testing.assert_close(found(x[..., :side, :side]), ahead(x[..., :side, :side]))
    renamed = Renamed(3, 8, 3, 2, 1, padding_mode="reflect")
    own = spelled_out(renamed)
    assert type(own) is nn.Conv2d
    torch.testing.assert_close(own(x), renamed(x))


@pytest.mark.parametrize(
    "module", [StdConv2d(3, 8, 3), Rectified(3, 8, 3), Noisy(3, 8, 3), Adapted(), OfBigImages(3, 8, 3)]
)
def test_what_computes_anything_else_stays_dense_with_a_way_out(module: nn.Conv2d) -> None:
    assert spelled_out(module) is None
    net = nn.Sequential(module, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    (skipped,) = survey(explicitly_padded(net, images(1)).network, images(1)).skipped
    assert skipped.name == "0"
    assert skipped.reason.startswith(f"{type(module).__name__} computes its output in its own way")
    assert "write it as one" in skipped.reason


def test_a_network_that_asks_for_the_class_of_its_layers_is_left_as_it_is() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = Conv2dSame(3, 8, 3, 2), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.fc((y if isinstance(self.conv, nn.Conv2d) else 2 * y).mean((2, 3)))

    model = Asking().eval()
    assert explicitly_padded(model, images(1)).network is model


def test_a_network_of_them_is_traced_and_its_channels_are_followed() -> None:
    model = network()
    spelled = explicitly_padded(model, images(1))
    assert spelled.names == ("0", "4", "6") and "3 convolution(s)" in spelled.note
    assert type(model[0]) is Conv2dSame, "the given network stays"
    assert set(trace(spelled.network, ["0.conv", "6.conv"]).stops) == {"0.conv", "6.conv"}
    groups = find_groups(spelled.network, images(2)).groups
    assert [group.producers for group in groups] == [("0.conv",), ("2",), ("6.conv",)]
    assert groups[1].between == ("4.conv",), "channels pass through padding and a depthwise convolution"


def test_such_a_network_is_compressed_saved_loaded_applied_and_exported(tmp_path: Path) -> None:
    model, x = network(), images(48)
    found = compress(model, [x], ranks=0.5)
    assert "6.conv" in found.plan.factored
    assert found.compressed.macs <= 0.5 * found.dense.macs
    found.save(tmp_path / "small")
    with torch.no_grad():
        expected = found.model(x)
        torch.testing.assert_close(load_compressed(tmp_path / "small", network())(x), expected)
        mine = apply(found.plan, network())
        mine.load_state_dict(found.model.state_dict())
        torch.testing.assert_close(mine.eval()(x), expected)
        other = images(4, 20)  # the padding follows the size
        whole = compress(model, [x], ranks={"0.conv": 12, "6.conv": 16}, correct="none", width="off")
        torch.testing.assert_close(whole.model(other), model(other), rtol=1e-3, atol=1e-5)
    write_onnx(tmp_path / "m.onnx", found.model, x[:4])
    write_program(tmp_path / "m.pt2", found.model, x[:4])
    write_source(tmp_path / "m.py", found.model, x[:4], "small", [])


def test_only_layers_of_these_names_are_looked_at() -> None:
    assert with_explicit_padding(network(), ["4"]).names == ("4",)
