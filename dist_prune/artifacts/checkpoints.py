"""Checkpoints of a run: numbered, checksummed; each rank writes its own part, the common one comes last."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dist_prune.distributed.world import World
from dist_prune.utils.files import CheckpointError, checksum, replacing, require_intact, seal, seal_of

SCHEMA = 8  # schema of checkpoints; a reader of one does not understand another


MIDDLE = "-mid"


class SchemaError(CheckpointError):
    """A checkpoint that another version of this program wrote."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, in plain types and tensors: what all ranks have in `common`, and each one's `own`.

    `whole`: no pass over the images is in its middle, so that another number of ranks can resume here.
    """

    common: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


def save(folder: Path, snapshot: Snapshot, world: World, keep: int = 2) -> Path:
    """Write the next checkpoint: every rank its own part, then rank 0 the common one; its checksum makes it valid.

    The newest `keep` stay, and the newest whole one. They are numbered: clocks may jump.

    Raises:
        CheckpointError: on every rank, if one could not write; see `replacing`. The checkpoints before stay.
    """
    number = world.from_first(lambda: max([0, *map(_number_of, _checkpoints(folder))]) + 1)
    parts = _all(world, lambda: _write(_part(folder, number, world.rank), snapshot.own))
    path = folder / f"{number:08d}{'' if snapshot.whole else MIDDLE}.pt"
    content = {"schema": SCHEMA, "parts": parts, "whole": snapshot.whole, "common": snapshot.common}

    def finish() -> None:
        seal(path, _write(path, content))
        _forget_old(folder, keep)

    world.from_first(finish)
    return path


def newest(folder: Path, world: World, whole: bool = False) -> tuple[Snapshot | None, list[str]]:
    """The newest intact checkpoint, or None; and what is wrong with newer ones, which are renamed `….damaged`.

    What was left by another number of ranks comes without anyone's own part.

    Args:
        folder: of the checkpoints.
        world: all ranks get the same one.
        whole: only those that another number of ranks can resume from.

    Raises:
        SchemaError: the newest one was written by another version of this program.
    """
    problems: list[str] = []
    for path in reversed(world.from_first(lambda: _checkpoints(folder))):
        if whole and path.stem.endswith(MIDDLE):
            continue
        try:
            found, problem = _read(path, world), ""
        except SchemaError:
            raise
        except CheckpointError as error:
            found, problem = None, str(error)
        if not any(text := world.gather(problem)):
            return found, problems
        problems.append(next(filter(None, text)))
        world.from_first(lambda path=path: _set_aside(path))  # type: ignore[misc]
    return None, problems


def _read(path: Path, world: World) -> Snapshot:
    require_intact(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("schema", 1) != SCHEMA:
        raise SchemaError(
            f"{path} has schema {content.get('schema', 1)}, this version of dist_prune reads {SCHEMA}: "
            f"finish the run with the version that began it (see {path.parent.parent / 'config.json'}), "
            f"or start over with --overwrite"
        )
    snapshot = Snapshot(content["common"], {}, content["whole"])
    if len(content["parts"]) != world.size:
        return snapshot
    part = _part(path.parent, _number_of(path), world.rank)
    if not part.is_file() or checksum(part) != content["parts"][world.rank]:
        raise CheckpointError(f"{part}: rank {world.rank}'s part is absent or damaged")
    return replace(snapshot, own=torch.load(part, map_location="cpu", weights_only=True))


def _all(world: World, write: Callable[[], str]) -> list[str]:
    """The results of all ranks, in their order; if one fails, all raise its error."""
    try:
        outcome = (write(), "")
    except CheckpointError as error:
        outcome = ("", str(error))
    outcomes = world.gather(outcome)
    if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]:
        raise CheckpointError(failed[0])
    return [result for result, _ in outcomes]


def _write(path: Path, content: dict[str, Any]) -> str:
    """Write atomically; the file's checksum."""
    with replacing(path) as aside:
        torch.save(content, aside)
        return checksum(aside)


def _part(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number:08d}.rank{rank}.pt"


def _parts_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{_number_of(path):08d}.rank*.pt"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*.pt") if re.fullmatch(rf"\d{{8}}({MIDDLE})?", p.stem)), key=_number_of)


def _number_of(path: Path) -> int:
    return int(path.name[:8])


def _forget_old(folder: Path, keep: int) -> None:
    found = _checkpoints(folder)
    kept = {*found[-keep:], *[p for p in found if not p.stem.endswith(MIDDLE)][-1:]}
    for old in (path for path in found if path not in kept):
        for path in [seal_of(old), old, *_parts_of(old)]:
            path.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, all ranks' parts with it: whatever can be recovered needs them."""
    for each in [*_parts_of(path), path]:
        each.replace(each.with_name(each.name + ".damaged"))
    seal_of(path).unlink(missing_ok=True)
