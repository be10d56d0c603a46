"""Packed images are copied once per node, by all of its ranks, and read from there."""

import shutil
import time
from pathlib import Path

import pytest

from dist_prune.data import stage
from dist_prune.data.dataset import Split, list_images
from dist_prune.data.listing import DataError
from dist_prune.data.loader import evaluation_stream
from dist_prune.data.pack import pack
from dist_prune.distributed.world import RankError, World
from tests.pictures import SMALL, One, flat
from tests.ranks import run_ranks


def shards_of(tmp_path: Path, count: int = 40) -> Split:
    flat(tmp_path / "a", count)
    pack(tmp_path / "a", tmp_path / "p", 4096, 0, 2, lambda _: None)
    return list_images(tmp_path / "p")


def stage_counting(world: World, split: Split, folder: Path, nodes: int) -> tuple[Path, list[str], list[int]]:
    """Where the images are, the shards that this rank copied, and the images that it then reads."""
    node, copied, copy = world.rank % nodes, list[str](), shutil.copyfile
    stage.host_id = lambda: f"node {node}"
    stage.shutil.copyfile = lambda source, target: (copied.append(source.name), copy(source, target))[1]
    found = stage.staged(split, folder / str(node), world)
    stream = evaluation_stream(found, SMALL, world, 3, 1)
    return found.root, copied, [i for batch in stream.raw() for i in batch.indices.tolist()]


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (2, 1), (3, 2)])
def test_each_node_gets_every_shard_once_and_ranks_share_the_work(tmp_path: Path, ranks: int, nodes: int) -> None:
    split = shards_of(tmp_path)
    assert split.archive is not None and len(split.archive.shards) > 4
    results = run_ranks(stage_counting, ranks, split, tmp_path / "disk", nodes)
    for node in range(nodes):
        here = [copied for rank, (_, copied, _) in enumerate(results) if rank % nodes == node]
        assert sorted(name for copied in here for name in copied) == sorted(split.archive.shards)
        assert max(map(len, here)) - min(map(len, here)) <= 1
    assert all(tmp_path / "disk" in root.parents for root, _, _ in results)
    shutil.rmtree(tmp_path / "p" / "000000.tar", ignore_errors=True)
    assert sorted(i for _, _, seen in results for i in seen) == list(range(40))
    again = run_ranks(stage_counting, ranks, split, tmp_path / "disk", nodes)
    assert all(not copied for _, copied, _ in again)


def stage_late(world: World, split: Split, folder: Path) -> list[str]:
    """The shards that are there once this rank, which begins later than those before it, has staged."""
    together = world.on_all
    world.on_all = lambda function: (time.sleep(0.3 * world.rank), together(function))[1]  # type: ignore[method-assign]
    found = stage.staged(split, folder, world)
    return sorted(path.name for path in found.root.iterdir())


def test_a_rank_that_begins_late_copies_its_share_all_the_same(tmp_path: Path) -> None:
    split = shards_of(tmp_path)
    assert split.archive is not None
    for there in run_ranks(stage_late, 2, split, tmp_path / "disk"):
        assert {*split.archive.shards} <= {*there}


def test_a_shard_that_was_cut_off_is_copied_again(tmp_path: Path) -> None:
    split = shards_of(tmp_path)
    world = One()
    object.__setattr__(world, "on_all", lambda function: function())
    found = stage.staged(split, tmp_path / "disk", world)  # type: ignore[arg-type]
    (found.root / "000001.tar").write_bytes(b"cut off")
    stage.staged(split, tmp_path / "disk", world)  # type: ignore[arg-type]
    assert (found.root / "000001.tar").read_bytes() == (split.root / "000001.tar").read_bytes()


def stage_without_room(world: World, split: Split, folder: Path) -> str:
    stage.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1000, 1000, 0 if world.rank == 1 else 10**9)
    try:
        stage.staged(split, folder, world)
    except (DataError, RankError) as error:
        return str(error)
    return "staged"


def test_no_room_on_one_node_is_an_error_on_all(tmp_path: Path) -> None:
    said = run_ranks(stage_without_room, 2, shards_of(tmp_path), tmp_path / "disk")
    assert all("GB to copy, 0.0 GB free" in text for text in said)


def test_images_that_are_not_packed_are_not_staged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dist-prune pack writes shards"):
        stage.staged(flat(tmp_path / "a", 2), tmp_path / "disk", One())  # type: ignore[arg-type]
