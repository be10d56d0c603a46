"""Causes of DALI's failures: only for an image the files are looked through, and not for long."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_prune.config.images import Augment
from dist_prune.data import dali_errors
from dist_prune.data.dali_errors import cause_of, explain
from dist_prune.data.listing import DataError
from dist_prune.data.loader import evaluation_stream, training_stream
from tests.pictures import SMALL, One, flat

WHERE = (
    "Critical error in pipeline:\nError in {kind} operator `nvidia.dali.fn.{operator}`,\nwhich was used in the "
    'pipeline definition with the following traceback:\n\n  File "loader.py", line 1\n\nencountered:\n\n{text}\n'
    "C++ context: [/opt/dali/dali/core/alloc.cc:29] \nCurrent pipeline object is no longer valid."
)


def error(text: str, operator: str = "decoders.image", kind: str = "CPU") -> RuntimeError:
    return RuntimeError(WHERE.format(kind=kind, operator=operator, text=text))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (error("CUDA allocation failed", kind="GPU"), "memory"),
        (error("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", kind="GPU"), "memory"),
        (error("Can't allocate 1048576 bytes on host."), "memory"),
        (error("std::bad_alloc", operator="readers.file"), "memory"),
        (error("CUDA runtime API error cudaErrorIllegalAddress (700)", kind="GPU"), "device"),
        (error("CUDA driver error 999", kind="GPU"), "device"),
        (error('Assert on "n == size" failed: Failed to read file: a/1.jpg', operator="readers.file"), "reading"),
        (error("Could not open file /x/1.jpg: Input/output error", operator="readers.webdataset"), "reading"),
        (error("Failed to decode sample #1 : a/1.jpg"), "image"),
        (error("nvImageCodec failure: '#4'", kind="Mixed"), "image"),
    ],
)
def test_what_the_message_is_about(raised: RuntimeError, kind: str) -> None:
    """The place in DALI's sources, /core/alloc.cc, says nothing of memory."""
    cause = cause_of(raised)
    assert cause.kind == kind
    assert "C++" not in cause.text and "encountered" not in cause.text


def no_scan(*_: object, **__: object) -> None:
    raise AssertionError("the files were looked through")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA allocation failed", torch.OutOfMemoryError),
        ("CUDA driver error 999", RuntimeError),
        ("Failed to read file: a/1.jpg", OSError),
    ],
)
def test_no_file_is_opened_where_no_image_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: type[Exception]
) -> None:
    monkeypatch.setattr(dali_errors, "find_faults", no_scan)
    found = explain(error(text), flat(tmp_path, 2), SMALL, range(2))
    assert type(found) is expected and text in str(found)


@dataclass(frozen=True)
class Heard(One):
    """A rank whose troubles are kept."""

    troubles: list[str] = field(default_factory=list)

    def report_trouble(self, text: str) -> None:
        self.troubles.append(text)


def test_a_file_that_cannot_be_read_is_named_by_dalis_own_words(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dali_errors, "find_faults", no_scan)
    split, world = flat(tmp_path, 3), Heard()
    (tmp_path / "001.png").unlink()
    (tmp_path / "001.png").mkdir()
    with pytest.raises(OSError, match=r"001\.png"):
        list(evaluation_stream(split, SMALL, world, 1, 1))
    assert world.troubles and "001.png" in world.troubles[0]


def test_others_hear_what_dali_said_before_the_image_is_looked_for(tmp_path: Path, monkeypatch: Any) -> None:
    split, world = flat(tmp_path, 3), Heard()
    (tmp_path / "001.png").write_bytes(b"<html>")

    def looked(*_: object, **__: object) -> list[str]:
        assert world.troubles and world.troubles[0].startswith("DALI failed: ")
        return ["001.png (found)"]

    monkeypatch.setattr(dali_errors, "find_faults", looked)
    with pytest.raises(DataError, match=r"001\.png \(found\)"):
        list(training_stream(split, SMALL, world, 1, 1, 0, Augment()))


def test_a_search_ends_in_time_though_the_file_system_is_slow(tmp_path: Path, monkeypatch: Any) -> None:
    split, seen = flat(tmp_path, 64), list[Path]()

    def slow(path: Path) -> None:
        seen.append(path)
        time.sleep(0.5)

    for name in ("file_fault", "size_fault", "decode_fault"):
        monkeypatch.setattr(dali_errors, name, lambda path, **_: slow(path))
    monkeypatch.setattr(dali_errors, "SCAN_S", 0.7)
    began = time.monotonic()
    found = explain(error("Failed to decode sample #1"), split, SMALL, range(64))
    assert time.monotonic() - began < 5
    assert isinstance(found, DataError) and "Failed to decode sample #1" in str(found)
    assert 0 < len(seen) < 3 * 64


def test_an_evaluation_looks_first_where_it_stands(tmp_path: Path) -> None:
    stream = evaluation_stream(flat(tmp_path, 12), SMALL, One(1, 2), 2, 1)
    source = iter(stream)
    next(source), next(source)
    assert stream._remaining() == [10, 11, 6, 7, 8, 9]
