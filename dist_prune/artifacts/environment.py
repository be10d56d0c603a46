"""Versions, commit, machine and command: all that is needed to run it again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_prune.utils.text import read_text

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "numpy",
    "safetensors",
    "tensorboard",
)


def environment() -> dict[str, Any]:
    """Versions, commit, machine and command: all that is needed to run it again."""
    return {
        "command": shlex.join(sys.argv),
        "start": start_of(sys.argv, os.environ),
        "launch": launch_of(os.environ),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


def start_of(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The command that starts as many processes with these words, through torchrun or srun where they did."""
    program = [*argv] if Path(argv[0]).suffix == ".py" else ["--no-python", Path(argv[0]).name, *argv[1:]]
    if "TORCHELASTIC_RUN_ID" in environ:
        size, here = int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"]))
        place = ["--standalone"] if here == size else ["--nnodes", str(size // here), "--rdzv-backend", "c10d"]
        place += [] if here == size else ["--rdzv-endpoint", "FIRST_NODE"]
        return shlex.join(["torchrun", *place, "--nproc-per-node", str(here), *program])
    alone = ["python", *argv] if program == [*argv] else program[1:]
    if "SLURM_STEP_NUM_TASKS" in environ:
        nodes, tasks = environ.get("SLURM_STEP_NUM_NODES", "1"), environ["SLURM_STEP_NUM_TASKS"]
        return shlex.join(["srun", "--nodes", nodes, "--ntasks", tasks, *alone])
    return shlex.join(alone)


def launch_of(environ: Mapping[str, str]) -> str:
    """What torchrun or SLURM calls this job, the same after a restart; empty without them."""
    torchrun, slurm = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("SLURM_JOB_ID", "")
    return " ".join(f"{name} {value}" for name, value in (("slurm", slurm), ("torchrun", torchrun)) if value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, with `+` if files differ from it; None outside a repository.

    A snapshot is no repository, and may lie within another: the commit was noted beside it.
    """
    here = Path(__file__).parents[1]
    noted = here.with_name("COMMIT")
    if noted.is_file():
        return read_text(noted).strip()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, encoding="utf-8", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
