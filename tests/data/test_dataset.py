"""What a data set on disk is, and which files are damaged."""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dist_prune.data.damage import check_files
from dist_prune.data.dataset import Split, list_images, list_unlabelled, open_dataset, write_digits
from dist_prune.data.listing import DataError
from tests.pictures import One, dataset, flat, jpeg_bytes, picture, save

PNG = b"\x89PNG\r\n\x1a\n" + bytes(5000) + b"IEND\xaeB`\x82"


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
        (nothing, "no images in .*train"),
        (without_class_folders, "train has images but no class folders"),
        (images_beside_folders, r"images \(stray.png\) and folders \(a\)"),
    ],
)
def test_a_layout_that_is_wrong_is_explained(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(dataset(tmp_path))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


# Classes come from one list; either folder may lack images of some


def test_val_may_lack_classes_of_train(tmp_path: Path) -> None:
    save(dataset(tmp_path, "ab") / "train" / "aa" / "x.jpg", picture(20, 20))
    (tmp_path / "val" / "b" / "x.jpg").unlink()
    (tmp_path / "train" / "c").mkdir()
    found = open_dataset(tmp_path)
    assert found.train.classes == found.val.classes == ("a", "aa", "b", "c")
    assert (found.train.labels, found.val.labels) == ((0, 1, 2), (0,))
    assert [note.partition(" has ")[2] for note in found.notes] == [
        "no images of 1 of 4 classes: c",
        "no images of 3 of 4 classes: aa, b, c",
    ]


def test_folders_of_both_are_the_classes_where_the_network_has_as_many_outputs(tmp_path: Path) -> None:
    (dataset(tmp_path, "abc") / "train" / "b" / "x.jpg").unlink()
    (tmp_path / "train" / "b").rmdir()
    assert open_dataset(tmp_path, outputs=3).val.labels == (0, 1, 2)
    assert open_dataset(tmp_path, outputs=3).train.labels == (0, 2)
    found = open_dataset(tmp_path, outputs=2)
    assert (found.val.files, found.val.labels) == (("a/x.jpg", "c/x.jpg"), (0, 1))
    assert found.notes == (f"{tmp_path}/val: folders that are no classes of {tmp_path}/train are left out: b",)


def test_training_images_without_labels_may_lie_in_any_folders(tmp_path: Path) -> None:
    dataset(tmp_path, "ab")
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "2026")
    (tmp_path / "names.txt").write_text("a\nb\n")
    for class_list in (tmp_path / "names.txt", None):
        found = open_dataset(tmp_path, class_list, 2, labelled=False)
        assert (found.train.classes, found.train.labels, found.val.labels) == (("a", "b"), (-1, -1), (0, 1))
        assert found.notes == (
            f"{tmp_path}/train: its images are used without labels, as its folders are not the network's classes",
        )
    with pytest.raises(DataError, match="train has class folders that are not in the class list: 2026"):
        open_dataset(tmp_path, tmp_path / "names.txt", 2)


def test_training_images_without_labels_need_no_folders_or_may_be_absent(tmp_path: Path) -> None:
    shutil.rmtree(dataset(tmp_path, "ab") / "train")
    absent = open_dataset(tmp_path, outputs=2, labelled=False, train=False)
    assert (len(absent.train), absent.train.classes, absent.val.labels) == (0, ("a", "b"), (0, 1))
    flat(tmp_path / "train", 3)
    loose = open_dataset(tmp_path, outputs=2, labelled=False)
    assert (loose.train.labels, loose.val.labels) == ((-1, -1, -1), (0, 1))
    with pytest.raises(DataError, match="train has images but no class folders"):
        open_dataset(tmp_path, outputs=2)


def test_accents_written_in_two_ways_are_one_class(tmp_path: Path) -> None:
    (dataset(tmp_path, "ab") / "val" / "b").rename(tmp_path / "val" / "caf\u00e9")
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "cafe\u0301")
    found = open_dataset(tmp_path)
    assert (found.train.labels, found.val.labels, found.notes) == ((0, 1), (0, 1), ())


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
    for i, content in enumerate([PNG + bytes(9000), PNG + b"tag", b"II+\x00" + bytes(40)]):
        (tmp_path / f"sound{i}.png").write_bytes(content)
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
    with pytest.raises(DataError, match=r"no images in .*, at any depth.*1 files in .* left out.*: 1 \.txt"):
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
