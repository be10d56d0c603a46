"""The README's first command and its Python example, run as a stranger would, in a fresh clone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.documents import ROOT, blocks, commands

STAGES = ("dense", "projected", "corrected", "distilled", "tuned")
KEYS = {*STAGES, "macs", "params", "seconds", "world_size", "seed", "method", "ranks", "parameter_hash"}
KEYS |= {"warnings"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_works_in_a_fresh_clone(tmp_path: Path) -> None:
    """What is committed, with uv installed by the command itself, its own environment and no cached weights."""
    clone, outside = tmp_path / "clone", tmp_path / "outside"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(outside)], check=True)
    hidden = (
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "UV_PROJECT_ENVIRONMENT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    )
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    environ |= {"PATH": f"{outside / 'bin'}:{environ['PATH']}", "DIST_PRUNE_CACHE": str(tmp_path / "cache")}
    session = SimpleNamespace(cwd=clone, env=environ)
    readme = (clone / "README.md").read_text()

    said = succeed(session, "bash", "-c", commands(readme)[0])
    (folder,) = clone.glob("runs/digits-*")
    check_result(folder)
    assert f"written to {folder.relative_to(clone)}" in said

    (example,) = (block for block in blocks(readme, "python") if '"runs/first"' in block)
    succeed(session, "uv", "run", "python", "-c", example.replace('"runs/first"', repr(str(folder))))


def succeed(session: SimpleNamespace, *words: str) -> str:
    done = subprocess.run(words, cwd=session.cwd, env=session.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_result(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == KEYS
    assert (result["world_size"], result["seed"], result["method"]) == (2, 0, "pca")
    for stage in ("dense", "projected", "tuned"):
        assert result[stage]["images"] == 355
        assert result[stage]["top1"] > 90
    assert result["macs"]["compressed"] < 0.6 * result["macs"]["dense"]
    assert result["params"]["compressed"] < 0.6 * result["params"]["dense"]
