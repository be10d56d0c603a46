import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_prune import checkpoint
from dist_prune.checkpoint import CheckpointError
from dist_prune.config import Run
from dist_prune.recipes import RECIPES

RUN = RECIPES["digits"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), checkpoint.replacing(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_newest_intact_checkpoint_wins_and_damage_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "tensor": torch.ones(3)}, keep=3)
    newest = tmp_path / "00000003.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    state, problems = checkpoint.newest(tmp_path)
    assert state is not None and state["step"] == 2
    assert len(problems) == 1 and "00000003.pt: its SHA-256 differs" in problems[0]


@pytest.mark.parametrize("harm", ["truncate", "empty", "unsealed"])
def test_unfinished_checkpoints_are_passed_over(tmp_path: Path, harm: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step})
    path = tmp_path / "00000002.pt"
    if harm == "unsealed":
        (tmp_path / "00000002.pt.sha256").unlink()
    else:
        path.write_bytes(b"" if harm == "empty" else path.read_bytes()[:-100])
    state, problems = checkpoint.newest(tmp_path)
    assert state == {"step": 1}
    assert len(problems) == 1


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["00000003.pt", "00000004.pt"]
    assert len(list(tmp_path.iterdir())) == 4


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == (None, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        checkpoint.save(tmp_path, 1, {"small": torch.zeros(100)})
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
            checkpoint.save(tmp_path, 2, {"large": torch.zeros(1_000_000)})
        state, problems = checkpoint.newest(tmp_path)
        assert state is not None and "small" in state
        assert not problems
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_existing_run_is_refused_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = replace(RUN, run_dir=folder)
    checkpoint.require_free(folder, config)
    checkpoint.claim(folder, config, {})
    (folder / "precious").write_text("night's work")
    with pytest.raises(CheckpointError, match="holds a run: choose another name, or continue it with --resume"):
        checkpoint.require_free(folder, config)
    checkpoint.require_free(folder, replace(config, resume=True))
    checkpoint.claim(folder, replace(config, resume=True), {})
    assert (folder / "precious").exists()
    checkpoint.require_free(folder, replace(config, overwrite=True))
    checkpoint.claim(folder, replace(config, overwrite=True), {})
    assert not (folder / "precious").exists()
    assert (folder / "config.json").exists()


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    for config in (RUN, replace(RUN, overwrite=True), replace(RUN, resume=True, run_dir=tmp_path)):
        with pytest.raises(CheckpointError, match="holds files that are not of a run"):
            checkpoint.require_free(tmp_path, config)


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    config = replace(RUN, run_dir=tmp_path)
    checkpoint.claim(tmp_path, config, {})
    other: Run = replace(config, resume=True, seed=5, tuning=replace(RUN.tuning, lr=0.5))
    with pytest.raises(CheckpointError, match=r"other settings: seed: 0 → 5; tuning\.lr: 0\.02 → 0\.5"):
        checkpoint.require_free(tmp_path, other)
    checkpoint.require_free(tmp_path, replace(config, resume=True, device="cpu", timeout=5.0))


def test_code_that_was_there_before_the_run_is_neither_refused_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "COMMIT").write_text("abc")
    run = Run(run_dir=tmp_path, overwrite=True)
    checkpoint.require_free(tmp_path, replace(run, overwrite=False))
    checkpoint.claim(tmp_path, run, {})
    (tmp_path / "checkpoints").mkdir()
    checkpoint.claim(tmp_path, run, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "config.json"]
