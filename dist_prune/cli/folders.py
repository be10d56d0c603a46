"""The folders that a run would write to: space, what is there already, whether all ranks share them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dist_prune.artifacts import run_directory
from dist_prune.artifacts.lock import LOCK, Lock
from dist_prune.cli.findings import Finding, Verdict
from dist_prune.config.run import Run
from dist_prune.distributed.world import World
from dist_prune.utils.files import CheckpointError, cache_folder, write_text

LOW_GB, FULL_GB = 10.0, 0.5  # free space: a word of warning, too little for any run
PATIENCE_S = 10.0  # for which a shared folder may take to show another node's file
TRY_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def space(config: Run, world: World) -> Iterator[Finding]:
    """Free space for the run and for what can be made again."""
    for subject, folder in (("space for runs", home(config)), ("space for cache", existing(cache_folder()))):
        free = shutil.disk_usage(folder).free / 1e9
        verdict: Verdict = "fail" if free < FULL_GB else "warn" if free < LOW_GB else "ok"
        name = "DIST_PRUNE_CACHE" if subject.endswith("cache") else "--run-dir"
        advice = f"make room, or name another place with {name}"
        writable = os.access(folder, os.W_OK)
        text = f"{free:.1f} GB free in {folder}{'' if writable else ', which cannot be written'}"
        yield Finding(subject, verdict if writable else "fail", text, advice)


def run_folder(config: Run, world: World) -> Iterator[Finding]:
    """Whether --run-dir can be taken as it is."""
    folder = run_directory.run_directory(config)
    run_directory.require_free(folder, config)
    yield Finding("run directory", "ok", f"{folder} {'is a run to resume' if folder.exists() else 'is free'}")


def shared(config: Run, world: World) -> Iterator[Finding]:
    """Files flushed and renamed where runs go: every rank sees all ranks' files, and a lock keeps others out."""
    parent, held = home(config), list[Lock]()
    folder = world.from_first(lambda: _scratch(parent))
    try:
        mine = _fault_in_writing(folder / f"{world.rank}.txt")
        absent = [] if any(world.gather(mine)) else _unseen(folder, world.size)
        world.from_first(lambda: held.append(Lock(folder)))
        hole = _hole_in_lock(folder / LOCK)
        world.barrier()
    finally:
        for lock in held:
            lock.release()
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    advice = "name a folder that all nodes share and may write to: --run-dir"
    text = f"{parent}: written, flushed, renamed, seen by {world.size} rank(s)"
    if absent:
        text = f"{socket.gethostname()} does not see in {parent} what ranks {absent} wrote"
    yield Finding("shared folder", "fail" if mine or absent else "ok", mine or text, advice)
    advice = "only owner.json keeps a second run out of a directory, which takes some seconds"
    yield Finding("locks", "warn" if hole else "ok", hole or f"{parent}: kept out of what another holds", advice)


def _scratch(parent: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".dist_prune-check-", dir=parent))
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be written ({error.strerror}): see --run-dir") from error


def _fault_in_writing(path: Path) -> str:
    try:
        write_text(path, socket.gethostname())
    except (OSError, CheckpointError) as error:
        return f"{socket.gethostname()} cannot write: {error}"
    return ""


def _unseen(folder: Path, size: int) -> list[int]:
    """Ranks whose file does not show up here."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        names = {path.name for path in folder.iterdir()}  # listed again, as network file systems keep old answers
        absent = [rank for rank in range(size) if f"{rank}.txt" not in names]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.1)


def _hole_in_lock(path: Path) -> str:
    """Why another process would get in, though this run holds the lock; nothing if it would not."""
    words = [sys.executable, "-c", TRY_LOCK, str(path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return f"{path.parent.parent}: a process got what another holds"
    said = done.stderr.strip().splitlines()[-1:]
    return "" if "BlockingIOError" in done.stderr else f"{path.parent.parent}: no record locks ({' '.join(said)})"


def home(config: Run) -> Path:
    """The folder that holds run directories, or that will hold the one that does."""
    return existing(run_directory.run_directory(config).parent)


def existing(folder: Path) -> Path:
    """The folder, or the innermost around it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
