"""Networks: built by name, filled with weights, cut down to a plain `nn.Module` that maps images to logits."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dist_prune.config.flags import is_from_file
from dist_prune.network import published, user_code
from dist_prune.network.errors import ModelError
from dist_prune.network.weights import load_file, load_state


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = ZeroPadShortcut(stride, channels - channels_in)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ZeroPadShortcut(nn.Module):
    """Every `stride`-th pixel; `extra` zero channels, half before and half after."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class CifarResNet(nn.Module):
    """ResNet for 32×32 images: 6n+2 layers, 16/32/64 channels (He et al. 2015, section 4.2)."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return cast(Tensor, self.linear(y.mean((2, 3))))


class MnistNet(nn.Module):
    """Two convolutions and two linear layers for 28×28 images in grey."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1]  # pictures come as RGB: of a grey one all three are the same
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return cast(Tensor, self.fc2(F.relu(self.fc1(x.flatten(1)))))


CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56)}


def build(arch: str, classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """An untrained network with `classes` outputs.

    Args:
        arch: a CIFAR ResNet (`resnet20`, …), `mnist`, a torchvision name, a timm name (with the `timm` extra
            installed), or `path/to/file.py:function` with `function(num_classes=…)` returning the network.
        classes: number of outputs.
        options: further arguments of a torchvision network, see `published.options_of`.

    Raises:
        ModelError: the name is unknown, and close matches are offered; or the file cannot be used.
    """
    if is_from_file(arch):
        return user_code.build_from_file(arch, classes)
    if arch in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[arch], classes)
    if arch == "mnist":
        return MnistNet(classes)
    if published.is_torchvisions(arch):
        # The auxiliary heads of these two only serve training from scratch.
        extra = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        extra |= options or {}
        return cast(nn.Module, torchvision.models.get_model(arch, weights=None, num_classes=classes, **extra))
    return _from_timm(arch, classes)


def is_timms(arch: str) -> bool:
    """Whether `build` takes the network from timm; a name that torchvision knows, too, is torchvision's."""
    if is_from_file(arch) or arch in _without_timm() or importlib.util.find_spec("timm") is None:
        return False
    import timm  # noqa: PLC0415  an optional extra

    return bool(timm.is_model(arch))


def _without_timm() -> list[str]:
    return [*CIFAR_DEPTHS, "mnist", *torchvision.models.list_models(module=torchvision.models)]


def _from_timm(arch: str, classes: int) -> nn.Module:
    known = _without_timm()
    hint = "timm is not installed (the `timm` extra), so its names were not searched"
    if importlib.util.find_spec("timm") is not None:
        import timm  # noqa: PLC0415  an optional extra

        if timm.is_model(arch):
            network: nn.Module = timm.create_model(arch, num_classes=classes)
            return network
        known += timm.list_models()
        hint = "torchvision's and timm's names were searched"
    close = difflib.get_close_matches(arch, known, n=5)
    raise ModelError(
        f"unknown architecture {arch!r}; {'close: ' + ', '.join(close) if close else 'nothing is close'} "
        f"({hint}). A network of your own: --arch path/to/file.py:function"
    )


def load(arch: str, classes: int, weights: str) -> nn.Module:
    """The network with its weights, in evaluation mode on the CPU.

    Args:
        arch: see `build`.
        classes: number of outputs.
        weights: a file (see `checkpoint_files`), a torchvision enum (`IMAGENET1K_V1`, `DEFAULT`), `pretrained`
            for timm and for those with which a function in a file returns its network, or `none`.

    Raises:
        ModelError: no such file or enum, a damaged file, or a checkpoint of another architecture.
    """
    model = build(arch, classes, published.options_of(arch, weights))
    fill(model, arch, classes, weights)
    return model.eval()


def fill(model: nn.Module, arch: str, classes: int, weights: str) -> str:
    """Put the weights that `weights` names into the network that `build` made; see `load`.

    Returns:
        What was taken of the file, in words; empty where it fits as it is.
    """
    path, what = Path(weights).expanduser(), f"--weights {weights} into --arch {arch}"
    own = weights == "pretrained" and is_from_file(arch)  # the function has put in what it wants
    if weights == "none" or own:
        return ""
    if path.is_file():
        return load_file(model, path, what)
    if path.is_dir():
        raise ModelError(f"--weights {weights}: is a folder; give the file in it")
    if "://" in weights:
        raise ModelError(f"--weights {weights}: is an address; download it, and give the file")
    named = published.entry_of(arch, weights) is not None and "/" not in weights
    if not named and (path.suffix or "/" in weights):
        raise ModelError(f"--weights {weights}: there is no such file")
    if published.is_torchvisions(arch):
        return load_file(model, published.fetched(arch, classes, weights), what)
    if weights == "pretrained" and is_timms(arch):
        load_state(model, _timms_weights(arch, classes), what)
        return ""
    raise ModelError(f"--weights {weights}: neither a file nor known for {arch}; give a file or 'none'")


def _timms_weights(arch: str, classes: int) -> dict[str, Tensor]:
    import timm  # noqa: PLC0415  an optional extra

    try:
        return dict(timm.create_model(arch, pretrained=True, num_classes=classes).state_dict())
    except Exception as error:  # of timm, or of any of the libraries that fetch its files
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"--weights pretrained: timm has none for {arch}, or they cannot be downloaded "
            f"({type(error).__name__}: {reason}). On a machine without network, give a file: --weights FILE"
        ) from error


def missing_weights(arch: str, weights: str) -> str:
    """The address from which `fill` would download; empty if the weights are at hand, or not known."""
    if weights == "pretrained" and is_timms(arch):
        return f"timm's weights of {arch}"
    entry = None if Path(weights).expanduser().is_file() else published.entry_of(arch, weights)
    return "" if entry is None or published.file_of(entry).is_file() else str(entry.url)
