"""Without SLURM these tests are skipped, and say why; where it is required they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("required", "code", "message"), [("", 0, "1 skipped"), ("1", 1, "REQUIRE_SLURM is set, and")]
)
def test_a_machine_without_slurm(tmp_path: Path, required: str, code: int, message: str) -> None:
    words = [
        "tests/slurm/test_script.py",
        "-k",
        "salloc",
        "-m",
        "slow or not slow",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/t",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=os.environ | {"PATH": str(tmp_path), "REQUIRE_SLURM": required},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert message in done.stdout
    assert "not installed: apt-get install slurm-wlm" in done.stdout
