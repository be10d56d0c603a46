"""A vision transformer of timm for images of 32², small enough to be trained on a CPU.

For the program, `--arch tests/bench/tiny_vit.py:vit`: 64 patches of 4², width 96, four blocks of three heads.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn


def vit(num_classes: int = 10) -> nn.Module:
    """0.46 M parameters; classifies the mean of all patches."""
    network: nn.Module = VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
    )
    return network
