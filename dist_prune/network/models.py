"""Networks: built by name, loaded from weights, cut down to a plain `nn.Module` that maps images to logits."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class ModelError(ValueError):
    """An architecture or a checkpoint that cannot be used; the message says what to do."""


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


def build(arch: str, classes: int) -> nn.Module:
    """An untrained network with `classes` outputs.

    Args:
        arch: a CIFAR ResNet (`resnet20`, …), `mnist`, a torchvision name, a timm name (with the `timm` extra
            installed), or `path/to/file.py:function` with `function(num_classes=…)` returning the network.
        classes: number of outputs.

    Raises:
        ModelError: the name is unknown; close matches are offered.
    """
    if arch.partition(":")[0].endswith(".py"):
        return _from_file(arch, classes)
    if arch in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[arch], classes)
    if arch == "mnist":
        return MnistNet(classes)
    if arch in torchvision.models.list_models(module=torchvision.models):
        # The auxiliary heads of these two only serve training from scratch.
        extra = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        return cast(nn.Module, torchvision.models.get_model(arch, weights=None, num_classes=classes, **extra))
    return _from_timm(arch, classes)


def _from_file(arch: str, classes: int) -> nn.Module:
    path, _, function = arch.partition(":")
    if not Path(path).is_file():
        raise ModelError(f"--arch {arch}: there is no file {path}")
    name = f"dist_prune_user_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ModelError(f"--arch {arch}: {path} has no function {function!r}; it has {', '.join(names)}")
    return cast(nn.Module, getattr(module, function)(num_classes=classes))


def is_timms(arch: str) -> bool:
    """Whether `build` takes the network from timm; a name that torchvision knows, too, is torchvision's."""
    if (
        arch.partition(":")[0].endswith(".py")
        or arch in _without_timm()
        or importlib.util.find_spec("timm") is None
    ):
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
        weights: a file (state dict, `.pt`/`.pth`/`.safetensors`), a torchvision enum (`IMAGENET1K_V1`,
            `DEFAULT`), `pretrained` for timm, or `none`.

    Raises:
        ModelError: no such file or enum, a damaged file, or a checkpoint of another architecture.
    """
    model = build(arch, classes)
    fill(model, arch, classes, weights)
    return model.eval()


def fill(model: nn.Module, arch: str, classes: int, weights: str) -> None:
    """Put the weights that `weights` names into the network that `build` made; see `load`."""
    if weights != "none":
        load_weights(model, read_weights(arch, classes, weights), f"--weights {weights} into --arch {arch}")


def read_weights(arch: str, classes: int, weights: str) -> dict[str, Tensor]:
    """The state dict that `weights` names (see `load`)."""
    path = Path(weights)
    if path.is_file():
        return _read_file(path)
    if path.suffix or "/" in weights:
        raise ModelError(f"--weights {weights}: there is no such file")
    if arch in torchvision.models.list_models(module=torchvision.models):
        return _download(arch, classes, weights)
    if weights == "pretrained" and arch not in CIFAR_DEPTHS and importlib.util.find_spec("timm") is not None:
        import timm  # noqa: PLC0415  an optional extra

        return dict(timm.create_model(arch, pretrained=True, num_classes=classes).state_dict())
    raise ModelError(f"--weights {weights}: neither a file nor known for {arch}; give a file or 'none'")


def missing_weights(arch: str, weights: str) -> str:
    """The address from which `read_weights` would download; empty if the weights are at hand, or not known."""
    known = torchvision.models.list_models(module=torchvision.models)
    if weights == "pretrained" and is_timms(arch):
        return f"timm's weights of {arch}"
    if Path(weights).is_file() or arch in CIFAR_DEPTHS or arch not in known:
        return ""
    entry = torchvision.models.get_model_weights(arch).__members__.get(weights)
    cached = entry and Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    return "" if cached is None or cached.is_file() else str(entry.url)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415  one of two formats

            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: not readable as weights ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{path}: expected a state dict (name → tensor), got {type(loaded).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _download(arch: str, classes: int, weights: str) -> dict[str, Tensor]:
    known = torchvision.models.get_model_weights(arch)
    if weights not in known.__members__:
        members = ", ".join(known.__members__)
        raise ModelError(f"--weights {weights}: {arch} has {members}; or give a file, or 'none'")
    entry = known[weights]
    if classes != len(entry.meta["categories"]):
        raise ModelError(
            f"--weights {weights} has {len(entry.meta['categories'])} classes, --classes is {classes}: "
            f"leave --classes out or give weights trained on these classes"
        )
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise ModelError(
            f"--weights {weights}: the download failed ({error}). On a machine without network, fetch "
            f"{entry.url} elsewhere and give the file: --weights FILE"
        ) from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy `state` into `model`, every name and shape exact.

    Raises:
        ModelError: names missing, left over or of another shape; up to four of each are named.
    """
    own = model.state_dict()
    # Auxiliary heads are part of torchvision's files but not of the network built here.
    state = {k: v for k, v in state.items() if k in own or not k.startswith(("aux1.", "aux2.", "AuxLogits."))}
    problems = {
        "missing": [k for k in own if k not in state],
        "not in the network": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {k}: {', '.join(v[:4])}" for k, v in problems.items() if v)
        raise ModelError(f"{what}: the checkpoint is of another architecture ({text})")
    model.load_state_dict(state)


def logits_of(output: Any) -> Tensor:  # noqa: ANN401  networks return what they like
    """The logits (N, classes) of what a network returned.

    Raises:
        ModelError: it is not a classification network.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
        what = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the network returned {what}; expected logits (images, classes), floating-point")
    return output


def looks_like_probabilities(answer: Tensor) -> str:
    """A warning where a network's answer (n, classes) is what a softmax gives; else empty."""
    answer = answer.double()
    if not (answer >= 0).all() or not torch.allclose(answer.sum(1), torch.ones_like(answer[:, 0]), atol=1e-3):
        return ""
    return (
        "the network's outputs are not negative and sum to 1, as after a softmax, but are taken for logits: every "
        "divergence is far too small. Take the softmax out of the network"
    )
