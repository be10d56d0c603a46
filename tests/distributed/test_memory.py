from pathlib import Path

import pytest
import torch

from dist_prune.distributed import memory
from dist_prune.distributed.memory import free_memory
from dist_prune.distributed.world import World
from tests.ranks import run_ranks

CPU = torch.device("cpu")
GIB = 2**30


def group(folder: Path, limit: str, used: int, files: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 64 GiB free, whose processes are in the group /job/step."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {2**27} kB\nMemAvailable: {2**26} kB\n")
    (tmp_path / "self").write_text("0::/job/step\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS_OF_THIS", tmp_path / "self")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    return tmp_path


def test_without_limits_it_is_what_the_host_has_free(host: Path) -> None:
    assert free_memory(CPU) == 64 * GIB
    group(host / "groups/job/step", "max", 5 * GIB, 0)
    assert free_memory(CPU) == 64 * GIB


def test_the_limit_of_a_group_above_counts_and_files_in_its_memory_do_not(host: Path) -> None:
    group(host / "groups/job/step", "max", 1 * GIB, 0)
    group(host / "groups/job", str(16 * GIB), 10 * GIB, 2 * GIB)
    assert free_memory(CPU) == 8 * GIB


def test_the_first_version_of_control_groups_counts(host: Path) -> None:
    (host / "self").write_text("7:cpu,cpuacct:/job/step\n4:memory:/job/step\n")
    group(host / "groups/memory/job/step", str(4 * GIB), 3 * GIB, 0, version=1)
    assert free_memory(CPU) == 1 * GIB


def test_this_machine_has_some_and_not_more_than_there_is() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < free_memory(CPU) <= 1024 * int(total.split()[1])


def share(world: World) -> int:
    return world.free_memory()


def test_ranks_of_a_host_share_it_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = run_ranks(share, 3)
    assert len({*shares}) == 1
    assert 0 < shares[0] <= free_memory(CPU) // 2, "a third, with room for what changes meanwhile"
