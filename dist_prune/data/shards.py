"""Packed images: tar files (WebDataset) with an index, read from front to back instead of file by file.

`DIR/index.json` names the shards, and the images in the order in which they lie there: their names in the folder
that was packed, offsets and sizes in bytes. It is written last: without it a folder is not packed, or not yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.data.extents import Archive, Integers
from dist_prune.data.listing import DataError, FolderListing, by_folder, list_folder
from dist_prune.utils.text import read_text, write_text

INDEX, SCHEMA = "index.json", 1
COMPONENT = "image"  # what an image is called in the indexes that DALI's reader is given
DIGITS = 12


@dataclass(frozen=True)
class Index:
    """What lies in the shards of one folder.

    Attributes:
        shards: names, and the bytes of each.
        files: names of images, shard by shard, as they lie there.
        places: where they lie, in the same order.
        folders: all folders that there were, with a slash behind, empty ones too.
        left_out: other files, by ending.
    """

    shards: Mapping[str, int]
    files: tuple[str, ...]
    places: Archive
    folders: tuple[str, ...]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        places = self.places
        return {
            "schema": SCHEMA,
            "shards": dict(self.shards),
            "folders": self.folders,
            "left_out": dict(self.left_out),
            "files": self.files,
            "shard": places.shard.tolist(),
            "offset": places.offset.tolist(),
            "size": places.size.tolist(),
        }


@dataclass(frozen=True)
class PackedListing(FolderListing):
    """What the folder held that was packed."""

    index: Index

    def archive_of(self, files: Sequence[str]) -> Archive:
        """Where these images lie in the shards."""
        place = {name: number for number, name in enumerate(self.index.files)}
        return self.index.places.take([place[name] for name in files])


def is_packed(root: Path) -> bool:
    """Whether a folder holds shards with their index."""
    return (root / INDEX).is_file()


def list_images_of(root: Path) -> FolderListing:
    """The images of a folder, packed or not.

    Raises:
        DataError: see `list_folder` and `read_index`.
    """
    if not is_packed(root):
        return list_folder(root)
    index = read_index(root)
    loose, folders = by_folder([*index.folders, *index.files])
    return PackedListing(root, loose, folders, index.left_out, index)


def read_index(root: Path) -> Index:
    """What was packed, once its shards are seen to be whole.

    Raises:
        DataError: the index is damaged or of another version, or a shard is absent or has another size.
    """
    path = root / INDEX
    try:
        found = json.loads(read_text(path))
        if found["schema"] != SCHEMA:
            raise DataError(
                f"{path} has schema {found['schema']}, this version reads {SCHEMA}: pack the images again"
            )
        shards = {str(name): int(size) for name, size in found["shards"].items()}
        arrays = (np.array(found[name], np.int64) for name in ("shard", "offset", "size"))
        index = Index(
            shards,
            tuple(found["files"]),
            Archive(tuple(shards), *arrays),
            tuple(found["folders"]),
            found["left_out"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error!r}): pack the images again") from error
    for name, size in shards.items():
        try:
            there = os.stat(root / name).st_size  # noqa: PTH116  thousands of them
        except OSError as error:
            raise DataError(f"{root / name}: {error.strerror}; {path} names it: pack the images again") from error
        if there != size:
            raise DataError(f"{root / name} has {there:,} bytes, expected {size:,}: copy or pack it again")
    return index


def write_reader_index(
    root: Path, archive: Archive, groups: Sequence[Integers], folder: Path
) -> tuple[list[str], list[str]]:
    """Indexes for DALI's reader of these images alone, named by their positions in the split, in DIGITS digits.

    Args:
        root: the folder of the shards.
        archive: where the images lie in them.
        groups: positions, each group in the order of its shards.
        folder: to write to.

    Returns:
        the shards to read, one after the other, and the index of each.
    """
    paths, indexes = list[str](), list[str]()
    for group in groups:
        for some in np.split(group, np.flatnonzero(np.diff(archive.shard[group])) + 1):
            if not len(some):
                continue
            rows = zip(archive.offset[some].tolist(), archive.size[some].tolist(), some.tolist(), strict=True)
            lines = "".join(f"{COMPONENT} {offset} {size} {place:0{DIGITS}d}\n" for offset, size, place in rows)
            index = folder / f"{len(paths)}.idx"
            write_text(index, f"v1.2 {len(some)}\n{lines}")
            paths.append(str(root / archive.shards[int(archive.shard[some[0]])]))
            indexes.append(str(index))
    return paths, indexes


def positions_of(digits: Tensor) -> Tensor:
    """(N, DIGITS) ASCII digits → (N,) int64."""
    powers = 10 ** torch.arange(DIGITS - 1, -1, -1)
    return ((digits.long() - ord("0")) * powers).sum(1)
