"""Batches as a Python program has them at hand: gone through once, checked, kept, counted over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.inputs import PLAIN, Call, InputPacking, Inputs
from dist_prune.network.outputs import described


class BatchesError(ValueError):
    """Batches that nothing can be computed from."""


@dataclass(frozen=True)
class Kept:
    """This rank's batches where they were given, handed out on the network's device.

    Images are numbered over all ranks, as if those of each rank came after those of the ranks before; `total` are
    all of them. Where the network takes several inputs, the images are `packing`'s rows.
    """

    batches: tuple[Batch, ...]
    device: torch.device
    total: int
    packing: InputPacking | None = None

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


@dataclass(frozen=True)
class Reading:
    """How a batch is read.

    `inputs` says what the network is called with for a batch; `first` is the name of the network's first argument.
    """

    inputs: Inputs | None = None
    first: str = ""


@dataclass(frozen=True)
class _Item:
    """A batch: images as they are, or as rows of `packing`."""

    images: Tensor
    labels: Tensor | None
    packing: InputPacking | None = None

    @property
    def kind(self) -> str:
        """What all batches have in common."""
        return str(self.packing) if self.packing else f"{tuple(self.images.shape[1:])}"


def keep(
    batches: Iterable[Any], device: torch.device, world: World, fewest: int, reading: Reading | None = None
) -> Kept:
    """Go through the batches of this rank; all ranks agree that theirs can be used together.

    Raises:
        BatchesError: none, fewer than `fewest` images of all ranks, not tensors, of several shapes, or some with
            labels and some without.
        RankError: another rank's batches cannot be used.
    """
    given, packing = world.on_all(lambda: checked(batches, reading or Reading()))
    first = given[0]
    kinds = world.gather((tuple(first.images.shape[1:]), packing, bool((first.labels >= 0).all())))
    counts = world.gather(sum(len(batch.images) for batch in given))
    if len(set(kinds)) > 1:
        shown = [(str(packing) if packing else shape, labelled) for shape, packing, labelled in kinds]
        raise BatchesError(f"the ranks have batches of several kinds, shape and whether labelled: {shown}")
    if sum(counts) < fewest:
        raise BatchesError(
            f"{sum(counts)} images: expected at least {fewest}, better hundreds, as statistics come from them"
        )
    before = sum(counts[: world.rank])
    own = tuple(replace(b, indices=b.indices + before) for b in given)
    return Kept(own, device, sum(counts), packing)


def checked(batches: Iterable[Any], reading: Reading) -> tuple[list[Batch], InputPacking | None]:
    """Batches as the statistics want them: labels −1 where there are none, images numbered."""
    _require_batches(batches)
    seen, first, found = 0, None, list[Batch]()
    for given in batches:
        item = _read(given, reading)
        first = first or item
        if item.kind != first.kind:
            raise BatchesError(f"images of {first.kind} and {item.kind}; expected one size")
        if (item.labels is None) != (first.labels is None):
            raise BatchesError("some batches have labels and some have none; expected all alike")
        labels = torch.full((len(item.images),), -1) if item.labels is None else item.labels
        images, labels = (_ordinary(tensor.detach()) for tensor in (item.images, labels))
        if len(images):
            found.append(Batch(images, labels.long().cpu(), torch.arange(seen, seen + len(images))))
        seen += len(images)
    if not seen or first is None:
        raise BatchesError(
            "there are no batches: an iterator that was gone through before gives none; make a new one"
        )
    return found, first.packing


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


_EXPECTED = (
    "expected a floating-point tensor (n, …), or it and labels (n,), or a mapping of keyword arguments, with "
    "`labels` (n,); for a network of several inputs, `inputs` may say what it is called with: (args, kwargs) of a "
    "batch"
)


def _read(item: Any, reading: Reading) -> _Item:  # noqa: ANN401  whatever was given
    """The images of a batch and their labels, if there are any."""
    if reading.inputs is not None:
        return _of_call(_require_call(reading.inputs(item)), reading.first)
    if isinstance(item, Mapping):
        return _of_call(((), item), reading.first)
    parts = item if isinstance(item, tuple | list) and len(item) in (1, 2) else (item,)
    images, labels = (*parts, None)[:2]
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        raise BatchesError(f"a batch is {described(images if len(parts) == 1 else item)}; {_EXPECTED}")
    if labels is not None:
        _require_label_numbers(labels, len(images))
    return _Item(images, labels)


def _require_call(call: Any) -> Call:  # noqa: ANN401  whatever `inputs` returned
    good = isinstance(call, tuple) and len(call) == 2 and isinstance(call[1], Mapping)
    if not good or not isinstance(call[0], tuple | list):
        raise BatchesError(
            f"inputs returned {described(call)} for a batch; expected what the network is called with: (args, "
            f"kwargs), a tuple and a dict"
        )
    return tuple(call[0]), call[1]


def _of_call(call: Call, first: str) -> _Item:
    """What the network is called with; a single image tensor that it takes first stays as it is."""
    args, kwargs = call[0], {name: value for name, value in call[1].items() if name != "labels"}
    labels, values = call[1].get("labels"), [*args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or not all(isinstance(value, (Tensor, *PLAIN)) for value in values):
        raise BatchesError(f"a batch is {described(call[1] if not args else call)}; expected tensors (n, …) in it")
    if any(t.dim() == 0 or len(t) != len(tensors[0]) for t in tensors):
        text = f"a batch is {described(call[1] if not args else call)}"
        raise BatchesError(f"{text}; expected as many images along the first dimension of each tensor")
    if labels is not None:
        _require_label_numbers(labels, len(tensors[0]))
    alone = len(values) == 1 and tensors[0].is_floating_point() and tensors[0].dim() > 1
    if alone and (args or first in kwargs):
        return _Item(tensors[0], labels)
    packing = InputPacking.of((args, kwargs))
    return _Item(packing.packed((args, kwargs)), labels, packing)


def _require_label_numbers(labels: Any, images: int) -> None:  # noqa: ANN401  whatever was given
    if not isinstance(labels, Tensor) or labels.shape != (images,) or labels.is_floating_point():
        raise BatchesError(
            f"labels of {images} images are {described(labels)}; expected whole numbers (n,); of another input of "
            f"the network, say so by `inputs`, which gives its (args, kwargs) of a batch"
        )


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that gradients may be taken through: one made in inference mode is copied."""
    return tensor.clone() if tensor.is_inference() else tensor
