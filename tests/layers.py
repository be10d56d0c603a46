"""Layers of every kind a site can be, each with an input, for tests that must hold for all."""

import torch
from torch import nn

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "3×3": (nn.Conv2d(6, 8, 3, padding=1), (4, 6, 9, 9)),
    "3×3 no bias": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (4, 6, 9, 9)),
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (4, 6, 9, 9)),
    "1×1": (nn.Conv2d(6, 8, 1), (4, 6, 9, 9)),
    "wide kernel": (nn.Conv2d(3, 8, (1, 7), stride=(1, 2), padding=(0, 3)), (4, 3, 9, 12)),
    "same": (nn.Conv2d(3, 8, (4, 3), padding="same"), (4, 3, 9, 9)),
    "valid": (nn.Conv2d(3, 8, 3, padding="valid"), (4, 3, 9, 9)),
    "reflect": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (4, 3, 9, 9)),
    "circular": (nn.Conv2d(3, 8, 3, padding=(1, 2), padding_mode="circular"), (4, 3, 9, 9)),
    "replicate": (nn.Conv2d(3, 8, 5, padding=2, padding_mode="replicate"), (4, 3, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 9, 9)),
    "grouped strided": (nn.Conv2d(8, 12, 3, stride=2, groups=4), (4, 8, 9, 9)),
    "linear": (nn.Linear(10, 6), (4, 10)),
    "linear no bias": (nn.Linear(10, 6, bias=False), (4, 10)),
    "linear on tokens": (nn.Linear(10, 6), (4, 7, 10)),
}


def layer(kind: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A float64 layer of the kind with random weights, and a batch for it."""
    generator = torch.Generator().manual_seed(seed)
    module, shape = LAYERS[kind]
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module, torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
