"""Small pictures and data sets for tests, and a rank that is alone."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dist_prune.config.images import ImageSpec
from dist_prune.data.dataset import Split, list_images
from dist_prune.data.loader import Stream


@dataclass(frozen=True)
class One:
    """One rank seen alone: enough of a World for streams, which never communicate."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, value: object) -> list[object]:
        return [value]

    def report_trouble(self, text: str) -> None:
        pass


def take(stream: Stream, count: int) -> list[torch.Tensor]:
    """The pixels of its next batches, over as many epochs as that takes."""
    taken: list[torch.Tensor] = []
    while len(taken) < count:
        for batch in stream.raw():
            taken.append(batch.images)
            if len(taken) == count:
                break
    return taken


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse noise: edges everywhere, so that a shift by a pixel shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3))
    return Image.fromarray(np.kron(coarse, np.ones((6, 6, 1)))[:height, :width].astype(np.uint8))


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def flat(folder: Path, count: int, side: int = 16) -> Split:
    """`count` images, each of one grey level, 2·index+1: pixels tell which it is."""
    for i in range(count):
        save(folder / f"{i:03d}.png", Image.new("RGB", (side, side), (2 * i + 1,) * 3))
    return list_images(folder)


def dataset(folder: Path, classes: str = "ab") -> Path:
    for part in ("train", "val"):
        for label, name in enumerate(classes):
            save(folder / part / name / "x.jpg", picture(20, 20, label))
    return folder


SMALL = ImageSpec(resize=0, crop=16)


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
