"""The windows of its input that a convolution reads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.network.padded import PaddedConv2d


def padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the padding that the convolution makes, whatever its mode."""
    if isinstance(module, PaddedConv2d):
        return module.padded(x)
    if module.padding == "valid":
        return x
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    else:
        sides = [int(side) for p in module.padding[::-1] for side in (p, p)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode)


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What lies under the kernel at every position, (N, in·kh·kw, positions), as `F.unfold` orders it.

    In one copy, where `F.unfold` copies image by image: on a GPU a kernel each, on a CPU twice the time.

    Args:
        module: the convolution.
        x: its input with all padding, (N, in, H, W).
    """
    images, channels, *size = x.shape
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    places = [(n - r) // s + 1 for n, r, s in zip(size, reach, stride, strict=True)]
    image, channel, *axes = x.stride()
    within = [a * d for a, d in zip(axes, dilation, strict=True)]
    onward = [a * s for a, s in zip(axes, stride, strict=True)]
    windows = x.as_strided((images, channels, *kernel, *places), (image, channel, *within, *onward))
    return windows.reshape(images, channels * kernel[0] * kernel[1], places[0] * places[1])
