"""What was found sound is not opened again, until a file comes, goes or gets another name."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_prune.data import damage, extents
from dist_prune.data.damage import check_files
from dist_prune.data.dataset import list_images
from dist_prune.data.verdicts import is_known_sound, keep_sound
from tests.pictures import One, dataset, flat, picture, save


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIST_PRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_verdict_holds_for_the_same_files_alone(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", "abc") / "train"
    split = list_images(folder)
    assert not is_known_sound(split)
    keep_sound(split)
    assert is_known_sound(list_images(folder))
    assert not is_known_sound(list_images(tmp_path / "data" / "val"))
    os.utime(folder / "a", ns=(0, 0))
    save(folder / "a" / "y.jpg", picture(16, 16))
    more = list_images(folder)
    assert not is_known_sound(more)
    keep_sound(more)
    (folder / "a" / "y.jpg").rename(folder / "a" / "aside")
    (folder / "a" / "aside").rename(folder / "a" / "y.jpg")  # perhaps another one, in its place
    assert not is_known_sound(list_images(folder))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, cache: Path) -> None:
    cache.write_text("not a folder")
    split = flat(tmp_path / "data", 2)
    keep_sound(split)
    assert not is_known_sound(split)


@pytest.mark.parametrize("size", [10, 4000, 4096, 8191, 100_000, 5_000_000])
def test_no_more_than_two_pages_of_a_file_are_read(tmp_path: Path, monkeypatch: Any, size: int) -> None:
    path, read = tmp_path / "x.jpg", Counter[str]()
    path.write_bytes((b"\xff\xd8\xff" + bytes(size))[: size - 2] + b"\xff\xd9")
    pread = os.pread

    def counted(number: int, count: int, offset: int) -> bytes:
        found = pread(number, count, offset)
        read["bytes"] += len(found)
        return found

    monkeypatch.setattr(extents.os, "pread", counted)
    monkeypatch.setattr(damage.Extent, "read", lambda _: pytest.fail("the whole file was read"))
    assert damage.file_fault(extents.Extent(path)) is None
    assert 0 < read["bytes"] <= 8192


def test_both_ends_are_looked_at_wherever_the_pages_lie(tmp_path: Path) -> None:
    for size in (600, 4096 + 100, 4096 + 700, 9000):
        for cut in (0, 1, 200):
            content = b"\xff\xd8\xff\xda" + bytes([1]) * (size - 6) + b"\xff\xd9"
            path = save_bytes(tmp_path / f"{size}-{cut}.jpg", content[: size - cut])
            assert damage.file_fault(extents.Extent(path)) == ("truncated JPEG" if cut else None)


def save_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_files_behind_the_picture_are_allowed(tmp_path: Path) -> None:
    """Bytes that follow the picture, more than are read of its end."""
    save(tmp_path / "a.jpg", picture(64, 64))
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(bytes(20_000))
    check_files(list_images(tmp_path), One())
