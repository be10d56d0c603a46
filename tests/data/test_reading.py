"""Files that are read ahead: in order, several at a time, and named where they cannot be read."""

import threading
import time
from pathlib import Path

import pytest

from dist_prune.data.extents import Extent
from dist_prune.data.loader import evaluation_stream
from dist_prune.data.reading import PIECE, THREADS, ReadAhead
from tests.pictures import SMALL, One, flat


@pytest.mark.parametrize("batches", [[[3, 1], [0], [2, 4]], [list(range(100)), list(range(150, 100, -1))], []])
def test_batches_come_in_order_with_their_bytes(tmp_path: Path, batches: list[list[int]]) -> None:
    split = flat(tmp_path, 151)
    read = ReadAhead(split, batches)
    for wanted in batches:
        images, places = read()
        assert [place.item() for place in places] == wanted
        assert [image.tobytes() for image in images] == [(tmp_path / split.files[p]).read_bytes() for p in wanted]
    with pytest.raises(StopIteration):
        read()


def test_files_that_open_slowly_are_opened_by_all_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, count, lock = 0.02, 2 * THREADS * PIECE, threading.Lock()
    split, read, open_now, most = flat(tmp_path, count), Extent.read, 0, 0

    def slow(extent: Extent) -> bytes:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(wait)
        with lock:
            open_now -= 1
        return read(extent)

    monkeypatch.setattr(Extent, "read", slow)
    began = time.monotonic()
    assert sum(len(b.images) for b in evaluation_stream(split, SMALL, One(), 8, 1).raw()) == count
    assert most == THREADS
    assert time.monotonic() - began < wait * count / 2, "one after the other"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    split = flat(tmp_path, 3)
    (tmp_path / split.files[1]).unlink()
    read = ReadAhead(split, [[0], [1], [2]])
    read()
    with pytest.raises(OSError, match=split.files[1]):
        read()
