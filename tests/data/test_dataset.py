"""What a data set on disk is, and which files are damaged."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dist_prune.data.dataset import (
    DataError,
    Split,
    check_files,
    list_images,
    list_unlabelled,
    open_dataset,
    write_digits,
)
from tests.pictures import One, dataset, flat, jpeg_bytes, picture, save


def test_a_data_set_is_listed_by_class_then_name(tmp_path: Path) -> None:
    found = open_dataset(dataset(tmp_path, "ba"))
    assert found.train.classes == ("a", "b")
    assert found.train.files == ("a/x.jpg", "b/x.jpg")
    assert found.val.labels == (0, 1)
    assert found.train.digest() == found.val.digest()
    assert found.train.digest() != found.train.subset(1, 0).digest()


def test_a_class_list_gives_the_labels_and_may_hold_more(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("b\nunused\na\n")
    train = open_dataset(dataset(tmp_path / "d"), tmp_path / "names.txt").train
    assert (train.files, train.labels) == (("b/x.jpg", "a/x.jpg"), (0, 2))


def test_images_without_classes(tmp_path: Path) -> None:
    split = flat(tmp_path, 3)
    assert (split.classes, split.labels) == ((), (-1, -1, -1))


def no_val(root: Path) -> None:
    (root / "val").rename(root / "valid")


def class_only_in_train(root: Path) -> None:
    save(root / "train" / "c" / "x.jpg", picture(20, 20))


def empty_class(root: Path) -> None:
    (root / "val" / "b" / "x.jpg").unlink()


def nothing(root: Path) -> None:
    for file in list(root.rglob("*.jpg")):
        file.unlink()
        file.parent.rmdir()


def without_class_folders(root: Path) -> None:
    nothing(root)
    flat(root / "train", 2)
    flat(root / "val", 2)


def images_beside_folders(root: Path) -> None:
    save(root / "train" / "stray.png", picture(20, 20))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_val, "val is not a folder: expected .*/{train,val}/<class>/"),
        (class_only_in_train, "only in train: c; only in val: none"),
        (empty_class, "class folders without images: b"),
        (nothing, "no images in .*train"),
        (without_class_folders, "train has images but no class folders"),
        (images_beside_folders, r"images \(stray.png\) and folders \(a\)"),
    ],
)
def test_a_layout_that_is_wrong_is_explained(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(dataset(tmp_path))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_an_absent_folder_and_an_unlisted_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_dataset(tmp_path / "nowhere")
    dataset(tmp_path)
    for text, message in (("a\n", "not in the class list: b"), ("a\nb\na\n", "twice: a")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            open_dataset(tmp_path, tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"none.txt is not a file"):
        open_dataset(tmp_path, tmp_path / "none.txt")


def test_a_subset_is_seeded_spread_and_without_repeats(tmp_path: Path) -> None:
    split = Split(tmp_path, ("a", "b"), tuple(f"{i}" for i in range(100)), (0,) * 50 + (1,) * 50)
    subset = split.subset(30, seed=4)
    assert subset == split.subset(30, seed=4)
    assert subset != split.subset(30, seed=5)
    assert len(set(subset.files)) == 30
    assert subset.labels.count(0) == 15
    assert all(split.labels[int(f)] == label for f, label in zip(subset.files, subset.labels, strict=True))
    assert set(split.subset(100, seed=4).files) == set(split.files)
    with pytest.raises(DataError, match="asked for 101 of 100"):
        split.subset(101, seed=4)


def test_sound_files_pass_and_ten_of_many_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "thumbnail.jpg").write_bytes(
        jpeg_bytes() + bytes(9000)
    )  # padded beyond the tail that is looked at
    flat(tmp_path, 2)
    check_files(list_images(tmp_path), One())
    (tmp_path / "bad00.jpg").write_bytes(jpeg_bytes()[:-2])  # the decoder may or may not mind
    for i in range(1, 12):
        (tmp_path / f"bad{i:02d}.jpg").touch()
    with pytest.raises(
        DataError, match=r"^12 damaged .* bad00.jpg \(truncated JPEG\), bad01.jpg \(empty\), .* and 2 more"
    ):
        check_files(list_images(tmp_path), One())


# Images without labels


def test_unlabelled_images_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.JPG", "x/a.png", "x/y/z/c.webp", "x/.hidden.jpg", ".cache/d.jpg", "x/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg_bytes())
    found = list_unlabelled(tmp_path)
    assert found.files == ("b.JPG", "x/a.png", "x/y/z/c.webp")
    assert (found.classes, set(found.labels)) == ((), {-1})
    assert len(found.subset(2, 0)) == 2


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images in .*, at any depth"):
        list_unlabelled(tmp_path)
    with pytest.raises(DataError, match="absent is not a folder: expected one with images"):
        list_unlabelled(tmp_path / "absent")


# Digits


def test_digits_are_written_once_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "digits"
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=write_digits, args=(folder,)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    found = open_dataset(folder)
    assert len(found.train) + len(found.val) == 1797
    assert 0.19 < len(found.val) / 1797 < 0.21
    assert found.val.classes == tuple("0123456789")
    assert Image.open(found.val.root / found.val.files[0]).size == (32, 32)
    stamp = (folder / "train" / "0").stat().st_mtime_ns
    assert write_digits(folder) == folder
    assert (folder / "train" / "0").stat().st_mtime_ns == stamp
    assert [p.name for p in folder.parent.iterdir()] == ["digits"]


def test_digits_do_not_overwrite_other_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="other images than the 1797 digits"):
        write_digits(dataset(tmp_path))
