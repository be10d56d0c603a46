"""Files that are whole or absent: written aside, flushed, renamed, with a checksum beside them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.utils import text as text_files

UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
UNFLUSHABLE = (errno.EINVAL, errno.ENOTSUP)  # what file systems say that flush no folders


class CheckpointError(RuntimeError):
    """A file that could not be written, or that is not what was written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; put it in the place of `path` only when the block ended well.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what stood at `path` stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _flush(aside)
        aside.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error})") from error
    except RuntimeError as error:
        # torch reports a full disk as "unexpected pos 704 vs 598".
        if _is_full(path.parent) or "unexpected pos" in str(error):
            raise CheckpointError(f"{path}: could not be written, {os.strerror(errno.ENOSPC)}") from error
        raise
    finally:
        with suppress(OSError):  # what the folder is not may not hide why
            aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNFLUSHABLE or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _is_full(folder: Path) -> bool:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < 4096


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8."""
    with replacing(path) as aside:
        text_files.write_text(aside, text)


def to_json(content: Any, indent: int | None = 1) -> str:  # noqa: ANN401  plain types
    """JSON that every reader takes: what is no finite number becomes null, which the standard has instead."""
    return json.dumps(_standard(content), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _standard(content: Any) -> Any:  # noqa: ANN401  plain types
    if isinstance(content, dict):
        return {name: _standard(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_standard(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def checksum(path: Path) -> str:
    """SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path, known: str = "") -> None:
    """Write the file's checksum, if not `known`, beside it; without that, the file counts as unfinished."""
    write_text(seal_of(path), f"{known or checksum(path)}  {path.name}\n")


def seal_of(path: Path) -> Path:
    """The file that holds a file's checksum."""
    return path.with_name(path.name + ".sha256")


def require_intact(path: Path) -> None:
    """Compare the file with its checksum.

    Raises:
        CheckpointError: absent, unfinished, or changed since it was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if not seal_of(path).is_file():
        raise CheckpointError(f"{path}: has no {seal_of(path).name}; it was not written to the end")
    expected = text_files.read_text(seal_of(path)).split()[:1]
    if [checksum(path)] != expected:
        raise CheckpointError(f"{path}: its SHA-256 differs from the one in {seal_of(path).name}: damaged")


# ── the cache ──────────────────────────────────────────────────────────────────────────────────────────────


def cache_folder() -> Path:
    """Where things that can be computed again are kept: $DIST_PRUNE_CACHE, else ~/.cache/dist_prune."""
    given = os.environ.get("DIST_PRUNE_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "dist_prune"
    except RuntimeError as error:  # a user without a home
        raise CheckpointError(f"no place to keep files in ({error}): name one with DIST_PRUNE_CACHE") from error


@contextmanager
def caching() -> Iterator[Path]:
    """Lend the cache to what writes there.

    Raises:
        CheckpointError: it cannot be written; names its variable.
    """
    folder = cache_folder()
    try:
        yield folder
    except OSError as error:
        if not str(error.filename).startswith(str(folder)) and error.errno not in UNWRITABLE:
            raise
        raise CheckpointError(
            f"{folder}: could not be written ({error.strerror}): name another place with DIST_PRUNE_CACHE"
        ) from error


def require_writable(folder: Path, advice: str) -> None:
    """Refuse a place that cannot be written, before work; leaves nothing there.

    Raises:
        CheckpointError: the folder, or the innermost one around it that exists, cannot be written.
    """
    place = folder.absolute()
    try:
        parent = next(path for path in (place, *place.parents) if path.is_dir())
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error.strerror}): {advice}") from error


def require_absent(path: Path, advice: str = "name another file") -> None:
    """Refuse to replace a file.

    Raises:
        CheckpointError: there is one.
    """
    if path.exists():
        raise CheckpointError(f"{path} is there already: {advice}")


def name_of(key: list[str]) -> str:
    """A short file name for everything that a cached file depends on."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def is_intact(path: Path) -> bool:
    """Whether the file is there as it was written."""
    try:
        require_intact(path)
    except CheckpointError:
        return False
    return True


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a state dict with its checksum."""
    with replacing(path) as aside:
        torch.save(model.state_dict(), aside)
    seal(path)
