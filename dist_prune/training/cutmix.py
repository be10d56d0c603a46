"""Images with a piece of another one: two networks can be compared on more images than there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dist_prune.data.loader import Batch
from dist_prune.utils import keyed_random


def pasted(batches: Iterable[Batch], share: float, seed: int, rank: int, first: int = 0) -> Iterator[Batch]:
    """The batches, this share of the images with a piece of another one (CutMix, Yun et al. 2019); labels stay.

    A piece is a rectangle of the image's proportions around a point drawn from all of it, cut off at the edges;
    its area is uniform between nothing and all.

    Args:
        batches: of this rank, images (n, channels, height, width).
        share: from 0 to 1; at 0 the batches are what they were.
        seed: of the run.
        rank: each draws its own.
        first: number of the first batch: a resumed run draws what it would have drawn.
    """
    for step, batch in enumerate(batches, first):
        yield _pasted(batch, share, seed, f"cutmix of step {step}, rank {rank}") if share else batch


def _pasted(batch: Batch, share: float, seed: int, purpose: str) -> Batch:
    images = batch.images
    places = torch.arange(len(images), device=images.device)
    which, area, down, right, order = keyed_random.uniform(seed, purpose, places, 5).unbind(1)
    side = area.sqrt() * (which < share)
    inside = (
        _within(down, side, images.shape[2])[:, None, :, None]
        & _within(right, side, images.shape[3])[:, None, None]
    )
    return replace(batch, images=torch.where(inside, images[order.argsort()], images))


def _within(centre: Tensor, side: Tensor, pixels: int) -> Tensor:
    """(n, pixels): which rows or columns are of the piece; centre and side are shares of the image's."""
    middles = (torch.arange(pixels, device=centre.device) + 0.5) / pixels
    return (middles - centre[:, None]).abs() < side[:, None] / 2
