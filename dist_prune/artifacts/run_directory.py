"""A run's directory: its name, which run it belongs to, and whether a restarted run makes progress."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_prune.artifacts.lock import LOCK, OWNER, Lock
from dist_prune.config.run import Run, to_dict
from dist_prune.distributed.preemption import NoProgressError
from dist_prune.utils.files import CheckpointError, write_text
from dist_prune.utils.text import read_text

CONFIG, ATTEMPTS = "config.json", "attempts.json"
SNAPSHOT = "code"  # in a run's directory, the code that a cluster job runs
IRRELEVANT = {
    "resume",
    "reshard",
    "until",
    "overwrite",
    "run_dir",
    "dry_run",
    "save_recipe",
    "device",
    "timeout",
    "skip_check",
    "stage",
    "threads",
    "save_minutes",
    "keep_checkpoints",
}
PER_RANK = {"batch_size", "distill_batch_size"}  # what --reshard may change
PATIENCE_S = 20.0  # for which a restarted run waits for processes of its earlier start to end
RESTARTS = 3  # in a row that may begin at the same place


def run_directory(config: Run, launch: str = "", home: Path = Path("runs")) -> Path:
    """`--run-dir`; without it the directory that an earlier start of this `launch` made, or a new name."""
    if config.run_dir is not None:
        return config.run_dir
    if launch and (earlier := [path.parent for path in home.glob(f"*/{CONFIG}") if _launch_of(path) == launch]):
        return max(earlier)
    name = f"{config.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for n in itertools.count() if not (p := home / (f"{name}-{n}" if n else name)).exists())


def taken_up(config: Run, folder: Path, launch: str, restarts: int) -> Run:
    """The settings of a run that torchrun or SLURM started again: it resumes what it had begun."""
    if restarts and _launch_of(folder / CONFIG) == launch:
        return replace(config, resume=True, overwrite=False, run_dir=folder)
    return config


def _launch_of(path: Path) -> str | None:
    try:
        found = json.loads(read_text(path))["environment"]["launch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def require_free(folder: Path, config: Run) -> None:
    """Refuse to mix two runs, and to remove what is not a run.

    Raises:
        CheckpointError: the folder holds something and the flags do not say what to do, or say it wrongly.
    """
    if not folder.exists() or (folder.is_dir() and not _belongings(folder)):
        return
    if not is_known(folder):
        raise CheckpointError(f"--run-dir {folder} holds files that are not of a run; choose another name")
    if config.overwrite:
        return
    if not config.resume:
        raise CheckpointError(
            f"--run-dir {folder} holds a run: choose another name, or continue it with --resume, "
            f"or replace it with --overwrite"
        )
    changed = changes(json.loads(read_text(folder / CONFIG))["run"], to_dict(config))
    if config.reshard:
        changed = {name: text for name, text in changed.items() if name.rpartition(".")[2] not in PER_RANK}
    if changed:
        hint = "; --reshard allows this" if all(name.rpartition(".")[2] in PER_RANK for name in changed) else ""
        text = "; ".join(changed.values())
        raise CheckpointError(f"--resume: {folder} was started with other settings: {text}{hint}")


def is_known(folder: Path) -> bool:
    """Whether a run was begun here: all that can be checked before was in order."""
    return (folder / CONFIG).is_file()


def _belongings(folder: Path) -> list[Path]:
    """What a run left, but for what is there before it writes anything, or after it was killed at once."""
    return [p for p in folder.iterdir() if p.name not in (LOCK, OWNER, SNAPSHOT) and not _is_remains(p)]


def _is_remains(path: Path) -> bool:
    """A file that `replacing` had not finished."""
    return re.fullmatch(r"\..+\.\d+", path.name) is not None


def changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> dict[str, str]:
    """Settings that differ and that change what a run computes, name → `name: before → now`."""
    found: dict[str, str] = {}
    for name in sorted({*before, *now} - IRRELEVANT):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{where}{name}.")
        elif old != new:
            found[where + name] = f"{where}{name}: {old} → {new}"
    return found


def claim(folder: Path, config: Run, environment: dict[str, Any]) -> Lock:
    """Make the folder this run's: an overwritten run goes, config.json is written.

    Raises:
        CheckpointError: another process works in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, PATIENCE_S if config.resume else 0.0)
        for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
            if _is_remains(path):
                path.unlink()
        if config.overwrite:
            _empty(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error.strerror or error})") from error
    known = config.resume and is_known(folder)
    if not known or config.reshard:
        content = {"run": to_dict(config), "environment": environment}
        write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")
    return lock


def _empty(folder: Path) -> None:
    """Remove a run; config.json, which shows that it is one, last."""
    belongings = sorted(_belongings(folder), key=lambda path: path.name == CONFIG)
    for path in belongings:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def require_progress(folder: Path, place: str, restarts: int) -> None:
    """Count the restarts that begin at the same `place`.

    Raises:
        NoProgressError: three in a row did; starting the run by hand begins a new count.
    """
    path = folder / ATTEMPTS
    before = json.loads(read_text(path)) if path.is_file() else {}
    count = before.get("count", 0) + 1 if restarts and before.get("place") == place else min(restarts, 1)
    write_text(path, json.dumps({"place": place, "count": count}) + "\n")
    if count > RESTARTS:
        raise NoProgressError(
            f"{folder}: {RESTARTS} restarts in a row began at the same place ({place}) and got no further; "
            f"see log.txt and the messages above, then start it with --resume"
        )
