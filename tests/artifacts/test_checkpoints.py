import gc
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_prune.artifacts import checkpoints
from dist_prune.artifacts.checkpoints import SchemaError, Snapshot
from dist_prune.distributed.world import World
from dist_prune.utils import files
from dist_prune.utils.files import CheckpointError
from tests.ranks import run_ranks


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), files.replacing(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_content_is_on_disk_before_its_name_and_the_name_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    flush, rename = os.fsync, Path.rename

    def flushed(file: int) -> None:
        happened.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        flush(file)

    def renamed(path: Path, to: Path) -> None:
        happened.append(f"→ {to}")
        rename(path, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    files.write_text(tmp_path / "file", "content")
    aside = f"{tmp_path}/.file.{os.getpid()}"
    assert happened == [aside, f"→ {tmp_path}/file", str(tmp_path)]


def save(folder: Path, world: World, step: int, whole: bool = True, keep: int = 2, **content: Any) -> Path:
    return checkpoints.save(folder, Snapshot({"step": step} | content, {"rank": world.rank}, whole), world, keep)


def test_the_newest_intact_checkpoint_wins_and_damage_is_told(tmp_path: Path, world: World) -> None:
    for step in (1, 2, 3):
        save(tmp_path, world, step, tensor=torch.ones(3), keep=3)
    newest = tmp_path / "00000003.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    found, problems = checkpoints.newest(tmp_path, world)
    assert found is not None and found.common["step"] == 2
    assert len(problems) == 1 and "00000003.pt: its SHA-256 differs" in problems[0]
    assert (tmp_path / "00000003.pt.damaged").read_bytes() == damaged


@pytest.mark.parametrize("harm", ["truncate", "empty", "unsealed", "part", "no part"])
def test_unfinished_checkpoints_are_passed_over(tmp_path: Path, world: World, harm: str) -> None:
    for step in (1, 2):
        save(tmp_path, world, step)
    path, part = tmp_path / "00000002.pt", tmp_path / "00000002.rank0.pt"
    if harm == "unsealed":
        (tmp_path / "00000002.pt.sha256").unlink()
    elif harm == "no part":
        part.unlink()
    elif harm == "part":
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    else:
        path.write_bytes(b"" if harm == "empty" else path.read_bytes()[:-100])
    found, problems = checkpoints.newest(tmp_path, world)
    assert found == Snapshot({"step": 1}, {"rank": 0})
    assert len(problems) == 1


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(tmp_path: Path, world: World) -> None:
    for step in (1, 2):
        save(tmp_path, world, step)
    (tmp_path / "00000002.pt").write_bytes(b"")
    checkpoints.newest(tmp_path, world)
    damaged = ["00000002.pt.damaged", "00000002.rank0.pt.damaged"]
    assert sorted(p.name for p in tmp_path.glob("00000002*")) == damaged, "nothing of it is taken for another"
    save(tmp_path, world, 2)
    assert sorted(p.name for p in tmp_path.glob("0000000?.pt")) == ["00000001.pt", "00000002.pt"]
    for step in (3, 4, 5):
        save(tmp_path, world, step)
    assert sorted(p.name for p in tmp_path.glob("00000002*")) == damaged, "and nothing of it is removed"


def test_another_schema_is_refused_and_nothing_begins_anew(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SCHEMA", 1)
    save(tmp_path, world, 1)
    monkeypatch.undo()
    with pytest.raises(
        SchemaError, match=f"has schema 1, this version of dist_prune reads {checkpoints.SCHEMA}: finish"
    ):
        checkpoints.newest(tmp_path, world)
    assert (tmp_path / "00000001.pt").exists()


def test_checkpoints_from_before_there_were_schemas_are_refused(tmp_path: Path, world: World) -> None:
    torch.save({"epoch": 3}, tmp_path / "00000003.pt")
    files.seal(tmp_path / "00000003.pt")
    with pytest.raises(SchemaError, match="has schema 1"):
        checkpoints.newest(tmp_path, world)


def test_old_checkpoints_go_but_for_the_newest_that_is_whole(tmp_path: Path, world: World) -> None:
    for step in range(1, 5):
        save(tmp_path, world, step, whole=step < 3)
    names = sorted(p.name for p in tmp_path.glob("*.pt"))
    assert [n for n in names if "rank" not in n] == ["00000002.pt", "00000003-mid.pt", "00000004-mid.pt"]
    assert [n for n in names if "rank" in n] == [f"0000000{n}.rank0.pt" for n in (2, 3, 4)]
    assert len(list(tmp_path.iterdir())) == 9
    found, _ = checkpoints.newest(tmp_path, world)
    whole, _ = checkpoints.newest(tmp_path, world, whole=True)
    assert found is not None and whole is not None
    assert (found.common["step"], whole.common["step"]) == (4, 2)


def test_clocks_do_not_decide_what_is_newest(tmp_path: Path, world: World) -> None:
    for step in (1, 2):
        os.utime(save(tmp_path, world, step), (1e9 - step, 1e9 - step))
    found, _ = checkpoints.newest(tmp_path, world)
    assert found is not None and found.common["step"] == 2


def test_no_checkpoint_is_no_error(tmp_path: Path, world: World) -> None:
    assert checkpoints.newest(tmp_path / "absent", world) == (None, [])


def saved_and_found(world: World, folder: str, harm: str) -> tuple[object, list[str]]:
    for step in (1, 2):
        save(Path(folder), world, step)
    if harm and world.is_first:
        (Path(folder) / harm).write_bytes(b"")
    world.barrier()
    found, problems = checkpoints.newest(Path(folder), world)
    assert found is not None
    return (found.common["step"], found.own["rank"]), problems


def test_every_rank_finds_its_own_part_and_all_turn_to_the_same_checkpoint(tmp_path: Path) -> None:
    whole = run_ranks(saved_and_found, 3, str(tmp_path / "a"), "")
    assert [found for found, _ in whole] == [(2, 0), (2, 1), (2, 2)]
    damaged = run_ranks(saved_and_found, 3, str(tmp_path / "b"), "00000002.rank1.pt")
    assert [found for found, _ in damaged] == [(1, 0), (1, 1), (1, 2)]
    assert {problem for _, problems in damaged for problem in problems} == {
        f"{tmp_path}/b/00000002.rank1.pt: rank 1's part is absent or damaged"
    }


def test_what_another_number_of_ranks_left_comes_without_their_own_parts(tmp_path: Path, world: World) -> None:
    run_ranks(saved_and_found, 2, str(tmp_path), "")
    found, _ = checkpoints.newest(tmp_path, world)
    assert found == Snapshot({"step": 2}, {})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path, world: World) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        save(tmp_path, world, 1, small=torch.zeros(100))
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
            save(tmp_path, world, 2, large=torch.zeros(1_000_000))
        found, problems = checkpoints.newest(tmp_path, world)
        assert found is not None and "small" in found.common
        assert not problems
    finally:
        gc.collect()  # torch's writer, which an exception may still hold
        subprocess.run(["umount", str(tmp_path)], check=True)
