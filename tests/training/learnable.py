"""A small network, and batches whose classes it can learn."""

import torch
from torch import nn

from dist_prune.data.loader import Batch


def network(seed: int = 0, norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.BatchNorm2d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def batches(steps: int, size: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """The same global batches whatever the number of ranks; classes that can be learned."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(steps):
        labels = torch.randint(4, (size,), generator=generator)
        x = torch.randn(size, 3, 8, 8, generator=generator) + labels[:, None, None, None]
        mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
        result.append(Batch(x[mine], labels[mine], torch.arange(size)[mine]))
    return result
