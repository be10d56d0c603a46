"""Images of a folder written into shards: tar files in the WebDataset layout, in a seeded random order."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_prune.data.damage import damaged, file_fault, find_faults
from dist_prune.data.dataset import Split
from dist_prune.data.extents import Archive, Extent
from dist_prune.data.listing import DataError, list_folder
from dist_prune.data.shards import INDEX, Index, is_packed
from dist_prune.utils import files
from dist_prune.utils.text import read_text

BLOCK = tarfile.BLOCKSIZE  # what everything in a tar file is a multiple of
FEWEST = 64  # shards, where there are images enough: their order is shuffled in every epoch
PARTS = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """A tar file to be written: its name, and its images with headers and the offsets of their bytes."""

    name: str
    images: tuple[str, ...]
    sizes: tuple[int, ...]
    headers: tuple[bytes, ...]
    offsets: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, with the two empty blocks that end a tar file."""
        return self.offsets[-1] + _padded(self.sizes[-1]) + 2 * BLOCK

    @property
    def index(self) -> str:
        """DALI's index of it, for who reads it by other programs: extension, offset, size and name."""
        lines = [
            f"{Path(name).suffix[1:] or 'bin'} {offset} {size} {'_'.join(name.split())}"
            for name, offset, size in zip(self.images, self.offsets, self.sizes, strict=True)
        ]
        return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def folders_to_pack(source: Path) -> tuple[str, ...]:
    """`train` and `val`, as far as they are there; without both, the folder itself ("").

    Raises:
        DataError: not a folder.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: expected one with train/ and val/, or with images")
    return tuple(part for part in PARTS if (source / part).is_dir()) or ("",)


def pack(
    source: Path, target: Path, shard_bytes: int, seed: int, threads: int, say: Callable[[str], None]
) -> Index:
    """Write the images of one folder into shards; those that are written already are kept. The index comes last.

    Raises:
        DataError: `source` is packed or has no images, some are damaged, or `target` holds something else.
    """
    if is_packed(source):
        raise DataError(f"{source} is packed already")
    found = list_folder(source)
    if not found.images:
        raise DataError(f"no images in {source}")
    shards = _laid_out(source, found.images, shard_bytes, seed)
    _require_ours(target, shards)
    with ThreadPoolExecutor(threads) as pool:
        for number, shard in enumerate(shards, start=1):
            if not _is_written(target, shard):
                _write(source, target, shard, pool)
            say(f"{target / shard.name}: {len(shard.images):,} images, {number} of {len(shards)}")
    folders = tuple(f"{name}/" for name in found.folders)
    index = _index_of(shards, folders, dict(found.left_out))
    _require_sound(target, index, threads)
    files.write_text(target / INDEX, files.to_json(index.to_json(), None))
    return index


def _laid_out(source: Path, names: Sequence[str], shard_bytes: int, seed: int) -> list[Shard]:
    """All images in a random order, cut into shards of about as many bytes."""
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    sizes = [(source / name).stat().st_size for name in names]
    wanted = min(shard_bytes, max(1, sum(map(_padded, sizes)) // FEWEST))
    groups: list[list[int]] = [[]]
    room = wanted
    for place in order:
        if groups[-1] and room <= 0:
            groups.append([])
            room = wanted
        groups[-1].append(place)
        room -= _padded(sizes[place])
    return [
        _shard(f"{number:06d}.tar", [names[i] for i in group], [sizes[i] for i in group])
        for number, group in enumerate(groups)
    ]


def _shard(name: str, images: Sequence[str], sizes: Sequence[int]) -> Shard:
    headers, offsets, end = [], [], 0
    for image, size in zip(images, sizes, strict=True):
        entry = tarfile.TarInfo(image)
        entry.size = size
        headers.append(entry.tobuf(tarfile.PAX_FORMAT))
        offsets.append(end + len(headers[-1]))
        end = offsets[-1] + _padded(size)
    return Shard(name, tuple(images), tuple(sizes), tuple(headers), tuple(offsets))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _require_ours(target: Path, shards: Sequence[Shard]) -> None:
    ours = {name for shard in shards for name in (shard.name, _index_name(shard))}
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    others = sorted(name for name in there - ours if not name.startswith("."))
    if others:
        done = " (it is packed already)" if INDEX in others else ""
        raise DataError(f"{target} holds {others[0]}{done}: name another folder, or remove it")


def _is_written(target: Path, shard: Shard) -> bool:
    """Its index is written after it."""
    path, index = target / shard.name, target / _index_name(shard)
    whole = path.is_file() and path.stat().st_size == shard.size
    return whole and index.is_file() and read_text(index) == shard.index


def _index_name(shard: Shard) -> str:
    return f"{Path(shard.name).stem}.idx"


def _write(source: Path, target: Path, shard: Shard, pool: ThreadPoolExecutor) -> None:
    contents = pool.map(lambda name: Extent(source / name).read(), shard.images)
    with files.replacing(target / shard.name) as path, path.open("wb") as file:
        for name, size, header, content in zip(shard.images, shard.sizes, shard.headers, contents, strict=True):
            if len(content) != size:
                raise DataError(
                    f"{source / name} had {size:,} bytes and has {len(content):,}: is it being written?"
                )
            file.write(header + content + bytes(_padded(size) - size))
        file.write(bytes(2 * BLOCK))
    files.write_text(target / _index_name(shard), shard.index)


def _index_of(shards: Sequence[Shard], folders: tuple[str, ...], left_out: dict[str, int]) -> Index:
    number = np.repeat(np.arange(len(shards)), [len(shard.images) for shard in shards])
    offsets = np.array([offset for shard in shards for offset in shard.offsets], np.int64)
    sizes = np.array([size for shard in shards for size in shard.sizes], np.int64)
    names = tuple(shard.name for shard in shards)
    images = tuple(image for shard in shards for image in shard.images)
    places = Archive(names, number, offsets, sizes)
    return Index({shard.name: shard.size for shard in shards}, images, places, folders, left_out)


def _require_sound(target: Path, index: Index, threads: int) -> None:
    """Look at both ends of every image, as it lies in its shard now.

    Raises:
        DataError: some are damaged.
    """
    split = Split(target, (), index.files, (-1,) * len(index.files), archive=index.places)
    if faults := list(find_faults(split, range(len(split)), file_fault, threads)):
        raise damaged(split, sorted(faults))
