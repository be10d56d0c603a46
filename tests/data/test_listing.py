"""Which files are images, which are left out, what class lists look like, and names that cannot be opened."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from dist_prune.config.images import ImageSpec
from dist_prune.data.damage import file_fault, find_faults, require_size, size_fault
from dist_prune.data.dataset import list_images, list_unlabelled, open_dataset
from dist_prune.data.extents import Extent
from dist_prune.data.listing import ENDINGS, DataError, list_folder, read_class_list
from dist_prune.data.loader import evaluation_stream
from tests.pictures import SMALL, One, dataset, flat, jpeg_bytes, picture, save

FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif"), "JPEG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc"), "JPEG2000"),
    ".png": "PNG",
    ".webp": "WEBP",
}


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(20, 20).save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_ending_that_is_read_can_be_decoded(tmp_path: Path) -> None:
    assert set(FORMATS) == ENDINGS
    for ending, kind in FORMATS.items():
        (tmp_path / f"x{ending.upper()}").write_bytes(encoded(kind))
    (tmp_path / "big.tif").write_bytes(encoded("TIFF", big_tiff=True))
    (tmp_path / "trailing.png").write_bytes(encoded("PNG") + bytes(9000))
    split = list_images(tmp_path)
    assert len(split) == len(ENDINGS) + 2
    assert not list(find_faults(split, range(len(split)), file_fault))
    assert sum(len(batch.images) for batch in evaluation_stream(split, SMALL, One(), 4, 1)) == len(split)


def test_images_at_any_depth_of_a_class_count_and_others_are_said(tmp_path: Path) -> None:
    dataset(tmp_path, "ab")
    images = ("a/deep/er/y.jfif", "b/._x.jpg", ".cache/x.jpg")
    for name in (*images, "a/z.gif", "b/notes.txt", "b/README", "b/.DS_Store"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(jpeg_bytes())
    found = open_dataset(tmp_path)
    assert found.train.files == ("a/deep/er/y.jfif", "a/x.jpg", "b/x.jpg")
    assert found.train.labels == (0, 0, 1)
    assert found.notes == (
        f"4 files in {tmp_path}/train left out, not of a kind that DALI decodes: "
        f"1 .gif, 1 .txt, 1 hidden, 1 without an ending",
    )


def test_folders_that_are_named_like_images_are_folders(tmp_path: Path) -> None:
    dataset(tmp_path, "ab")
    for part in ("train", "val"):
        (tmp_path / part / "a").rename(tmp_path / part / "a.png")
    save(tmp_path / "train" / "b" / "y.jpg" / "x.jpg", picture(20, 20))
    found = open_dataset(tmp_path)
    assert found.train.classes == ("a.png", "b")
    assert found.train.files == ("a.png/x.jpg", "b/x.jpg", "b/y.jpg/x.jpg")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.jpg", picture(20, 20))
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "a" / "up").symlink_to(tmp_path / "d")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    assert list_folder(tmp_path / "d").images == ("b/x.jpg",)


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [b"a/caf\xe9.jpg", b"caf\xe9/x.jpg"])
def test_names_that_are_not_utf8_are_named(tmp_path: Path, name: bytes) -> None:
    dataset(tmp_path, "ab")
    path = tmp_path / "train" / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jpeg_bytes())
    for list_them in (open_dataset, list_unlabelled):
        with pytest.raises(DataError, match=r"names are not UTF-8.*caf\\xe9.*; rename them"):
            list_them(tmp_path)


def test_names_beyond_ascii_are_read(tmp_path: Path) -> None:
    save(tmp_path / "é" / "猫.jpg", picture(20, 20))
    assert len(list(evaluation_stream(list_images(tmp_path), SMALL, One(), 1, 1))) == 1


# ── class lists ────────────────────────────────────────────────────────────────────────────────────────────

LISTS = {
    "lines": b"b\na\n",
    "Windows' lines": b"b\r\n\r\n  a  \r\n",
    "a byte order mark": b"\xef\xbb\xbfb\na",
    "UTF-16": "b\na\n".encode("utf-16"),
    "UTF-16, the other way": b"\xfe\xff" + "b\r\na".encode("utf-16-be"),
    "as ls prints them": b"b/\na/\n",
    "paths": b"./train/b/\n/data/train/a\n",
    "one line": b"b, a\n",
    "quoted, with commas": b'"b",\n"a",\n',
    "a JSON list": b'["b", "a"]',
    "class_to_idx": b'{"a": 1, "b": 0}',
    "ImageNet's class index": b'{"0": ["b", "bee"], "1": ["a", "ant"]}',
    "label to name": b'{"1": "a", "0": "b"}',
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_class_list_is_read_as_people_write_it(tmp_path: Path, kind: str) -> None:
    (tmp_path / "names").write_bytes(LISTS[kind])
    assert read_class_list(tmp_path / "names") == ("b", "a")
    assert open_dataset(dataset(tmp_path / "d"), tmp_path / "names").train.labels == (0, 1)
    assert open_dataset(tmp_path / "d", tmp_path / "names").train.files == ("b/x.jpg", "a/x.jpg")


REFUSED = {
    "labels beside names": (
        b"a,0\nb,1\n",
        "not in the class list: a, b; .* begins with 'a,0', 'b,1': expected one",
    ),
    "synsets": (b"a ant\nb bee\n", "begins with 'a ant', 'b bee': expected one folder's name per line"),
    "Latin-1": (b"a\ncaf\xe9\n", "line 2 is not utf-8; save the file as UTF-8"),
    "UTF-16 without a mark": ("a\nb".encode("utf-16-le"), "holds zero bytes; expected text, saved as UTF-8"),
    "labels with a gap": (b'{"a": 0, "b": 2}', "labels are not 0 to 1, each once"),
    "other JSON": (b'{"classes": ["a", "b"]}', "expected a JSON list of folders' names"),
    "nothing": (b"\n", "is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_list_that_does_not_fit_is_at_fault_itself(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        open_dataset(dataset(tmp_path / "d"), tmp_path / "names")
    assert "remove" not in str(refused.value)


# ── sizes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_crop_that_is_too_large_is_at_fault_not_the_images(tmp_path: Path) -> None:
    split = flat(tmp_path, 20, side=40)
    require_size(split, 40)
    with pytest.raises(
        DataError, match=r"000.png \(40×40 pixels, need 41\).*; lower --crop, or enlarge"
    ) as refused:
        require_size(split, 41)
    assert "damaged" not in str(refused.value)
    with pytest.raises(DataError, match=r"are smaller than --crop: 000\.png"):
        list(evaluation_stream(split, ImageSpec(resize=0, crop=41), One(), 4, 1))


def test_very_large_images_are_sound(tmp_path: Path) -> None:
    """Pillow takes 179 megapixels at most, unless asked, for fear of attacks."""
    Image.new("L", (16000, 12000)).save(tmp_path / "x.jpg")
    split = list_images(tmp_path)
    assert list(find_faults(split, range(1), lambda path: size_fault(path, 12001))) == [
        "x.jpg (16000×12000 pixels, need 12001)"
    ]
    assert Image.MAX_IMAGE_PIXELS is not None


def test_what_else_a_file_is_is_said(tmp_path: Path) -> None:
    for start, reason in {
        encoded("GIF"): "a GIF, which DALI does not decode",
        b"\0\0\0\x1cftypavif": "AVIF, which DALI does not decode",
        b"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the image",
        b"RIFF\0\0\0\0WAVE": "not an image, starts with b'RIFF'",
        b"<html>": "not an image, starts with b'<htm'",
    }.items():
        (tmp_path / "x.jpg").write_bytes(start)
        assert file_fault(Extent(tmp_path / "x.jpg")) == reason
