"""Images as a network of timm was trained on them: what no flag says, its own data configuration does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from dist_prune.config.flags import ConfigError
from dist_prune.config.run import ImageSpec, Run, to_dict
from dist_prune.config.settings import changed
from dist_prune.network.models import is_timms

KINDS = ("bilinear", "bicubic")  # of interpolation that can be had here


def adapted(run: Run, given: Collection[str]) -> Run:
    """The run with crop, resize, mean, std and interpolation of its network, but for flags that were given.

    Networks that are not timm's leave it as it is. A --crop that is given without --resize keeps timm's share.

    Raises:
        ConfigError: the network wants images that cannot be had here.
    """
    if not is_timms(run.network.arch):
        return run
    crop = run.images.image.crop if "crop" in given else 0
    wanted = to_dict(spec_of(run.network.arch, crop))
    values = {("images", "image", name): value for name, value in wanted.items() if name not in given}
    return changed(run, {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()})


def spec_of(arch: str, crop: int = 0) -> ImageSpec:
    """How timm's network wants images; `crop` instead of its own size if above 0.

    Raises:
        ConfigError: not square, or not of three channels.
    """
    known = _data_config(arch)
    channels, height, width = known["input_size"]
    if channels != 3 or height != width:
        raise ConfigError(f"--arch {arch} takes {channels} × {height} × {width}; here images are 3 × crop × crop")
    side = crop or height
    kind: Literal["bilinear", "bicubic"] = "bicubic" if known["interpolation"] == "bicubic" else "bilinear"
    return ImageSpec(int(side / known["crop_pct"]), side, tuple(known["mean"]), tuple(known["std"]), kind)


def adopted(run: Run) -> str:
    """A line for the log: timm's configuration, and where this run's is another; empty for other networks."""
    arch, image = run.network.arch, to_dict(run.images.image)
    if not is_timms(arch):
        return ""
    known, own = _data_config(arch), to_dict(spec_of(arch))
    settings = ", ".join(f"{name} {value}" for name, value in own.items())
    differing = [f"{name} {image[name]}" for name in own if image[name] != own[name]]
    remarks = [f"here: {', '.join(differing)}"] if differing else []
    if known["interpolation"] not in KINDS:
        remarks.append(f"its own interpolation, {known['interpolation']}, cannot be had")
    if known["crop_mode"] != "center":
        remarks.append(f"it cuts by {known['crop_mode']!r}, here the centre is cut out")
    return "; ".join([f"images as timm has them for {arch}: {settings}", *remarks])


def _data_config(arch: str) -> dict[str, Any]:
    import timm  # noqa: PLC0415  an optional extra
    from timm.data import resolve_data_config  # noqa: PLC0415

    cfg = timm.get_pretrained_cfg(arch)
    found: dict[str, Any] = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {})
    return found
