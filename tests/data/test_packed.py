"""Packed images are the images of the folder: the same list, the same pixels, each exactly once, well shuffled."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_prune.config.images import Augment
from dist_prune.data.damage import check_files, require_size
from dist_prune.data.dataset import Split, list_images, list_unlabelled, open_dataset
from dist_prune.data.listing import DataError
from dist_prune.data.loader import Stream, evaluation_stream, training_stream
from dist_prune.data.pack import pack
from dist_prune.data.shards import is_packed
from tests.pictures import SMALL, One, flat, picture, save, take

AUGMENT = Augment()


def packed(folder: Path, target: Path, shard_bytes: int = 4096) -> Path:
    pack(folder, target, shard_bytes, 0, 2, lambda _: None)
    return target


def flat_and_packed(tmp_path: Path, count: int) -> tuple[Split, Split]:
    folder = flat(tmp_path / "folder", count)
    return folder, list_images(packed(tmp_path / "folder", tmp_path / "packed"))


def classes(folder: Path, names: str = "abc", each: int = 7) -> Path:
    for part in ("train", "val"):
        for label, name in enumerate(names):
            for i in range(each):
                save(folder / part / name / f"{i}.png", picture(16, 16, 100 * label + i))
    return folder


def test_the_list_is_the_folders(tmp_path: Path) -> None:
    """So runs on either are the same runs: the digests agree, and with them subsets, statistics, checkpoints."""
    source = classes(tmp_path / "a")
    save(source / "train" / "b" / "deep er" / "x.y.jpg", picture(20, 20))
    save(source / "train" / "c" / "größe.JPEG", picture(20, 20))
    (source / "train" / "c" / "notes.txt").write_text("")
    (source / "val" / "empty").mkdir()
    for part in ("train", "val"):
        packed(source / part, tmp_path / "p" / part)
    folder, shards = open_dataset(source), open_dataset(tmp_path / "p")
    for one, other in ((folder.train, shards.train), (folder.val, shards.val)):
        assert (one.files, one.labels, one.classes, one.digest()) == (
            other.files,
            other.labels,
            other.classes,
            other.digest(),
        )
        assert [one.extent(i).read() for i in range(len(one))] == [other.extent(i).read() for i in range(len(one))]
    assert [note.replace(str(source), "") for note in folder.notes] == [
        note.replace(str(tmp_path / "p"), "") for note in shards.notes
    ]
    some, same = folder.train.subset(5, 1), shards.train.subset(5, 1)
    assert some.files == same.files
    assert [some.extent(i).read() for i in range(5)] == [same.extent(i).read() for i in range(5)]


def test_shards_are_plain_tar_files_of_the_images(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    packed(source, tmp_path / "p")
    found: dict[str, bytes] = {}
    for path in sorted((tmp_path / "p").glob("*.tar")):
        with tarfile.open(path) as tar:
            lines = path.with_suffix(".idx").read_text().splitlines()
            members = tar.getmembers()
            assert lines[0] == f"v1.2 {len(members)}"
            for member, line in zip(members, lines[1:], strict=True):
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
                assert line.split() == ["png", str(member.offset_data), str(member.size), member.name]
    assert found == {str(path.relative_to(source)): path.read_bytes() for path in source.glob("*/*.png")}
    assert len(list((tmp_path / "p").glob("*.tar"))) > 3


@pytest.mark.parametrize(("count", "batch"), [(11, 3), (31, 4), (10, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_gives_every_image_once(tmp_path: Path, ranks: int, count: int, batch: int) -> None:
    _, split = flat_and_packed(tmp_path, count)
    streams = [evaluation_stream(split, SMALL, One(rank, ranks), batch, 1) for rank in range(ranks)]
    first = [list(stream.raw()) for stream in streams]
    for epoch in (first, [list(stream.raw()) for stream in streams]):
        seen = [i for rank in epoch for b in rank for i in b.indices.tolist()]
        assert sorted(seen) == list(range(count))
        assert [len(rank) for rank in epoch] == [len(streams[0])] * ranks
        for b in (b for rank in epoch for b in rank):
            assert b.images.shape == (len(b.indices), 3, 16, 16)
            assert torch.equal(b.images[:, 0, 0, 0], 2 * b.indices + 1)


def test_a_subset_is_read_alone_and_labels_go_with_their_images(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    folder, shards = list_images(source), list_images(packed(source, tmp_path / "p"))
    some, same = folder.subset(9, 3), shards.subset(9, 3)

    def content(split: Split) -> dict[int, tuple[int, bytes]]:
        batches = evaluation_stream(split, SMALL, One(), 4, 1).raw()
        rows = (row for b in batches for row in zip(b.indices.tolist(), b.labels.tolist(), b.images, strict=True))
        return {index: (label, pixels.numpy().tobytes()) for index, label, pixels in rows}

    assert content(some) == content(same)
    assert len(content(same)) == 9


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_shows_every_image_each_epoch_in_full_batches(tmp_path: Path, ranks: int) -> None:
    _, split = flat_and_packed(tmp_path, 31)
    streams = [training_stream(split, SMALL, One(rank, ranks), 4, 1, 1, AUGMENT) for rank in range(ranks)]
    orders = []
    for _ in range(3):
        epoch = [list(stream.raw()) for stream in streams]
        batches = [b for rank in epoch for b in rank]
        assert {len(b.images) for b in batches} == {4}
        assert len({len(rank) for rank in epoch}) == 1
        seen = Counter(i for b in batches for i in b.indices.tolist())
        assert set(seen) == set(range(31)) and max(seen.values()) <= 2
        assert all(torch.equal(b.images[:, 0, 8, 8], 2 * b.indices + 1) for b in batches)
        orders.append([i for b in batches for i in b.indices.tolist()])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("steps", [0, 2, 7, 8, 11])
def test_training_resumes_where_it_stood(tmp_path: Path, steps: int, ranks: int) -> None:
    for i in range(30):
        save(tmp_path / "folder" / f"{i:02d}.png", picture(20, 18, seed=i))
    split = list_images(packed(tmp_path / "folder", tmp_path / "packed"))

    def stream() -> Stream:
        return training_stream(split, SMALL, One(ranks - 1, ranks), 4, 1, seed=3, augment=AUGMENT)

    whole = take(stream(), 24)
    before, after = stream(), stream()
    take(before, steps)
    after.load_state_dict(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(take(after, 24 - steps), whole[steps:], strict=True))


@pytest.mark.parametrize(("rank", "steps"), [(0, 1), (1, 2), (2, 3)])
def test_a_resumed_evaluation_still_gives_every_image_once(tmp_path: Path, rank: int, steps: int) -> None:
    _, split = flat_and_packed(tmp_path, 11)

    def stream() -> Stream:
        return evaluation_stream(split, SMALL, One(rank, 3), 1, 1)

    before, after = stream(), stream()
    source = iter(before)
    taken = [next(source).indices.tolist() for _ in range(steps)]
    after.load_state_dict(before.state_dict())
    whole = [b.indices.tolist() for b in stream()]
    assert taken + [b.indices.tolist() for b in after] == whole
    assert [b.indices.tolist() for b in after] == whole


def test_a_state_of_other_storage_is_refused(tmp_path: Path) -> None:
    folder, shards = flat_and_packed(tmp_path, 8)
    for one, other in ((folder, shards), (shards, folder)):
        state = evaluation_stream(one, SMALL, One(), 4, 1).state_dict()
        with pytest.raises(DataError, match="storage was"):
            evaluation_stream(other, SMALL, One(), 4, 1).load_state_dict(state)


def test_batches_mix_classes_as_a_uniform_shuffle_does(tmp_path: Path) -> None:
    """Classes per batch, of 20 classes with 30 images each, on two ranks, against draws without replacement."""
    for label in range(20):
        for i in range(30):
            save(tmp_path / "a" / f"c{label:02d}" / f"{i}.png", picture(16, 16, label))
    split, batch = list_images(packed(tmp_path / "a", tmp_path / "p")), 24
    rng, found, uniform = np.random.default_rng(0), list[int](), list[int]()
    streams = [training_stream(split, SMALL, One(rank, 2), batch, 1, 5, AUGMENT) for rank in range(2)]
    for _ in range(4):
        for stream in streams:
            found += [len(set(b.labels.tolist())) for b in stream.raw()]
        order = rng.permutation(split.labels)
        uniform += [len(set(order[i : i + batch].tolist())) for i in range(0, len(order), batch)]
    error = np.hypot(np.std(found) / len(found) ** 0.5, np.std(uniform) / len(uniform) ** 0.5)
    assert abs(np.mean(found) - np.mean(uniform)) < 3 * error + 0.1, (np.mean(found), np.mean(uniform))


# ── packing ────────────────────────────────────────────────────────────────────────────────────────────────


def test_packing_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    whole = packed(source, tmp_path / "whole")
    written: list[str] = []

    def end(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "p", 4096, 0, 2, end)
    assert not is_packed(tmp_path / "p")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.tar")}
    assert len(kept) == 2
    packed(source, tmp_path / "p")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_damaged_images_are_named_and_nothing_counts_as_packed(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    (source / "b" / "3.png").write_bytes(b"<html>404 not found</html>")
    with pytest.raises(DataError, match=r"1 damaged in .*: b/3\.png \(not an image"):
        packed(source, tmp_path / "p")
    assert not is_packed(tmp_path / "p")


def test_folders_that_hold_something_else_stay_as_they_are(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds mine\.txt"):
        packed(source, tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["mine.txt"]
    done = packed(source, tmp_path / "q")
    with pytest.raises(DataError, match="packed already"):
        packed(source, done)
    with pytest.raises(DataError, match="packed already"):
        packed(done, tmp_path / "r")


def test_shards_that_are_not_whole_are_named_before_work(tmp_path: Path) -> None:
    folder = packed(classes(tmp_path / "a") / "train", tmp_path / "p")
    shard = folder / "000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1024])
    with pytest.raises(DataError, match=r"000001\.tar has [\d,]+ bytes, expected [\d,]+: copy or pack it again"):
        list_images(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"000001\.tar: No such file"):
        list_images(folder)
    shard.write_bytes(content)
    for text in ("{", '{"schema": 1}', '{"schema": 9, "shards": {}}'):
        (folder / "index.json").write_text(text)
        with pytest.raises(DataError, match="pack the images again"):
            list_images(folder)


def test_what_rots_in_a_shard_is_named_before_a_stream_and_by_it(tmp_path: Path) -> None:
    source = classes(tmp_path / "a") / "train"
    split = list_images(packed(source, tmp_path / "p"))
    check_files(split, One())
    require_size(split, 16)
    bad = split.extent(4)
    with bad.path.open("r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.size))
    with pytest.raises(DataError, match=rf"1 damaged in .*: {split.files[4]} \(not an image"):
        check_files(split, One())
    with pytest.raises(DataError, match=split.files[4]):
        list(evaluation_stream(split, SMALL, One(), 2, 1))


def test_an_unlabelled_folder_is_packed_as_it_is(tmp_path: Path) -> None:
    flat(tmp_path / "a", 5)
    split = list_unlabelled(packed(tmp_path / "a", tmp_path / "p"))
    assert split.files == list_unlabelled(tmp_path / "a").files
    assert set(split.labels) == {-1}
