"""Small networks of attention, of every kind that is known and of some that are not."""

from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, ShiftedWindowAttentionV2, SwinTransformerBlockV2

from tests.networks import tiny_vit


def timms(**options: object) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
    return VisionTransformer(**{**sizes, "num_classes": 5, **options})


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=False)
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(256, 16), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(48, 5)
    )


class Encoded(nn.Module):
    """PyTorch's own encoder, without a mask or with one."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.stem, self.head = nn.Linear(256, 16), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.mask = torch.eye(3).bool() if masked else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x.flatten(2))
        mixed = self.encoder(tokens) if self.mask is None else self.encoder(tokens, self.mask)
        return self.head(mixed.mean(1))


def swin(stages: int = 2) -> nn.Module:
    """Maps of 8 and 4, cut into windows that do not divide them, every second time shifted."""
    return torchvision.models.SwinTransformer([2, 2], 8, [2] * stages, [2, 4][:stages], [3, 2], num_classes=5)


def swin_v2() -> nn.Module:
    blocks = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return torchvision.models.SwinTransformer([2, 2], 8, [2], [2], [4, 4], num_classes=5, **blocks)


def timms_swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=5
    )


def timms_swin_v2() -> nn.Module:
    return timm.models.SwinTransformerV2(
        img_size=16, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, num_classes=5
    )


NORMALISED: dict[str, tuple[Callable[[], nn.Module], int]] = {  # queries and keys
    "qk_norm": (partial(timms, qk_norm=True), 16),
    "swin v2": (swin_v2, 16),
    "timm's swin v2": (timms_swin_v2, 16),
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm": (timms, 16),
    "torchvision": (tiny_vit, 32),
    "swin": (swin, 16),
    "timm's swin": (timms_swin, 16),
    "nn.TransformerEncoder": (Encoded, 16),
    **NORMALISED,
}


def lively(make: Callable[[], nn.Module]) -> nn.Module:
    """With attention that attends, and a classifier that is not zero."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, ShiftedWindowAttentionV2):  # which takes no notice of this bias
                module.qkv.bias.chunk(3)[1].zero_()
    return model


def images(size: int, count: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(256, 8), Scaled(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.stem(x.flatten(2))).mean(1))


class Scaled(nn.Module):
    """Looks like attention, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, 1.1 * v).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(256, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)


class Masked(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2))
        return self.head(self.attention(x, x, x, attn_mask=torch.eye(3).bool())[0].mean(1))


class Weighing(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2))
        mixed, weights = self.attention(x, x, x)
        return self.head((mixed + weights.sum((1, 2))[:, None, None]).mean(1))
