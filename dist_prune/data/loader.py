"""DALI streams of batches: for training, for evaluation and for statistics, sharded by rank."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from dist_prune.config.images import Augment, ImageSpec
from dist_prune.data.dali_errors import cause_of, explain
from dist_prune.data.dataset import Split
from dist_prune.data.decoder import Decoder
from dist_prune.data.in_flight import InFlight, aboard
from dist_prune.data.listing import DataError
from dist_prune.data.reading import ReadAhead
from dist_prune.data.shards import COMPONENT, DIGITS, positions_of, write_reader_index
from dist_prune.data.share import Share

FILES = "files"  # how images are stored that are not packed
BUFFER = 1024  # packed training images that the next one is drawn from

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline


@dataclass(frozen=True)
class Batch:
    """N images: (N, 3, H, W), their labels (N,) and their positions in the split's files (N,), both int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def normalise(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """(N, 3, H, W) uint8 → (N, 3, H, W) float32, (pixels/255 − mean)/std; where and laid out as `pixels` are."""
    last = pixels.is_contiguous(memory_format=torch.channels_last) and not pixels.is_contiguous()
    rows = pixels.permute(0, 2, 3, 1).flatten(2) if last else pixels  # three alone would not fill vector registers
    mean, std = _constants(spec, pixels.device, pixels.shape[3] if last else 0)
    rows = rows.div(255).sub_(mean).div_(std)  # in place: new pages cost more than the arithmetic
    return rows.view(len(rows), rows.shape[1], -1, 3).permute(0, 3, 1, 2) if last else rows


