"""Several budgets in one job: interrupted in the middle of one member, the others stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import shared_commands
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import Jobs

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
SHARES = (0.6, 0.8)
FAMILY: dict[str, object] = {"method": "fisher", "ranks": "budget:macs=0.8,0.6", "width": "off", "epochs": 8}


def hashes(folder: Path) -> list[str]:
    return [json.loads((folder / f"macs={s}" / "result.json").read_text())["parameter_hash"] for s in SHARES]


@pytest.fixture(scope="module")
def expected(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a family on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "family"
    words = ["digits", *jobs.flags(**FAMILY), "--run-dir", folder]
    shared_commands().succeed(*words, ranks=2, deadline_s=400)
    return hashes(folder)


@pytest.mark.parametrize("share", SHARES)
def test_a_family_that_is_warned_in_one_member_is_queued_again_and_goes_on_there(
    jobs: Jobs, expected: list[str], share: float
) -> None:
    name = f"family {share}"
    job, folder = jobs.submit(name, "--nodelist=n1", **FAMILY), jobs.home / name
    log = folder / f"macs={share}" / "log.txt"
    wait_for(lambda: log.is_file() and "epoch 3/" in log.read_text(), 500, f"{share} tuning")
    jobs.cluster.run("scancel", "--signal=USR2", job)
    assert jobs.cluster.finish(job, 500) == "COMPLETED", jobs.log(name)
    assert jobs.cluster.show(job)["Restarts"] == "1"
    said = jobs.log(name)
    assert "stopped: asked to stop by SIGUSR2; saved" in said
    assert (said.count("── statistics"), said.count("epoch 8/8")) == (1, 2), "what was done was done again"
    assert hashes(folder) == expected
    page = (folder / "report.html").read_text()
    assert all(f"macs={each}/report.html" in page for each in SHARES)
    assert not jobs.cluster.processes_of(job)
