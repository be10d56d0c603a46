import pytest
import torch
from torch import nn

from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import (
    SiteError,
    bias_of,
    describe,
    input_rows,
    matches,
    output_rows,
    survey,
    weight_of,
)
from tests.layers import LAYERS, layer


class Zoo(nn.Module):
    """A classifier with every reason for staying dense."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.never = nn.Linear(4, 4)
        self.tied = nn.Linear(8, 8)
        self.also_tied = nn.Linear(8, 8)
        self.also_tied.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(torch.relu(self.twice(self.depthwise(self.stem(x)))))
        y = self.also_tied(self.tied(y.flatten(2).transpose(1, 2)))
        return self.head(self.attention(y, y, y)[0].mean(1))


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo().eval()


def test_survey_finds_sites_in_execution_order_and_gives_reasons(zoo: Zoo) -> None:
    found = survey(zoo, torch.zeros(1, 3, 6, 6))
    assert [site.name for site in found.sites] == ["stem", "twice", "head"]
    assert {s.name: s.reason for s in found.skipped} == {
        "depthwise": "depthwise: each group has one input channel",
        "never": "its forward never runs",
        "tied": "shares its weight with another layer",
        "also_tied": "shares its weight with another layer",
        "attention.out_proj": "NonDynamicallyQuantizableLinear computes its output in its own way",
    }
    assert found.classes == 5


class Coordinates(nn.Module):
    """A bias made from coordinates, and tokens that come before images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.each, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.bias, self.alone = nn.Linear(2, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x.flatten(2)) + self.bias(torch.ones(1, 2))
        mixed = self.each(tokens.transpose(0, 1)).mean(0)
        return self.head(torch.stack([self.alone(image) for image in mixed]))


def test_layers_whose_rows_are_of_no_image_stay() -> None:
    found = survey(Coordinates(), torch.zeros(1, 3, 3, 4))
    assert [site.name for site in found.sites] == ["stem", "alone", "head"]
    assert {s.name: s.reason for s in found.skipped} == {
        "bias": "its first dimension is not that of images: 1 for one image, 1 for two",
        "each": "its first dimension is not that of images: 3 for one image, 3 for two",
    }


def test_a_module_used_twice_is_one_site_with_both_calls_rows(zoo: Zoo) -> None:
    found = {site.name: site for site in survey(zoo, torch.zeros(1, 3, 6, 6)).sites}
    assert found["stem"].rows == 36
    assert found["twice"].rows == 72
    assert found["head"].rows == 1


def test_survey_leaves_the_network_as_it_was(zoo: Zoo) -> None:
    zoo.train()
    zoo.head.eval()
    survey(zoo, torch.zeros(1, 3, 6, 6))
    assert zoo.training and not zoo.head.training
    assert not any(m._forward_hooks for m in zoo.modules())
    zoo.eval()


def test_macs_of_resnet18_are_the_published_ones() -> None:
    import torchvision

    found = survey(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    assert found.macs == sum(site.macs for site in found.sites) == 1_814_073_344
    assert found.params == 11_689_512


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_its_matrix_times_its_patches(kind: str) -> None:
    module, x = layer(kind)
    site = describe(kind, module)
    y = output_rows(site, module(x))
    patches = input_rows(site, module, x)
    images, positions = y.shape[1:]
    product = weight_of(module, site) @ patches.reshape(site.groups, site.inputs, -1)
    product = product + bias_of(module, site)[..., None]
    torch.testing.assert_close(product.reshape(site.outputs, images, positions), y)


def test_patterns_choose_by_name_and_kind() -> None:
    conv, strided, linear = (describe(f"layer1.{k}", layer(k)[0]) for k in ("3×3", "strided", "linear"))
    chosen = {
        "*": [conv, strided, linear],
        "@conv": [conv, strided],
        "@stride1": [conv],
        "@linear": [linear],
        "*, !@linear": [conv, strided],
        "!*strided": [conv, linear],
        "layer2.*": [],
    }
    for patterns, expected in chosen.items():
        assert [s for s in (conv, strided, linear) if matches(s, patterns)] == expected, patterns
    with pytest.raises(SiteError, match="unknown kind '@stride2'; known: @conv"):
        matches(conv, "@stride2")


def test_a_choice_of_nothing_is_an_error_that_names_sites(zoo: Zoo) -> None:
    found = survey(zoo, torch.zeros(1, 3, 6, 6))
    with pytest.raises(SiteError, match=r"chooses none of 3 sites \(stem, twice, head"):
        found.select("layer9.*")
    left = found.select("stem")
    assert [s.name for s in left.sites] == ["stem"]
    assert ("head", "not in --sites stem") in [(s.name, s.reason) for s in left.skipped]


def test_replacing_copies_the_network_and_leaves_the_original(zoo: Zoo) -> None:
    new = nn.Linear(8, 5)
    copy = with_replaced(zoo, [("head", new)])
    assert copy.get_submodule("head") is new
    assert zoo.head is not new
    assert copy.stem.weight is not zoo.stem.weight
    assert copy.also_tied.weight is copy.tied.weight
