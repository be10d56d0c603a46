"""How much memory a process may still take: of its GPU, or of its host and of the groups that limit it there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUPS_OF_THIS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62


def free_memory(device: torch.device) -> int:
    """Bytes that this process could take now, if no other did."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for later
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([_available(), *_left_in_groups()])


def _available() -> int:
    """Of the host, without swapping; see proc(5)."""
    for line in MEMINFO.read_bytes().decode().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(amount.split()[0])
    return UNLIMITED


def _left_in_groups() -> Iterator[int]:
    """In each control group that this process is in, of both versions; a scheduler limits one above."""
    try:
        lines = GROUPS_OF_THIS.read_bytes().decode().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            if not controllers:
                yield _left(GROUPS / group, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                folder = GROUPS / "memory" / group
                yield _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(group: Path, limit: str, usage: str, files: str) -> int:
    """Below a group's limit; files that were only read lie in its memory, but give way."""
    try:
        most, used = (group / limit).read_bytes().decode().strip(), int((group / usage).read_bytes())
        stat = dict(line.split() for line in (group / "memory.stat").read_bytes().decode().splitlines())
    except (OSError, ValueError):  # no such controller here, as in the root
        return UNLIMITED
    return UNLIMITED if most == "max" else max(0, int(most) - used + int(stat.get(files, 0)))
