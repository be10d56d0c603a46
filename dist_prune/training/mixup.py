"""Images mixed with others of their batch: two networks can be compared on more images than there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from dist_prune.data.loader import Batch
from dist_prune.utils import keyed_random


def mixed(batches: Iterable[Batch], share: float, seed: int, rank: int, first: int = 0) -> Iterator[Batch]:
    """The batches with this share of the images mixed (mixup, Zhang et al. 2018; labels stay those of the first).

    An image x becomes λx + (1 − λ)x′, λ uniform in (0, 1), x′ of the same batch.

    Args:
        batches: of this rank.
        share: from 0 to 1; at 0 the batches are what they were.
        seed: of the run.
        rank: each draws its own.
        first: number of the first batch: a resumed run draws what it would have drawn.
    """
    for step, batch in enumerate(batches, first):
        yield _mixed(batch, share, seed, f"mixup of step {step}, rank {rank}") if share else batch


def _mixed(batch: Batch, share: float, seed: int, purpose: str) -> Batch:
    images = batch.images
    places = torch.arange(len(images), device=images.device)
    which, weight, order = keyed_random.uniform(seed, purpose, places, 3).unbind(1)
    kept = torch.where(which < share, weight, 1.0).to(images.dtype).view(-1, *[1] * (images.dim() - 1))
    return replace(batch, images=torch.lerp(images[order.argsort()], images, kept))
