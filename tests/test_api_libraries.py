"""`compress` on networks of torchvision, timm and transformers: identity, budget, and the predicted loss.

Random weights, batch norms and outputs scaled to the images. The prediction is of second order, and of each site
alone: it is asked for where what is lost stays well below what outputs vary by. At smaller budgets it is too high,
as no more can be lost than there is (of the detector's backbone, 1.4 times at 0.8). Of noise, whose directions all
matter alike, the max pooling behind transformers' ResNet's first layer lets through less than half of what is
predicted; on smooth images, as photographs are, that is not so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn

from dist_prune import Compressor, ModelError, compress


def logits(answer: Any) -> Tensor:
    return answer.logits


def maps(answer: Any) -> Tensor:
    return answer["out"]


def last(features: list[Tensor]) -> Tensor:
    return features[-1]


def pyramid(levels: dict[str, Tensor]) -> Tensor:
    """All levels' features, (n, channels, positions)."""
    return torch.cat([level.flatten(2) for level in levels.values()], 2)


def segmentation(name: str) -> Callable[[], nn.Module]:
    extra = {"aux_loss": False} if name.startswith("fcn") else {}
    return lambda: torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=CLASSES, **extra
    )


def detector() -> Any:
    return torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=64
    )


def resnet_of_hugging_face() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_labels=CLASSES)
    return transformers.ResNetForImageClassification(config)


def vit_of_hugging_face() -> nn.Module:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=CLASSES)
    )


CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A network, which of its outputs counts whether that is given, images, and a budget of MACs."""

    make: Callable[[], nn.Module]
    counts: Callable[[Any], Tensor]
    loss: Literal["kl", "mse"]
    given: bool
    images: int
    size: int
    budget: float
    smooth: int = 1  # pixels between two independent ones


SLOW = pytest.mark.slow
CASES = {
    "transformers' ResNet": Case(resnet_of_hugging_face, logits, "kl", False, 96, 32, 0.8, 4),
    "transformers' ViT": Case(vit_of_hugging_face, logits, "kl", False, 96, 32, 0.5),
    "lraspp": Case(segmentation("lraspp_mobilenet_v3_large"), maps, "kl", False, 32, 64, 0.7),
    "fcn": Case(segmentation("fcn_resnet50"), maps, "kl", False, 32, 64, 0.8),
    "features of timm": Case(
        lambda: timm.create_model("resnet18", features_only=True, zero_init_last=False),
        last,
        "mse",
        True,
        64,
        64,
        0.8,
    ),
    "a detector's backbone": Case(lambda: detector().backbone, pyramid, "mse", True, 48, 64, 0.9),
}


def prepared(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, own = case.make().eval(), case.size // case.smooth
    x = F.interpolate(torch.randn(case.images, 3, own, own), case.size, mode="bilinear")
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        scale = 1 / case.counts(model.eval()(x)).std()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and len(layer.weight) == CLASSES:
                layer.weight.mul_(scale)
    return model, x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n if n.startswith("trans") else pytest.param(n, marks=SLOW) for n in CASES])
def test_the_identity_at_full_rank_the_budget_and_what_is_lost(name: str) -> None:
    case = CASES[name]
    model, x = prepared(case)
    outputs = case.counts if case.given else None
    compressor = Compressor(loss=case.loss, outputs=outputs, correct="none").fit(model, list(x.split(16)))
    with torch.no_grad():
        expected = case.counts(model(x[::8]))
        whole = compressor.compress("uniform:1.0").model
        largest = float((case.counts(whole(x[::8])) - expected).abs().max())
        assert largest < 1e-3 * float(expected.abs().max())
        found = compressor.compress(case.budget)
        assert type(found.model) is type(model) and type(found.model(x[:2])) is type(model(x[:2]))
        assert found.lost == pytest.approx(lost(case.loss, expected, case.counts(found.model(x[::8]))), rel=1e-3)
    assert found.compressed.macs <= case.budget * found.dense.macs
    assert found.predicted is not None and 0.5 < found.predicted / found.lost < 2


def lost(loss: str, dense: Tensor, other: Tensor) -> float:
    """From its definition, the mean over images and positions."""
    if loss == "mse":
        return float((other - dense).double().square().sum(1).mean()) / 2
    p, q = (each.double().log_softmax(1) for each in (dense, other))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.filterwarnings("ignore")
def test_hidden_units_of_transformers_go_and_heads_of_attention_stay_for_a_reason() -> None:
    model, x = prepared(CASES["transformers' ViT"])
    compressor = Compressor(correct="none").fit(model, [x])
    found = compressor.compress(0.4)
    assert {each.group.name for each in found.kept} <= {f"vit.layers.{i}.mlp.fc1" for i in range(2)}
    assert found.kept and found.compressed.macs <= 0.4 * found.dense.macs
    narrow = {each.group.name: len(each.channels) for each in found.kept}
    assert all(
        found.model.get_submodule(name).weight.shape[0] == width
        for name, width in narrow.items()
        if name not in found.plan.factored
    )
    staying = compressor.staying_
    assert staying["vit.layers.0.attention.q_proj"] == "used by view"
    assert "vit.layers.0.mlp.fc1" not in staying
    with torch.no_grad():
        assert torch.isfinite(found.model(x[:3]).logits).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_goes_on_with_its_heads_as_they_were() -> None:
    torch.manual_seed(0)
    model = detector().eval()
    x = torch.rand(16, 3, 64, 64)
    heads = {name: value.clone() for name, value in model.head.state_dict().items()}
    found = compress(
        model.backbone, list(x.split(8)), 0.9, loss="mse", outputs=pyramid, correct="none", width="off"
    )
    model.backbone = found.model
    with torch.no_grad():
        assert {"boxes", "scores", "labels"} <= set(model([x[0]])[0])
    assert all(torch.equal(value, heads[name]) for name, value in model.head.state_dict().items())


def test_several_features_are_refused_without_saying_which_count() -> None:
    model = timm.create_model("resnet18", features_only=True, zero_init_last=False).eval()
    with pytest.raises(ModelError, match=r"list \(0: .*`outputs`"):
        compress(model, [torch.randn(8, 3, 32, 32)], 0.7, loss="mse")
