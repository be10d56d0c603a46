"""Where the bytes of an image lie: a file, or a part of a shard that holds many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEAD = 16  # bytes by which formats are known
TAIL = 512  # bytes that are seen of an end, at least
PAGE = 4096

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extent:
    """`size` bytes of a file from `offset` on; a negative size: all of it."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """All of the image."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read() if self.size < 0 else file.read(self.size)

    def ends(self) -> tuple[bytes, bytes]:
        """The first and the last bytes, and little else: no more than two pages of memory at the end.

        A buffered read would take `st_blksize` bytes of either, which are megabytes on some file systems.
        """
        number = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            size = os.fstat(number).st_size if self.size < 0 else self.size
            end = self.offset + size
            begin = max(self.offset, (end - TAIL) // PAGE * PAGE)
            return os.pread(number, min(HEAD, size), self.offset), os.pread(number, end - begin, begin)
        finally:
            os.close(number)


@dataclass(frozen=True, eq=False)
class Archive:
    """Where the images of a split lie in shards: of each, which shard, its offset there, and its size in bytes.

    `shards` are names relative to the split's root.
    """

    shards: tuple[str, ...]
    shard: Integers
    offset: Integers
    size: Integers

    def extent(self, root: Path, place: int) -> Extent:
        """Of one image."""
        path = root / self.shards[int(self.shard[place])]
        return Extent(path, int(self.offset[place]), int(self.size[place]))

    def take(self, places: Sequence[int]) -> Archive:
        """Of some of the images, in this order."""
        index = np.asarray(places, np.int64)
        return Archive(self.shards, self.shard[index], self.offset[index], self.size[index])

    def stored_order(self) -> Integers:
        """All images, as they follow each other on disk."""
        return np.lexsort((self.offset, self.shard))

    def digest(self) -> str:
        """Identify what lies where, by a SHA-256."""
        arrays = (self.shard, self.offset, self.size)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
