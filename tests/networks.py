"""Networks to walk through, and how the tests do it."""

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_prune.network.models import CifarResNet
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import survey
from dist_prune.network.tracing import Pass, Program, trace


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with batch norms that do something, in evaluation mode."""
    torch.manual_seed(0)
    model = make().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
    return model


def answering(model: nn.Module, images: Tensor) -> nn.Module:
    """The network, with logits that differ between these images by about 1.

    With weights as they are drawn, those of most families are the same for all images to six digits, or zero: then
    nothing is lost, and no copy computes anything else. So batch norms take the images' own statistics, and the
    classifier is drawn to that scale.
    """
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.train().momentum = 1.0
    with torch.no_grad():
        classes = logits_of(model(images)).shape[1]
        model.eval()
        heads = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and len(m.weight) == classes]
        for head in heads:
            nn.init.normal_(head.weight)
        spread = logits_of(model(images)).std(0).mean()
        for head in heads:
            head.weight /= spread
        assert logits_of(model(images)).std(0).mean() > 0.5
    return model


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=7, **extra)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (torchvision_model("resnet18"), 32),
    "mobilenet_v2": (torchvision_model("mobilenet_v2"), 32),
    "densenet121": (torchvision_model("densenet121"), 32),
    "efficientnet_b0": (torchvision_model("efficientnet_b0"), 32),
    "googlenet": (torchvision_model("googlenet"), 32),
    "regnet_y_400mf": (torchvision_model("regnet_y_400mf"), 32),
    "shufflenet_v2_x0_5": (torchvision_model("shufflenet_v2_x0_5"), 32),
    "vit": (tiny_vit, 32),
    "swin_t": (torchvision_model("swin_t"), 32),
    "resnet20": (lambda: CifarResNet(20, 7), 16),
}


def traced(model: nn.Module, image: Tensor) -> Program:
    return trace(model, [site.name for site in survey(model, image[:1]).sites])


def at_every_stop(walk: Pass) -> Iterator[str]:
    for name, place in walk.program.stops.items():
        walk.advance(place)
        yield name


def ended(walk: Pass) -> Tensor:
    walk.advance(len(walk.program.steps))
    return walk.values[walk.program.steps[-1]]
