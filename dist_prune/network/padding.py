"""Convolutions that pad by themselves, as timm's `Conv2dSame`: recognised by what they compute, and written out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dist_prune.network.errors import ModelError
from dist_prune.network.layers import has_hooks
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import evaluating
from dist_prune.network.trial import answer_of, tolerance_of

Sides = tuple[int, int, int, int]  # left, right, top, bottom, as of F.pad
RELATIVE = 1e-4  # what other kernels in float32 stay far below


@fx.wrap  # type: ignore[misc]  # one operation in a traced graph: how much is padded depends on the size
def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Pad with zeros so that a convolution gives ⌈size / stride⌉ positions, the odd one behind, as TensorFlow does.

    Args:
        x: (…, H, W).
        kernel: height and width, as `stride` and `dilation`.
        stride: of the convolution.
        dilation: of the convolution.
    """
    sides: list[int] = []
    for size, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        sides = [total // 2, total - total // 2, *sides]
    return F.pad(x, sides)


class SamePadding(nn.Module):
    """`pad_same` as a layer; whatever the size of the image."""

    def __init__(self, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)


class PaddedConv2d(nn.Sequential):
    """Padding, then a plain convolution; the convolution's attributes are read here, too."""

    def __init__(self, pad: nn.Module, conv: nn.Conv2d) -> None:
        super().__init__()
        self.pad = pad
        self.conv = conv

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the convolution has
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("conv", "_modules"):
                raise
            return getattr(super().__getattr__("conv"), name)


@dataclass(frozen=True)
class Spelled:
    """A network whose convolutions pad explicitly, and which of them padded by themselves before."""

    network: nn.Module
    names: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """For people; empty if none did."""
        if not self.names:
            return ""
        named = ", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")
        return (
            f"{len(self.names)} convolution(s) that pad by themselves stand as padding and a plain convolution, "
            f"NAME.conv: {named}"
        )


def explicitly_padded(model: nn.Module, image: Tensor) -> Spelled:
    """`with_explicit_padding` where the whole network then answers an image as it did; else the network as it is.

    Code around a layer may ask of what class it is.
    """
    spelled = with_explicit_padding(model)
    if not spelled.names:
        return spelled
    with evaluating(model), evaluating(spelled.network):
        before = answer_of(model, image)
        try:
            after = answer_of(spelled.network, image)
        except (RuntimeError, TypeError, AttributeError, ModelError):  # of the network's own code
            return Spelled(model)
    alike = before.shape == after.shape
    off = (after - before).double().norm() if alike else torch.inf
    return spelled if off <= tolerance_of([before]) * before.double().norm() else Spelled(model)


def with_explicit_padding(model: nn.Module, names: Iterable[str] | None = None) -> Spelled:
    """The network with every convolution that pads by itself as padding and a plain `Conv2d` that has its weight.

    A layer counts as such where it gives what they give for images of several sizes. Its parameters are shared.

    Args:
        model: left as it is; returned itself where it has no such layers.
        names: of the layers to look at; all, unless given.
    """
    allowed = None if names is None else set(names)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Conv2d) and (allowed is None or name in allowed):
            plain = spelled_out(module)
            if plain is not None:
                found[name] = plain
    if not found:
        return Spelled(model)
    tensors = [*model.parameters(), *model.buffers()]
    return Spelled(with_replaced(model, found.items(), tensors), tuple(found))


def spelled_out(module: nn.Conv2d) -> nn.Module | None:
    """What computes the same of torch's own convolution; None where nothing does, or where it is one already."""
    weight = module._parameters.get("weight")
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if type(module) is nn.Conv2d or weight is None or weight.is_meta or has_hooks(module):
        return None
    if own - {"weight", "bias"}:  # more than a convolution has, even where it counts for nothing yet
        return None
    images = list(_images(module, weight))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            probe = with_replaced(module, (), module.parameters())
            answers = [probe.train(mode)(image) for mode in (False, True) for image in images]
        except Exception:  # what cannot be copied, or its own forward, which may want anything
            return None
        tried = _candidates(module, images[0], answers[0])
        return next((c for c in tried if _agrees(c, 2 * images, answers)), None)


def _images(module: nn.Conv2d, weight: Tensor) -> Iterator[Tensor]:
    """Noise of several sizes, each remainder of the stride among them, on the layer's device."""
    generator = torch.Generator().manual_seed(0)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    for extra in range(max(sh, sw, 2) + 1):
        height, width = dh * (kh - 1) + 1 + 3 * sh + extra, dw * (kw - 1) + 1 + 4 * sw + 2 * extra
        shape = (2, module.in_channels, height, width)
        yield torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def _candidates(module: nn.Conv2d, image: Tensor, answer: Any) -> Iterator[nn.Module]:  # noqa: ANN401  its own
    """What it may be: a convolution with its own padding, `same`, or so many rows and columns on each side."""
    yield _plain(module, module.padding, module.padding_mode)
    bare = _plain(module, 0, "zeros")
    yield PaddedConv2d(SamePadding(module.kernel_size, module.stride, module.dilation), bare)
    if not isinstance(answer, Tensor) or answer.dim() != 4:
        return
    per_axis = []
    for place in (1, 0):  # columns first, as F.pad wants them
        kernel, stride, dilation = module.kernel_size[place], module.stride[place], module.dilation[place]
        reach = dilation * (kernel - 1)
        needed = (answer.shape[2 + place] - 1) * stride + reach + 1 - image.shape[2 + place]
        # Up to stride - 1 rows more at the end are never read at this size, but are at another.
        ends = [(low, total - low) for total in range(needed, needed + stride) for low in range(reach + 1)]
        per_axis.append([(low, high) for low, high in ends if 0 <= high <= reach + stride])
    for columns, rows in product(*per_axis):
        yield PaddedConv2d(nn.ZeroPad2d((*columns, *rows)), bare)


def _plain(module: nn.Conv2d, padding: Any, mode: str) -> nn.Conv2d:  # noqa: ANN401  as torch takes it
    with torch.device("meta"):
        made = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            padding,
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            bias=module.bias is not None,
            padding_mode=mode,
        )
    made._parameters = dict(module._parameters)
    return made.train(module.training)


def _agrees(candidate: nn.Module, images: Sequence[Tensor], answers: Sequence[Any]) -> bool:
    for image, answer in zip(images, answers, strict=True):
        try:
            found = candidate(image)
        except (RuntimeError, ValueError):  # a padding that this size does not allow
            return False
        if not isinstance(answer, Tensor) or found.shape != answer.shape or found.dtype != answer.dtype:
            return False
        eps = max(RELATIVE, 4 * torch.finfo(answer.dtype).eps)
        if not float((found - answer).double().norm()) <= eps * float(answer.double().norm()):
            return False
    return True
