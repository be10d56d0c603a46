"""Networks of every family with random weights at half of their MACs, saved, read back and exported.

Full width is the identity for all of them: `test_narrowing.py`. Slow: a minute a network; so each is exported in
one of the forms, which take turns.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dist_prune import compress, load_compressed
from dist_prune.export.writers import FILES
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.outputs import logits_of
from tests.networks import answering, seeded

CLASSES, IMAGES, BUDGET = 7, 16, 0.5
TORCHVISION = {
    **dict.fromkeys(("resnext50_32x4d", "regnet_y_400mf", "densenet121", "squeezenet1_1"), 64),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0"), 64),
    **dict.fromkeys(("shufflenet_v2_x0_5", "googlenet", "convnext_tiny", "swin_t"), 64),
    "inception_v3": 96,
}
TIMM = {
    **dict.fromkeys(("resnet26d", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"), 64),
    **dict.fromkeys(("regnety_002", "ghostnet_050", "repvgg_a0", "hrnet_w18_small"), 64),
    **dict.fromkeys(("mixer_s32_224", "levit_128s", "vit_tiny_patch16_224", "deit_tiny_patch16_224"), 224),
}


def torchvisions(name: str) -> nn.Module:
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra)


def vgg11_bn() -> nn.Module:
    """With 512 hidden units: its own 4096 took over a quarter of an hour, for eigenvectors of 4096² matrices."""
    model = torchvision.models.vgg11_bn(weights=None, num_classes=CLASSES)
    for place, sizes in ((0, (512 * 7 * 7, 512)), (3, (512, 512)), (6, (512, CLASSES))):
        model.classifier[place] = nn.Linear(*sizes)
    return model


def vit() -> nn.Module:
    """A third as deep and half as wide as vit_b_16, which took over a quarter of an hour, for layers all alike."""
    return torchvision.models.VisionTransformer(224, 16, 4, 6, 384, 1536, num_classes=CLASSES)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (partial(torchvisions, name), size) for name, size in TORCHVISION.items()},
    "vgg11_bn": (vgg11_bn, 64),
    "vit": (vit, 224),
    **{
        f"timm/{name}": (partial(timm.create_model, name, num_classes=CLASSES), size)
        for name, size in TIMM.items()
    },
}


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    with MultiplyAdds() as counter, torch.no_grad():
        model(image)
    return counter.total


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "form"), zip(NETWORKS, cycle(FILES), strict=False))
def test_half_the_macs_and_an_export(name: str, form: str, tmp_path: Path) -> None:
    make, size = NETWORKS[name]
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = answering(seeded(make), images)
    found = compress(model, [images], BUDGET, draws=1)

    assert multiply_adds(found.model, images[:1]) <= BUDGET * multiply_adds(model, images[:1])
    with torch.no_grad():
        expected = logits_of(found.model(images[:3]))
        assert expected.shape == (3, CLASSES) and expected.isfinite().all() and expected.std(0).mean() > 0.01
        found.save(tmp_path / "saved")
        again = load_compressed(tmp_path / "saved", seeded(make))
        torch.testing.assert_close(logits_of(again(images[:3])), expected)
    assert found.export(tmp_path / "file", form, images=images[:3])  # is read back and compared
