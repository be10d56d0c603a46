"""`dist-prune pack`: a folder of images written into shards, which file systems of clusters read much faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dist_prune.config.flags import require
from dist_prune.data.pack import folders_to_pack, pack


@dataclass(frozen=True)
class Packing:
    """Write the images of a folder into tar shards with an index, for --data or --calibrate-data.

    Packs DATA/train and DATA/val, or DATA itself where neither is there, in a random order.

    Packing that was ended goes on: shards that are written are kept.

    Example: dist-prune pack /imagenet /imagenet-packed
    """

    data: tyro.conf.Positional[Path]
    """Folder with train/ and val/, or with images."""
    out: tyro.conf.Positional[Path]
    """Folder to write, which is made."""
    shard_mb: int = 256
    """Size of a shard, MiB; smaller ones where there would be fewer than 64."""
    seed: int = 0
    """Of the order of the images."""
    threads: int = 16
    """Files that are read at a time."""

    def __post_init__(self) -> None:
        require(self.shard_mb > 0, f"--shard-mb {self.shard_mb}: expected at least 1")
        require(self.threads > 0, f"--threads {self.threads}: expected at least 1")


def parse(words: Sequence[str]) -> Packing:
    """What the words ask for."""
    return tyro.cli(Packing, args=words, prog="dist-prune pack")


def main(words: Sequence[str]) -> int:
    """Pack what the words say; 0.

    Raises:
        DataError: no images, damaged ones, or a folder that holds something else.
        ConfigError: an invalid flag.
    """
    asked = parse(words)
    for part in folders_to_pack(asked.data):
        source, target = asked.data / part, asked.out / part
        index = pack(source, target, asked.shard_mb * 2**20, asked.seed, asked.threads, print)
        size = sum(index.shards.values()) / 2**30
        print(f"{source}: {len(index.files):,} images in {len(index.shards)} shards of {target}, {size:.2f} GiB")
    return 0
