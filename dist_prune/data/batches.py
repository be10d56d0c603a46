"""Batches as a Python program has them at hand: gone through once, checked, kept, counted over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World


class BatchesError(ValueError):
    """Batches that nothing can be computed from."""


@dataclass(frozen=True)
class Kept:
    """This rank's batches where they were given, handed out on the network's device.

    Images are numbered over all ranks, as if those of each rank came after those of the ranks before; `total` are
    all of them.
    """

    batches: tuple[Batch, ...]
    device: torch.device
    total: int

    def open(self, images: int = 0) -> Iterator[Batch]:
        """This rank's part of the first so many images of all ranks; 0: of all."""
        for b in self.batches:
            own = b.indices < (images or self.total)
            some = slice(None) if own.all() else own
            if own.any():
                parts = (part[some].to(self.device) for part in (b.images, b.labels, b.indices))
                yield Batch(*parts)

    def evenly(self, count: int) -> tuple[Tensor, Tensor]:
        """Of `count` images spread evenly over all ranks', this rank's, and their places among the chosen."""
        count = min(count, self.total)
        images, indices = (torch.cat(p) for p in zip(*((b.images, b.indices) for b in self.batches), strict=True))
        chosen = torch.arange(count) * self.total // count
        own = (chosen >= indices[0]) & (chosen <= indices[-1])
        places = torch.nonzero(own)[:, 0]
        return images[chosen[own] - indices[0]].to(self.device), places.to(self.device)

    @property
    def size(self) -> int:
        """Images of the largest batch."""
        return max(len(b.images) for b in self.batches)


def keep(batches: Iterable[Any], device: torch.device, world: World, fewest: int) -> Kept:
    """Go through the batches of this rank; all ranks agree that theirs can be used together.

    Raises:
        BatchesError: none, fewer than `fewest` images of all ranks, not tensors, of several shapes, or some with
            labels and some without.
        RankError: another rank's batches cannot be used.
    """
    given = world.on_all(lambda: tuple(checked(batches)))
    first = given[0]
    kinds = world.gather((tuple(first.images.shape[1:]), bool((first.labels >= 0).all())))
    counts = world.gather(sum(len(batch.images) for batch in given))
    if len(set(kinds)) > 1:
        raise BatchesError(f"the ranks have batches of several kinds, shape and whether labelled: {kinds}")
    if sum(counts) < fewest:
        raise BatchesError(
            f"{sum(counts)} images: expected at least {fewest}, better hundreds, as statistics come from them"
        )
    before = sum(counts[: world.rank])
    return Kept(tuple(replace(b, indices=b.indices + before) for b in given), device, sum(counts))


def checked(batches: Iterable[Any]) -> Iterator[Batch]:
    """Batches as the statistics want them: labels −1 where there are none, images numbered."""
    _require_batches(batches)
    seen, shape, labelled = 0, None, None
    for item in batches:
        images, labels = _parts(item)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise BatchesError(f"images of {tuple(shape)} and {tuple(images.shape[1:])}; expected one size")
        if labelled not in (None, labels is not None):
            raise BatchesError("some batches have labels and some have none; expected all alike")
        labelled = labels is not None
        if labels is None:
            labels = torch.full((len(images),), -1)
        images, labels = (_ordinary(tensor.detach()) for tensor in (images, labels))
        if len(images):
            yield Batch(images, labels.long().cpu(), torch.arange(seen, seen + len(images)))
        seen += len(images)
    if not seen:
        raise BatchesError(
            "there are no batches: an iterator that was gone through before gives none; make a new one"
        )


def _require_batches(batches: Any) -> None:  # noqa: ANN401  whatever was given
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise BatchesError(
            f"batches is a data set, {type(batches).__name__}, of single images; "
            f"give torch.utils.data.DataLoader(…, batch_size=64) of it"
        )
    if isinstance(batches, Tensor):
        raise BatchesError(
            f"batches is one tensor {tuple(batches.shape)}; expected several: a list with it in it will do"
        )
    if not isinstance(batches, Iterable):
        raise BatchesError(f"batches is {type(batches).__name__}; expected a list, a DataLoader or the like")


def _parts(item: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401  whatever was given
    """The images of a batch and their labels, if there are any."""
    parts = item if isinstance(item, tuple | list) and len(item) in (1, 2) else (item,)
    images, labels = (*parts, None)[:2]
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise BatchesError(f"a batch is {found}; expected a floating-point tensor (n, …), or it and labels (n,)")
    if labels is None:
        return images, None
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise BatchesError(f"labels of {len(images)} images are {labels!r:.80}; expected whole numbers (n,)")
    return images, labels


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that gradients may be taken through: one made in inference mode is copied."""
    return tensor.clone() if tensor.is_inference() else tensor
