"""Files that are whole or absent: written aside, flushed, renamed, with a checksum beside them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.config import Run, to_dict

CONFIG = "config.json"
SNAPSHOT = "code"  # in a run's directory, the code that a cluster job runs
IRRELEVANT = {"resume", "until", "overwrite", "run_dir", "dry_run", "device", "timeout", "threads"}


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
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(folder: Path) -> bool:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < 4096


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with replacing(path) as aside:
        aside.write_text(text)


def checksum(path: Path) -> str:
    """SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Write the file's checksum beside it; without that, the file counts as unfinished."""
    write_text(_seal_of(path), f"{checksum(path)}  {path.name}\n")


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def require_intact(path: Path) -> None:
    """Compare the file with its checksum.

    Raises:
        CheckpointError: absent, unfinished, or changed since it was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if not _seal_of(path).is_file():
        raise CheckpointError(f"{path}: has no {_seal_of(path).name}; it was not written to the end")
    expected = _seal_of(path).read_text().split()[:1]
    if [checksum(path)] != expected:
        raise CheckpointError(f"{path}: its SHA-256 differs from the one in {_seal_of(path).name}: damaged")


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Save plain types and tensors as checkpoint number `step`; the oldest beyond `keep` are removed.

    Raises:
        CheckpointError: see `replacing`.
    """
    path = folder / f"{step:08d}.pt"
    with replacing(path) as aside:
        torch.save(state, aside)
    seal(path)
    for old in _numbered(folder)[:-keep]:
        _seal_of(old).unlink(missing_ok=True)
        old.unlink()
    return path


def newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest intact checkpoint, or None; and what is wrong with the newer ones."""
    problems: list[str] = []
    for path in reversed(_numbered(folder)):
        try:
            require_intact(path)
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.pt") if re.fullmatch(r"\d{8}", p.stem))


# ── run directories and the cache ──────────────────────────────────────────────────────────────────────────


def cache_folder() -> Path:
    """Where things that can be made again are kept: $DIST_PRUNE_CACHE, else ~/.cache/dist_prune."""
    given = os.environ.get("DIST_PRUNE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "dist_prune"


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


def run_directory(config: Run) -> Path:
    """`--run-dir`, or a new name under runs/."""
    if config.run_dir is not None:
        return config.run_dir
    name = f"{config.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for n in itertools.count() if not (p := Path("runs") / (f"{name}-{n}" if n else name)).exists())


def require_free(folder: Path, config: Run) -> None:
    """Refuse to mix two runs, and to remove what is not a run.

    Raises:
        CheckpointError: the folder holds something and the flags do not say what to do, or say it wrongly.
    """
    if not folder.exists() or (folder.is_dir() and not _belongings(folder)):
        return
    is_run = (folder / CONFIG).is_file()
    if not is_run:
        raise CheckpointError(f"--run-dir {folder} holds files that are not of a run; choose another name")
    if config.overwrite:
        return
    if not config.resume:
        raise CheckpointError(
            f"--run-dir {folder} holds a run: choose another name, or continue it with --resume, "
            f"or replace it with --overwrite"
        )
    changed = changes(json.loads((folder / CONFIG).read_text())["run"], to_dict(config))
    if changed:
        raise CheckpointError(f"--resume: {folder} was started with other settings: {'; '.join(changed)}")


def _belongings(folder: Path) -> list[Path]:
    """What a run left; the code that its job was started with does not count, it was there before."""
    return [path for path in folder.iterdir() if path.name != SNAPSHOT]


def changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Settings that differ and that change what a run computes, as `name: before → now`."""
    told: list[str] = []
    for name in sorted({*before, *now} - IRRELEVANT):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += changes(old, new, f"{where}{name}.")
        elif old != new:
            told.append(f"{where}{name}: {old} → {new}")
    return told


def claim(folder: Path, config: Run, environment: dict[str, Any]) -> None:
    """Make the folder this run's: an overwritten run goes, but for its code; config.json is written."""
    if config.overwrite and folder.exists():
        for path in _belongings(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if config.resume and (folder / CONFIG).is_file():
        return
    content = {"run": to_dict(config), "environment": environment}
    write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")
