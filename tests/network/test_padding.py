"""Convolutions that pad by themselves become plain ones behind the same padding, where they do no more."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

from dist_prune import PlanError, apply, compress, load_compressed
from dist_prune.export.formats import write_onnx, write_program
from dist_prune.export.source_code import write_source
from dist_prune.factorization.forms import FORMS
from dist_prune.network.layers import LAYERS
from dist_prune.network.padded import PaddedConv2d
from dist_prune.network.padding import Padding, note_on, own_paddings, padding_of, plain, with_paddings
from dist_prune.network.sites import describe, input_rows, survey
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


class OfSmallImages(nn.Conv2d):
    """Pads small images only."""

    def __init__(self, below: int) -> None:
        super().__init__(3, 8, 3)
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)) if x.shape[-1] < self.below else x)


class Around(nn.Conv2d):
    """Of a map of the globe: columns go round, rows end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(F.pad(x, (1, 1, 0, 0), "circular"), (0, 0, 1, 1)))


class Mirroring(nn.Conv2d):
    """Mirrors at the edges, more behind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 2, 0, 1), "reflect"))


class StaticSame(nn.Conv2d):
    """As `Conv2dStaticSamePadding` of efficientnet_pytorch: a module of its own pads for one size of image."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


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


# ── recognised by what they compute ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [
        (3, 2, 1, 1),
        (3, 1, 1, 1),
        (5, 2, 1, 4),
        ((3, 5), (2, 1), (2, 1), 2),
        (2, 1, 1, 1),
        (4, 3, 1, 1),
        (7, 2, 2, 8),
    ],
)
def test_same_padding_computes_the_same_at_sizes_that_were_not_tried(
    kernel: int, stride: int, dilation: int, groups: int
) -> None:
    module = Conv2dSame(8, 16, kernel, stride, dilation=dilation, groups=groups)
    found = plain(module)
    assert type(found) in LAYERS and [name for name, _ in found.named_parameters()] == ["weight", "bias"]
    assert found.weight is module.weight and found.bias is module.bias
    for height, width in [(31, 47), (32, 33), (64, 20), (20, 29)]:
        x = torch.randn(1, 8, height, width)
        torch.testing.assert_close(found(x), module(x))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "sides", "mode"),
    [
        (Ahead, ((2, 0), (1, 0)), "zeros"),
        (StaticSame, ((0, 1), (0, 1)), "zeros"),
        (Mirroring, ((0, 1), (1, 2)), "reflect"),
        (Renamed, ((0, 0), (0, 0)), "zeros"),
    ],
)
def test_fixed_padding_is_found_on_each_side(
    kind: type[nn.Conv2d], sides: tuple[tuple[int, int], ...], mode: str, stride: int
) -> None:
    module = kind(3, 8, 3, stride)
    with torch.no_grad():
        module.weight.zero_()  # weights do not matter: of a layer of zeros any padding seems right
    assert padding_of(module) == Padding(sides, mode)
    nn.init.normal_(module.weight)
    for side in (29, 30, 31):
        x = images(2, side)
        torch.testing.assert_close(plain(module)(x), module(x))


def test_what_torch_itself_can_pad_becomes_torchs_own() -> None:
    x = images(2, 30)
    for given in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}, {"padding": (0, 2)}):
        module = Renamed(3, 8, 3, **given)
        found = plain(module)
        assert type(found) is nn.Conv2d
        torch.testing.assert_close(found(x), module(x))
    ordinary = nn.Conv2d(3, 8, 3, padding="same")
    assert plain(ordinary) is ordinary


