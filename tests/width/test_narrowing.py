"""Networks with fewer channels: what they compute, and what they cost."""

from collections.abc import Sequence

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dist_prune.network.channels import Group, KeptChannels
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.outputs import logits_of
from dist_prune.width.elimination import Prediction
from dist_prune.width.groups import find_groups
from dist_prune.width.narrowing import narrowed
from tests.networks import NETWORKS, answering, seeded

TIMM = {
    "resnet26d": 64,
    "tf_efficientnet_lite0": 64,  # convolutions that pad by themselves
    "mobilenetv3_small_050": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
}
SLOW = {
    **dict.fromkeys(
        ("regnety_002", "seresnet18", "hrnet_w18_small", "res2net50_14w_8s", "dla34", "repvgg_a0"), 64
    ),
    **dict.fromkeys(("efficientnetv2_rw_t", "mobileone_s0", "ghostnet_050", "nfnet_l0", "resnest14d"), 64),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "vit_small_patch16_224", "cait_xxs24_224", "levit_128"), 224),
    **dict.fromkeys(("maxvit_pico_rw_256", "coatnet_pico_rw_224", "poolformer_s12", "edgenext_xx_small"), 256),
}


def halves(groups: Sequence[Group], seed: int = 0) -> list[KeptChannels]:
    """Of every group a random half of the channels, two groups of them fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(g.width, generator=generator)[: max(1, g.width // 2)] for g in groups]
    return [KeptChannels(g, tuple(sorted(index.tolist()))) for g, index in zip(groups, order, strict=True)]


def cost(model: nn.Module, image: Tensor) -> tuple[int, int]:
    with MultiplyAdds() as counter, torch.no_grad():
        model(image)
    return counter.total, sum(p.numel() for p in model.parameters())


def check_full_width_and_half(model: nn.Module, images: Tensor) -> None:
    answering(model, images)
    found = find_groups(model, images)
    assert found.groups, found.staying
    everything = [KeptChannels(g, tuple(range(g.width))) for g in found.groups]
    with torch.no_grad():
        expected = logits_of(model(images))
        full = logits_of(narrowed(model, everything)(images))
        half = narrowed(model, halves(found.groups))
        assert logits_of(half(images)).shape == expected.shape
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-5)
    before, after = cost(model, images[:1]), cost(half, images[:1])
    assert after[0] < before[0] and after[1] < before[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_full_width_is_the_identity(name: str) -> None:
    make, size = NETWORKS[name]
    check_full_width_and_half(
        seeded(make), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_full_width_is_the_identity_in_timm(name: str) -> None:
    size = (TIMM | SLOW)[name]
    model = seeded(lambda: timm.create_model(name, num_classes=7))
    check_full_width_and_half(model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_full_width_is_the_identity_in_torchvision(name: str) -> None:
    if sum(w in name for w in ("_128gf", "vit_l", "vit_h", "convnext_large", "_32gf")):
        pytest.skip("hundreds of millions of parameters")
    size = 224 if name.startswith(("vit", "swin", "maxvit")) else 96
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = seeded(lambda: torchvision.models.get_model(name, weights=None, num_classes=7, **extra))
    check_full_width_and_half(model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


class Chain(nn.Module):
    """Convolution, batch norm, depthwise, convolution without bias, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second = nn.Conv2d(6, 5, 3, bias=False)
        self.linear = nn.Linear(5 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.depthwise(self.norm(self.first(x)).relu())
        return self.linear(nn.functional.adaptive_avg_pool2d(self.second(z).relu(), 2).flatten(1))


def test_a_narrow_network_is_the_dense_one_with_the_other_channels_cut_off() -> None:
    model = seeded(Chain)
    images = torch.randn(3, 3, 9, 9)
    found = find_groups(model, images)
    kept = halves(found.groups)
    removed = {each.group.name: sorted(set(range(each.group.width)) - set(each.channels)) for each in kept}
    cut = seeded(Chain)
    with torch.no_grad():
        cut.second.weight[:, removed["first"]] = 0
        cut.linear.weight.view(4, 5, 4)[:, removed["second"]] = 0
        torch.testing.assert_close(narrowed(model, kept)(images), cut(images))


def test_what_was_removed_is_predicted_from_what_is_left() -> None:
    """Channels that are affine functions of others, and the network computes the same without them."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)))
    with torch.no_grad():  # channel 5 = ReLU(2 · what 1 gets), channel 4 a constant
        model[0].weight[5], model[0].bias[5] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[0].weight[4], model[0].bias[4] = 0, 0.7
    group = Group(
        6, ("0",), (), find_groups(nn.Sequential(model, nn.Flatten()), torch.randn(2, 3, 5, 5)).groups[0].consumers
    )
    group = Group(6, ("0",), (), tuple(type(c)(c.name.removeprefix("0."), c.repeat) for c in group.consumers))
    weights, offset = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    weights[:4] = torch.eye(4)
    weights[5, 1], offset[4] = 2, 0.7
    images = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        narrow = narrowed(model, [KeptChannels(group, (0, 1, 2, 3))], {"2": Prediction(weights, offset)})
        torch.testing.assert_close(narrow(images), model(images))
    assert narrow[2].bias is not None and narrow[0].out_channels == narrow[2].in_channels == 4
