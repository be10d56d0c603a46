"""Images to compare an exported network on: of the run's data, of a folder, or noise where there are none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_prune.artifacts.run_directory import CONFIG
from dist_prune.config.images import ImageSpec
from dist_prune.data.dataset import Split, list_unlabelled, write_digits
from dist_prune.data.listing import DataError
from dist_prune.data.loader import evaluation_stream
from dist_prune.data.mnist import has_idx, unpack
from dist_prune.data.share import Unsharded
from dist_prune.network.inputs import InputPacking
from dist_prune.utils.files import CheckpointError, caching
from dist_prune.utils.text import read_text

BATCH, THREADS = 64, 2


@dataclass(frozen=True)
class Samples:
    """Images (N, 3, H, W) as the network wants them, or packed, on the CPU, and in words where they are from."""

    images: Tensor
    origin: str
    packing: InputPacking | None = None

    @property
    def text(self) -> str:
        """For people."""
        return f"{len(self.images)} {self.origin}"


def samples(run: Path, spec: ImageSpec, folder: Path | None, count: int) -> Samples:
    """A seeded choice of at most `count` images.

    Args:
        run: the directory of the run, whose validation images are taken where they are still there.
        spec: how a picture becomes a tensor.
        folder: images to take instead, at any depth.
        count: how many.

    Raises:
        DataError: `folder` has no images, or an image is damaged.
    """
    if folder is not None:
        return _read(list_unlabelled(folder), spec, count, f"images of {folder}")
    source = data_of(run)
    try:
        split = list_unlabelled(_validation(source))
    except DataError as error:
        return noise(spec, count, str(error))
    return _read(split, spec, count, f"validation images of {source}")


def noise(spec: ImageSpec, count: int, reason: str) -> Samples:
    """Seeded normal noise in the shape of images, and why."""
    shape = (count, 3, spec.crop, spec.crop)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Samples(images, f"images of noise ({reason}; give images with --images DIR)")


def data_of(run: Path) -> str:
    """What `--data` was in the run; empty where that is not known.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        return ""
    try:
        return str(json.loads(read_text(path))["run"]["images"]["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the settings of a run ({error!r})") from error


def _validation(source: str) -> Path:
    if not source:
        raise DataError("the run's data is not known")
    if source == "digits":
        with caching() as cache:
            return write_digits(cache / "digits") / "val"
    folder = Path(source)
    if has_idx(folder):
        with caching() as cache:
            folder = unpack(folder, cache)
    return folder / "val"


def _read(split: Split, spec: ImageSpec, count: int, origin: str) -> Samples:
    chosen = split.subset(min(count, len(split)), 0)
    stream = evaluation_stream(chosen, spec, Unsharded(torch.device("cpu"), 0), BATCH, THREADS)
    return Samples(torch.cat([batch.images for batch in stream]), origin)