@functools.cache  # a copy to a GPU waits for it
def _constants(spec: ImageSpec, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (3, 1, 1), or for rows of so many pixels, (width·3,)."""
    mean, std = (torch.tensor(values, device=device) for values in (spec.mean, spec.std))
    return (mean.repeat(width), std.repeat(width)) if width else (mean.view(3, 1, 1), std.view(3, 1, 1))


@dataclass(eq=False)
class Stream:
    """One rank's share of a split; iterating gives one epoch of normalised batches, `raw` the same as uint8.

    Images lie as `layout` says, as the network wants them: DALI decodes to NHWC, of which channels_last is a view.
    An evaluation epoch (`augment` is None) starts from the beginning, unless it was restored. A training epoch
    that was left early resumes where it was left. A damaged file raises a DataError that names it.
    """

    split: Split
    spec: ImageSpec
    world: Share
    batch_size: int
    threads: int
    seed: int = 0
    augment: Augment | None = None
    layout: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        if min(self.batch_size, self.threads) < 1:
            raise DataError(f"batch size {self.batch_size}, {self.threads} threads: expected 1 or more")
        count, ranks = len(self.split), self.world.size
        if count < ranks:
            raise DataError(f"{count} images in {self.split.root} for {ranks} ranks: use at most {count} ranks")
        _dali()  # found missing now, not when the first batch is wanted
        self._labels = torch.tensor(self.split.labels)
        archive = self.split.archive
        self._order = range(len(self.split)) if archive is None else archive.stored_order().tolist()
        self._in_flight = InFlight()
        self._position = 0  # batches of this epoch already delivered
        self._checkpoint: str | None = None
        self._iterator: Any = None

    def __len__(self) -> int:
        """Count the batches of an epoch: the same on every rank."""
        return math.ceil(math.ceil(len(self.split) / self.world.size) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.raw():
            yield replace(batch, images=normalise(batch.images, self.spec))

    def raw(self) -> Iterator[Batch]:
        """Iterate over an epoch of batches whose images are uint8."""
        self._begin()
        while self._position < len(self):
            batch = self._next()
            self._position += 1  # before the yield, so that a state taken inside the loop counts this batch
            yield batch

    @property
    def position(self) -> int:
        """How many batches of the epoch were delivered."""
        return self._position

    @property
    def at_end(self) -> bool:
        """Whether the epoch's last batch was delivered."""
        return self._position == len(self)

    def state_dict(self) -> dict[str, Any]:
        """Describe where this rank of the stream stands, after the last batch, in plain types."""
        if self._iterator is None:
            self._open()
        dali = "" if self._reads_ahead else self._iterator.checkpoints()[0]
        return self._identity | {"position": self._position, "dali": dali}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from this rank's `state`; DataError if it is of other images, ranks, seed or batch size."""
        state = {"storage": FILES} | state
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(f"cannot resume: {name} was {state.get(name)} and is {value}; keep it")
        self._position, self._checkpoint, self._iterator = state["position"], state["dali"], None

    @cached_property
    def _identity(self) -> dict[str, Any]:  # from another one DALI would read wrong images, without a word
        shard = {"ranks": self.world.size, "rank": self.world.rank, "batch_size": self.batch_size}
        storage = FILES if self.split.archive is None else self.split.archive.digest()
        return shard | {"images": self.split.digest(), "seed": self.seed, "storage": storage}

    @property
    def _reads_ahead(self) -> bool:
        """Files in their own order; DALI's reader, which opens one after the other, shuffles those of training."""
        return self.augment is None and self.split.archive is None

    @property
    def _own(self) -> range:
        """What this rank reads in an evaluation, in the order that images are stored in."""
        count, size, rank = len(self.split), self.world.size, self.world.rank
        return range(count * rank // size, count * (rank + 1) // size)

    def _begin(self) -> None:
        if self.augment is None and (self._reads_ahead if self.at_end else self._checkpoint is None):
            self._iterator, self._position = None, 0  # DALI cannot rewind within an epoch
        if self._iterator is None:
            self._open()
        if self._position == len(self):
            self._iterator.reset()
            self._position = 0

    def _open(self) -> None:
        dali, plugin = _dali()
        policy = plugin.LastBatchPolicy.FILL if self.augment else plugin.LastBatchPolicy.PARTIAL
        ends = {} if self._reads_ahead else {"reader_name": "reader", "last_batch_policy": policy}
        with TemporaryDirectory() as scratch:
            self._iterator = plugin.DALIGenericIterator(
                self._pipeline(dali, Path(scratch)),
                ["pixels", "indices"],
                prepare_first_batch=False,  # or a damaged file would raise here
                **ends,
            )
        self._checkpoint = None

    def _pipeline(self, dali: ModuleType, scratch: Path) -> Pipeline:
        device, on_cpu = self.world.device, self.world.device.type == "cpu"
        own = np.random.SeedSequence([self.seed, self.world.rank]).generate_state(1)
        pipeline = dali.Pipeline(
            self.batch_size,
            self.threads,
            None if on_cpu else self.world.local_rank if device.index is None else device.index,
            seed=int(own[0]),
            enable_checkpointing=not self._reads_ahead,
            checkpoint=None if self._reads_ahead else self._checkpoint,
        )
        with pipeline:
            if self._reads_ahead:
                encoded, indices = self._read_ahead(dali)
            else:
                encoded, indices = self._read_shards(dali, scratch) if self.split.archive else self._read(dali)
            decoder = Decoder(dali, self.spec, "cpu" if on_cpu else "mixed", self.layout)
            pixels = decoder.augmented(encoded, self.augment) if self.augment else decoder.centred(encoded)
            pipeline.set_outputs(pixels, indices)
        return cast("Pipeline", pipeline)

    def _read_ahead(self, dali: ModuleType) -> tuple[DataNode, DataNode]:
        """Encoded files of an evaluation and their positions, from where it stands; DALI takes no empty batch."""
        own, size = self._own, self.batch_size
        batches = (own[at * size : (at + 1) * size] or own[-1:] for at in range(self._position, len(self)))
        encoded, indices = dali.fn.external_source(ReadAhead(self.split, batches), num_outputs=2, batch=True)
        return encoded, indices

    def _read(self, dali: ModuleType) -> tuple[DataNode, DataNode]:
        """Encoded files for training and their positions; these options bring each image exactly once."""
        places = self._places()
        encoded, indices = dali.fn.readers.file(
            name="reader",
            file_root=str(self.split.root),
            files=[self.split.files[place] for place in places],
            labels=list(places),
            shard_id=self.world.rank,
            num_shards=self.world.size,
            pad_last_batch=True,
            dont_use_mmap=True,  # a mapped file kills the process when a network file system hiccups
            shuffle_after_epoch=True,  # and before the first; ranks agree on the order by its seed
            shuffle_after_epoch_seed=self.seed,
        )
        return encoded, indices

    def _read_shards(self, dali: ModuleType, scratch: Path) -> tuple[DataNode, DataNode]:
        """As `_read`, of packed images, whose positions travel as names.

        The order of the shards changes with the epoch; images come out of a buffer that takes them as they lie.
        """
        training, archive = self.augment is not None, self.split.archive
        assert archive is not None
        groups, shuffle = [np.array(self._order, np.int64)], {}
        if training:
            again = np.array(self._places()[len(self.split) :], np.int64)
            groups.append(again[archive.take(again.tolist()).stored_order()])
            share = len(self) * self.batch_size
            shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": self.seed}
            shuffle |= {"random_shuffle": True, "initial_fill": max(1, min(BUFFER, share // 2))}
        paths, indexes = write_reader_index(self.split.root, archive, groups, scratch)
        encoded = dali.fn.readers.webdataset(
            name="reader",
            paths=paths,
            index_paths=indexes,
            ext=[COMPONENT],
            shard_id=self.world.rank,
            num_shards=self.world.size,
            stick_to_shard=not training,
            pad_last_batch=True,
            dont_use_mmap=True,
            tensor_init_bytes=int(archive.size.mean()),
            **shuffle,
        )
        return encoded, dali.fn.get_property(encoded, key="source_info")[-DIGITS:]

    def _places(self) -> list[int]:
        """All images, and a seeded choice of them a second time: as many as fill every batch of every rank.

        Left to itself DALI fills the last batch with copies of one image, which batch norm and the step would see.
        """
        count, wanted = len(self.split), len(self) * self.batch_size * self.world.size
        order = np.random.default_rng(self.seed).permutation(count).tolist()
        return [*range(count), *islice(cycle(order), wanted - count)]

    def _next(self) -> Batch:
        try:
            parts = next(self._iterator)[0]
        except OSError as error:
            self.world.report_trouble(str(error))
            raise
        except RuntimeError as error:
            self.world.report_trouble(
                f"DALI failed: {cause_of(error).text}"
            )  # looking for the image takes a while
            raise explain(error, self.split, self.spec, self._remaining()) from error
        own = self._own[self._position * self.batch_size :]
        given = {name: part[: len(own)] if self._reads_ahead else part for name, part in parts.items()}
        found, device = given["indices"], self.world.device
        indices = found.flatten().long() if self.split.archive is None else positions_of(found)
        self._in_flight.keep(list(parts.values()))
        pixels = given["pixels"].permute(0, 3, 1, 2) if self.layout is torch.channels_last else given["pixels"]
        return Batch(pixels, aboard(self._labels[indices], device), aboard(indices, device))

    def _remaining(self) -> list[int]:
        """Positions that this rank may read, those that it is about to read first; training shards move about."""
        own = range(len(self.split)) if self.augment else self._own
        ahead = own if self.augment else own[self._position * self.batch_size :]
        return [self._order[place] for place in (*ahead, *own[: len(own) - len(ahead)])]


def training_stream(
    split: Split,
    spec: ImageSpec,
    world: Share,
    batch_size: int,
    threads: int,
    seed: int,
    augment: Augment,
    layout: torch.memory_format = torch.contiguous_format,
) -> Stream:
    """Stream shuffled, augmented batches, all of `batch_size`.

    An epoch has every image once, and a seeded choice of them twice, as many as fill the batches. Equal seeds
    give equal batches; the order is new in every epoch, the random crops differ between ranks.
    """
    return Stream(split, spec, world, batch_size, threads, seed, augment, layout)


def evaluation_stream(
    split: Split,
    spec: ImageSpec,
    world: Share,
    batch_size: int,
    threads: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> Stream:
    """Stream every image exactly once over all ranks, the same ones to a rank in each epoch.

    Every rank gets equally many batches, so that collectives match; the last ones may be short, or of size 0.
    """
    return Stream(split, spec, world, batch_size, threads, layout=layout)


def _dali() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.plugin.pytorch")
    except ImportError as error:
        raise DataError(
            f"reading images needs NVIDIA DALI, which cannot be imported ({error}): install nvidia-dali-cuda120, "
            f"or nvidia-dali-cuda130 beside a torch built for CUDA 13; "
            f"dist_prune.compress does without"
        ) from error
