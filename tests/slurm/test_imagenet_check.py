"""`sbatch slurm/imagenet_check.sh DATA` on a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.pictures import picture, save
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import Jobs

SCRIPT = ROOT / "slurm" / "imagenet_check.sh"
pytestmark = pytest.mark.timeout(200)


@pytest.mark.slow
def test_an_array_checks_slices_and_its_last_task_reports(jobs: Jobs, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in "abc":
            save(tmp_path / "images" / part / label / "x.jpg", picture(30, 30))
    bad = tmp_path / "images" / "train" / "b" / "x.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    words = ["--array=0-1", "--cpus-per-task=1", "--time=5", SCRIPT, tmp_path / "images"]
    job = jobs.cluster.submit(*words, cwd=tmp_path, REPORT=str(tmp_path / "report"), **jobs.environ)
    wait_for(lambda: not jobs.cluster.jobs(), 150, "the array")
    states = [jobs.cluster.state(f"{job}_{index}") for index in (0, 1)]
    text = (tmp_path / "report" / "summary.txt").read_text()
    assert "train: 3 files, 3 classes" in text and "train/b/x.jpg (truncated: truncated JPEG)" in text
    assert "FAILED" in states, "a slice with faults does not end well"


@pytest.mark.slow
def test_without_slurm_one_process_does_all(jobs: Jobs, tmp_path: Path) -> None:
    for part in ("train", "val"):
        save(tmp_path / "images" / part / "a" / "x.jpg", picture(30, 30))
    said = jobs.cluster.run("bash", SCRIPT, tmp_path / "images", REPORT=str(tmp_path / "report"), **jobs.environ)
    assert said.code == 0, said.err
    assert "no faults" in said.out