@pytest.mark.parametrize(
    "module",
    [
        StdConv2d(3, 8, 3),
        Rectified(3, 8, 3),
        Noisy(3, 8, 3),
        Adapted(),
        OfSmallImages(12),
        OfSmallImages(60),
        Around(3, 8, 3),
    ],
)
def test_what_computes_anything_else_stays_dense_with_a_way_out(module: nn.Conv2d) -> None:
    net = nn.Sequential(module, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for side in (40, 80):  # one that pads below 60 alone is found out at either size
        assert own_paddings(net, images(1, side)) == {}
    (skipped,) = survey(net, images(1)).skipped
    assert skipped.name == "0"
    assert skipped.reason.startswith(f"{type(module).__name__} computes its output in its own way")
    assert "write it as one" in skipped.reason


def test_a_layer_with_hooks_or_more_parameters_stays_what_it_is() -> None:
    hooked = Conv2dSame(3, 8, 3, 2)
    hooked.register_forward_hook(lambda m, i, y: y)
    assert plain(hooked) is hooked
    odd = Adapted()
    assert plain(odd) is odd


def test_a_network_that_asks_for_the_class_of_a_layer_keeps_that_layer() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next, self.fc = Conv2dSame(3, 8, 3, 2), Conv2dSame(8, 8, 3, 2), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.next(self.conv(x))
            return self.fc((y if isinstance(self.conv, Conv2dSame) else 2 * y).mean((2, 3)))

    assert list(own_paddings(Asking().eval(), images(1))) == ["next"]


# ── as layers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Conv2dSame, Ahead, Mirroring])
@pytest.mark.parametrize("stride", [1, 2])
def test_chains_of_every_form_pad_as_the_layer_did(form: str, kind: type[nn.Conv2d], stride: int) -> None:
    """A chain's kernels folded into one layer compute what the chain does: the padding was split by axis."""
    torch.manual_seed(0)
    module, x = plain(kind(3, 8, 3, stride).double()), images(2, 18).double()
    ranks = FORMS[form].full_ranks(describe("", module))
    chain = FORMS[form].build(module, ranks).double()
    dense = FORMS[form].fold(chain)
    assert dense(x).shape == module(x).shape
    torch.testing.assert_close(chain(x)[..., 2:-2, 2:-2], dense(x)[..., 2:-2, 2:-2])
    for layer in list(chain)[:-1]:
        assert layer.bias is None
    torch.testing.assert_close(chain(x), dense(x))
    assert dense.sides == module.sides if isinstance(module, PaddedConv2d) else dense.padding == module.padding


def test_patches_are_those_that_the_layer_sees() -> None:
    for module in (Conv2dSame(3, 8, 3, 2), Ahead(3, 8, 3, 2), Mirroring(3, 8, 3)):
        layer, x = plain(module), images(2, 18)
        rows = input_rows(describe("", layer), layer, x)
        y = torch.einsum("od,dnp->nop", layer.weight.flatten(1), rows) + layer.bias[:, None]
        torch.testing.assert_close(y, module(x).flatten(2))


# ── in networks ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_network_of_them_is_traced_and_its_channels_are_followed() -> None:
    model = network()
    found = own_paddings(model, images(1))
    spelled = with_paddings(model, found)
    assert list(found) == ["0", "4", "6"] and "3 convolution(s)" in note_on(found)
    assert type(model[0]) is Conv2dSame, "the given network stays"
    assert spelled.state_dict().keys() == model.state_dict().keys()
    assert set(trace(spelled, ["0", "6"]).stops) == {"0", "6"}
    groups = find_groups(spelled, images(2)).groups
    assert [group.producers for group in groups] == [("0",), ("2",), ("6",)]
    assert groups[1].between == ("4",), "channels pass through padding and a depthwise convolution"


@pytest.mark.parametrize("width", ["off", "on"])
def test_such_a_network_is_compressed_saved_loaded_applied_and_exported(width: str, tmp_path: Path) -> None:
    model, x = network(), images(48)
    found = compress(model, [x], ranks=0.5, width=width)
    assert found.plan.kept if width == "on" else "6" in found.plan.factored
    assert found.compressed.macs <= 0.5 * found.dense.macs
    assert "3 convolution(s) that pad by themselves" in found.summary()
    found.save(tmp_path / "small")
    with torch.no_grad():
        expected = found.model(x)
        torch.testing.assert_close(load_compressed(tmp_path / "small", network())(x), expected)
        mine = apply(found.plan, network())
        mine.load_state_dict(found.model.state_dict())
        torch.testing.assert_close(mine.eval()(x), expected)
    if width == "on":
        write_onnx(tmp_path / "m.onnx", found.model, x[:4])
        write_program(tmp_path / "m.pt2", found.model, x[:4])
        write_source(tmp_path / "m.py", found.model, x[:4], "small", [])


def test_at_full_rank_it_computes_the_same_at_other_sizes_under_the_same_names() -> None:
    model, other = network(), images(4, 20)
    found = compress(model, [images(48)], {"0": 12, "6": "vertical:48"}, correct="none")
    with torch.no_grad():
        torch.testing.assert_close(found.model(other), model(other), rtol=1e-3, atol=1e-5)
    own, kept = model.state_dict(), found.model.state_dict()
    assert {name for name in own if name in kept} == {n for n in own if not n.startswith(("0.", "6."))}


def test_a_plan_of_a_layer_that_cannot_be_one_is_refused_with_nothing_changed() -> None:
    plan = compress(network(), [images(48)], {"6": 4}, correct="none").plan
    model = network()
    model[6] = StdConv2d(24, 16, 3, padding=1)
    before = list(model)
    with pytest.raises(PlanError, match="6 is a StdConv2d here, which computes its output in its own way"):
        apply(plan, model)
    assert list(model) == before


@pytest.mark.filterwarnings("ignore:fewer rows")
@pytest.mark.parametrize(
    "name",
    [
        "tf_mobilenetv3_small_minimal_100",
        pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("tf_efficientnetv2_b0", marks=pytest.mark.slow),
    ],
)
def test_timms_networks_with_tensorflows_padding(name: str, tmp_path: Path) -> None:
    """In float64: with random weights, rounding in float32 alone changes some answers by a tenth."""
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).double(), images(16, 32).double()
    with torch.no_grad():
        model.train()(x)  # batch norm's statistics
    model.eval()
    own = [n for n, m in model.named_modules() if isinstance(m, Conv2dSame)]
    assert own and list(own_paddings(model, x[:1])) == own
    sites = f"conv_stem,{own[1].rpartition('.')[0]}.*"
    whole = compress(model, [x], "uniform:1.0", correct="none", sites=sites)
    found = compress(model, [x], {"conv_stem": "vertical:3"}, sites=sites, resolve_dense=False)
    found.save(tmp_path / name, arch=name)
    with torch.no_grad():
        torch.testing.assert_close(whole.model(x), model(x))
        torch.testing.assert_close(
            load_compressed(tmp_path / name).double()(x), found.model(x), rtol=1e-3, atol=1e-3
        )
    assert found.lost <= found.lost_projected
    assert {n for n in model.state_dict() if "conv_stem" not in n} <= set(found.model.state_dict())
