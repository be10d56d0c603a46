"""Images as pretrained networks were trained on them: what no flag says, timm or torchvision does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from dist_prune.config.flags import ConfigError
from dist_prune.config.images import ImageSpec
from dist_prune.config.run import NetworkConfig, Run, to_dict
from dist_prune.config.settings import changed
from dist_prune.network.models import is_timms
from dist_prune.network.published import entry_of, options_of

KINDS = ("bilinear", "bicubic")  # of interpolation that can be had here
SHIFTING = ("googlenet", "inception_v3")


def adapted(run: Run, given: Collection[str]) -> Run:
    """The run with crop, resize, mean, std and interpolation of its network, but for flags that were given.

    Networks of timm bring their own, and torchvision's weights theirs; all others leave the run as it is. A
    --crop that is given without --resize keeps the share of the picture.

    Raises:
        ConfigError: the network wants images that cannot be had here.
    """
    crop = run.images.image.crop if "crop" in given else 0
    wanted = spec_of(run.network, crop)
    if wanted is None:
        return run
    values = {("images", "image", n): value for n, value in to_dict(wanted).items() if n not in given}
    return changed(run, {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()})


def spec_of(network: NetworkConfig, crop: int = 0) -> ImageSpec | None:
    """How the network wants images; None where nobody says. `crop` instead of its own size if above 0.

    Raises:
        ConfigError: not square, or not of three channels.
    """
    if is_timms(network.arch):
        return _timms(network.arch, crop)
    entry = entry_of(network.arch, network.weights)
    if entry is None:
        return None
    known = entry.transforms()
    (own,), (resize,) = known.crop_size, known.resize_size
    side = crop or own
    kind = _kind(known.interpolation.value)
    return ImageSpec(side * resize // own, side, tuple(known.mean), tuple(known.std), kind)


def _timms(arch: str, crop: int) -> ImageSpec:
    known = _data_config(arch)
    channels, height, width = known["input_size"]
    if channels != 3 or height != width:
        raise ConfigError(f"--arch {arch} takes {channels} × {height} × {width}; here images are 3 × crop × crop")
    side, kind = crop or height, _kind(known["interpolation"])
    return ImageSpec(int(side / known["crop_pct"]), side, tuple(known["mean"]), tuple(known["std"]), kind)


def _kind(name: str) -> Literal["bilinear", "bicubic"]:
    return "bicubic" if name == "bicubic" else "bilinear"


def adopted(run: Run) -> str:
    """A line for the log: the network's own settings, and where this run's are others; empty where nobody says."""
    network, image = run.network, to_dict(run.images.image)
    spec = spec_of(network)
    if spec is None:
        return _unshifted(network)
    own = to_dict(spec)
    settings = ", ".join(f"{name} {value}" for name, value in own.items())
    differing = [f"{name} {image[name]}" for name in own if image[name] != own[name]]
    remarks = [f"here: {', '.join(differing)}"] if differing else []
    if is_timms(network.arch):
        whose = f"timm has them for {network.arch}"
        known = _data_config(network.arch)
        if known["interpolation"] not in KINDS:
            remarks.append(f"its own interpolation, {known['interpolation']}, cannot be had")
        if known["crop_mode"] != "center":
            remarks.append(f"it cuts by {known['crop_mode']!r}, here the centre is cut out")
    else:
        whose = f"torchvision has them for {network.weights} of {network.arch}"
        if "transform_input" in options_of(network.arch, network.weights):
            remarks.append("the network itself shifts them to the mean and deviation it was trained with")
    return "; ".join([f"images as {whose}: {settings}", *remarks])


def _unshifted(network: NetworkConfig) -> str:
    """What is not known of the weights of two networks, whose published ones were trained on images shifted."""
    if network.arch not in SHIFTING or network.weights == "none":
        return ""
    return (
        f"{network.arch} takes images as they come (transform_input off), as torchvision trains it; weights tuned "
        f"from torchvision's own want --arch FILE.py:FUNCTION with transform_input=True"
    )


def _data_config(arch: str) -> dict[str, Any]:
    import timm  # noqa: PLC0415  an optional extra
    from timm.data import resolve_data_config  # noqa: PLC0415

    cfg = timm.get_pretrained_cfg(arch)
    found: dict[str, Any] = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {})
    return found
