"""Whose a run's directory is, and that nobody else writes into it."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_prune.artifacts import run_directory
from dist_prune.config.recipes import RECIPES
from dist_prune.config.run import Run
from dist_prune.utils.files import CheckpointError

RUN = RECIPES["digits"]


def test_an_existing_run_is_refused_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = replace(RUN, run_dir=folder)
    run_directory.require_free(folder, config)
    run_directory.claim(folder, config, {}).release()
    (folder / "precious").write_text("night's work")
    with pytest.raises(CheckpointError, match="holds a run: choose another name, or continue it with --resume"):
        run_directory.require_free(folder, config)
    run_directory.require_free(folder, replace(config, resume=True))
    run_directory.claim(folder, replace(config, resume=True), {}).release()
    assert (folder / "precious").exists()
    run_directory.require_free(folder, replace(config, overwrite=True))
    run_directory.claim(folder, replace(config, overwrite=True), {}).release()
    assert not (folder / "precious").exists()
    assert (folder / "config.json").exists()


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    for config in (RUN, replace(RUN, overwrite=True), replace(RUN, resume=True, run_dir=tmp_path)):
        with pytest.raises(CheckpointError, match="holds files that are not of a run"):
            run_directory.require_free(tmp_path, config)


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    config = replace(RUN, run_dir=tmp_path)
    run_directory.claim(tmp_path, config, {}).release()
    other: Run = replace(config, resume=True, seed=5, tuning=replace(RUN.tuning, lr=0.5))
    with pytest.raises(CheckpointError, match=r"other settings: seed: 0 → 5; tuning\.lr: 0\.02 → 0\.5"):
        run_directory.require_free(tmp_path, other)
    run_directory.require_free(tmp_path, replace(config, resume=True, device="cpu", timeout=5.0))


def test_code_that_was_there_before_the_run_is_neither_refused_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "COMMIT").write_text("abc")
    run = Run(run_dir=tmp_path, overwrite=True)
    run_directory.require_free(tmp_path, replace(run, overwrite=False))
    run_directory.claim(tmp_path, run, {}).release()
    (tmp_path / "checkpoints").mkdir()
    run_directory.claim(tmp_path, run, {}).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "config.json", "lock"]
