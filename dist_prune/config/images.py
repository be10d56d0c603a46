"""Which images, how they are cut, and how many at a time. The fields are the flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dist_prune.config.flags import require as _require


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes a tensor; resizing is with antialiasing, as torchvision does it."""

    resize: int = 256
    """Shorter side before the centre crop, pixels; 0: keep the size."""
    crop: int = 224
    """Input height and width, pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means to subtract, of RGB/255."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel deviations to divide by, of RGB/255."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How --resize finds pixels between pixels."""

    def __post_init__(self) -> None:
        _require(self.crop > 0, f"--crop {self.crop}: expected pixels, at least 1")
        smaller = self.resize and self.resize < self.crop
        _require(not smaller, f"--resize {self.resize} is smaller than --crop {self.crop}; 0 keeps the size")


@dataclass(frozen=True)
class Augment:
    """What random training crops look like."""

    flip: bool = True
    """Mirror training images at random."""
    pad: int = 4
    """With --resize 0: zeros around the image before a random crop, pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """With --resize above 0: share of the image that a random-resized crop covers."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """With --resize above 0: width over height of that crop."""

    def __post_init__(self) -> None:
        _require(self.pad >= 0, f"--pad {self.pad}: expected pixels, 0 or more")
        low, high = self.area
        _require(0 < low <= high <= 1, f"--area {low} {high}: expected two shares with 0 < low ≤ high ≤ 1")
        low, high = self.ratio
        _require(0 < low <= high, f"--ratio {low} {high}: expected two numbers with 0 < low ≤ high")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read."""

    data: str = ""
    """Folder with train/ and val/, one folder per class in each; or with MNIST's idx files; or `digits`, which
    ship with scikit-learn."""
    class_list: Path | None = None
    """Text file, one class folder per line in label order; without it, train/'s folders in alphabetical order."""
    image: Annotated[ImageSpec, tyro.conf.arg(name="")] = field(default_factory=ImageSpec)
    augment: Annotated[Augment, tyro.conf.arg(name="")] = field(default_factory=Augment)
    threads: int = 4
    """Decoding threads per rank."""
    eval_batch_size: int = 64
    """Images per rank and step, validation and statistics."""

    def __post_init__(self) -> None:
        _require(self.threads > 0, f"--threads {self.threads}: expected at least 1")
        _require(self.eval_batch_size > 0, f"--eval-batch-size {self.eval_batch_size}: expected at least 1")
