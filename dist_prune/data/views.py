"""What is made of an image to learn from: its mirror image and crops, so that few images say more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.run import Run
from dist_prune.data.loader import Batch
from dist_prune.utils import keyed_random

SMALLEST = 0.4  # share of the image's area that a crop has at least


@dataclass(frozen=True)
class Views:
    """The image itself, its mirror image if wanted, and so many random crops, drawn by the image, not by the rank.

    Of mirrored images, half of the crops are mirrored.
    """

    mirrored: bool = False
    crops: int = 0
    seed: int = 0

    @property
    def whole(self) -> bool:
        """Whether there is nothing but the images themselves."""
        return not self.mirrored and self.crops == 0

    @property
    def described(self) -> dict[str, Any] | None:
        """In plain types, to be compared; None if it is nothing but the images themselves."""
        return None if self.whole else {**asdict(self), "seed": self.seed if self.crops else None}

    def of(self, pixels: Tensor, indices: Tensor) -> Iterator[Tensor]:
        """Images (n, channels, height, width), as often as there are views, of the same shape and type.

        Without mirror images and crops, any (n, …).
        """
        yield pixels
        if self.mirrored:
            yield pixels.flip(3)
        for number in range(self.crops):
            draws = keyed_random.uniform(self.seed, f"crop {number}", indices, 4)
            yield cropped(pixels, draws, 0.5 if self.mirrored else 0.0)


WHOLE = Views()


def views_of(settings: CorrectionConfig, seed: int) -> Views:
    """As the settings want them."""
    return Views(settings.mirrored, settings.crops, seed)


def views_of_statistics(run: Run) -> Views:
    """Those of the correction, where the statistics are to see them."""
    return views_of(run.correction, run.seed) if run.compression.basis.statistics_views else WHOLE


def in_views(batches: Iterable[Batch], views: Views) -> Iterator[Batch]:
    """Each batch with all views of its images, one after the other; each has its image's label and number."""
    if views.whole:  # nothing is copied
        yield from batches
        return
    for batch in batches:
        found = list(views.of(batch.images, batch.indices))
        count = len(found)
        yield Batch(torch.cat(found), batch.labels.repeat(count), batch.indices.repeat(count))


def cropped(pixels: Tensor, draws: Tensor, flips: float = 0.0) -> Tensor:
    """A piece of each image, of its proportions, brought to its size by bilinear interpolation.

    Args:
        pixels: (n, channels, height, width), of any type.
        draws: (n, 4), uniform in (0, 1): the share of the area, between `SMALLEST` and 1; its place, across and
            down; whether it is mirrored.
        flips: share of the pieces that are.
    """
    side = (SMALLEST + (1 - SMALLEST) * draws[:, 0]).sqrt()
    across, down = ((2 * draws[:, k] - 1) * (1 - side) for k in (1, 2))
    zero, across_side = torch.zeros_like(side), torch.where(draws[:, 3] < flips, -side, side)
    affine = torch.stack([across_side, zero, across, zero, side, down], 1).reshape(-1, 2, 3)
    images = pixels if pixels.is_floating_point() else pixels.float()
    grid = F.affine_grid(affine.to(images.dtype), list(pixels.shape), align_corners=False)
    found = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found if pixels.is_floating_point() else found.round().to(pixels.dtype)
