"""Packed images copied to a disk of each node, once per node and by all of its ranks together."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from dist_prune.data.dataset import Split
from dist_prune.data.listing import DataError
from dist_prune.data.shards import INDEX
from dist_prune.distributed.devices import host_id
from dist_prune.distributed.world import World
from dist_prune.utils import files


def staged(split: Split, folder: Path, world: World) -> Split:
    """The split as it lies in `folder` on this rank's node, once its shards are copied there.

    The copy is named by the index and its place: other runs of the same images take it as it is.

    Raises:
        DataError: the images are not packed, or there is no room.
        CheckpointError: the folder cannot be written.
        RankError: the same on another rank.
    """
    if split.archive is None:
        raise DataError(f"--stage: {split.root} is not packed; dist-prune pack writes shards, which can be staged")
    index = split.root / INDEX
    origin = f"{index.resolve()} {index.stat().st_mtime_ns} ".encode("utf-8", "surrogateescape")
    target = folder / hashlib.sha256(origin + index.read_bytes()).hexdigest()[:16]
    hosts = world.gather(host_id())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    sizes = {name: (split.root / name).stat().st_size for name in split.archive.shards}

    def copy_share() -> None:
        own = [*sizes][here.index(world.rank) :: len(here)]  # of all: others may have copied some by now
        for name in own:
            if not _is_there(target / name, sizes[name]):
                with files.replacing(target / name) as aside:
                    shutil.copyfile(split.root / name, aside)

    world.on_all(lambda: _require_room(folder, target, sizes))
    world.on_all(copy_share)
    return replace(split, root=target)


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _require_room(folder: Path, target: Path, sizes: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(size for name, size in sizes.items() if not _is_there(target / name, size))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"--stage {folder}: {needed / 1e9:.1f} GB to copy, {free / 1e9:.1f} GB free: name another disk of the "
            f"nodes, or leave the flag out"
        )
