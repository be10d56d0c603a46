"""Jobs of several parts (budgets, rounds, tried plans), interrupted in the middle of one: none is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.commands import shared_commands
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import Jobs
from tests.slurm.test_interruptions import preempt

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
SHARES = (0.6, 0.8)


@dataclass(frozen=True)
class Kind:
    """Flags of a run of several parts, the folders of its results, and parts that its log names, each once."""

    flags: Mapping[str, object]
    folders: tuple[str, ...]
    parts: tuple[str, ...]

    def hashes(self, run: Path) -> list[str]:
        return [
            json.loads((run / folder / "result.json").read_text())["parameter_hash"] for folder in self.folders
        ]


KINDS = {
    "family": Kind(
        {"method": "fisher", "ranks": "budget:macs=0.8,0.6", "width": "off", "epochs": 8},
        tuple(f"macs={share}" for share in SHARES),
        ("── statistics",),
    ),
    "rounds": Kind(
        {"ranks": "uniform:0.4", "step": 0.7, "tune-epochs": 8, "epochs": 0},
        (".",),
        ("── statistics", "── projection", "── round 2: projection", "── round 3: projection"),
    ),
    "search": Kind(
        {"method": "fisher", "ranks": "budget:params=0.4", "sites": "*", "width": "off", "search": 96, "epochs": 0}
        | {"correct": "regression", "calibrate-images": 1400},
        (".",),
        ("── statistics", "── correction"),  # bases and losses follow from the statistics, and are made again
    ),
}


@pytest.fixture(scope="module")
def expected(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """By kind, the results on two ranks that nothing happened to."""

    @cache
    def hashes(kind: str) -> list[str]:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        words = ["digits", *jobs.flags(**KINDS[kind].flags), "--run-dir", folder]
        shared_commands().succeed(*words, ranks=2, deadline_s=400)
        return KINDS[kind].hashes(folder)

    return hashes


@pytest.mark.parametrize(
    ("kind", "where", "text", "how"),
    [
        ("family", "macs=0.6", "epoch 3/", "warned"),
        ("family", "macs=0.8", "epoch 3/", "preempted"),
        ("rounds", ".", "── round 2: training", "warned"),
        ("rounds", ".", "── round 1: training", "preempted"),
        ("search", ".", "── search", "warned"),
    ],
)
def test_a_job_that_is_interrupted_in_one_part_goes_on_there_and_ends_the_same(
    jobs: Jobs, expected: Callable[[str], list[str]], kind: str, where: str, text: str, how: str
) -> None:
    undisturbed, name = expected(kind), f"{kind} {how}"
    job, folder = jobs.submit(name, "--nodelist=n1", **KINDS[kind].flags), jobs.home / name
    log = folder / where / "log.txt"
    wait_for(lambda: log.is_file() and text in log.read_text(), 500, f"{text} of {name}")
    if how == "warned":
        jobs.cluster.run("scancel", "--signal=USR2", job)
    else:
        preempt(jobs, "n1")
    assert jobs.cluster.finish(job, 500) == "COMPLETED", jobs.log(name)
    assert jobs.cluster.show(job)["Restarts"] == "1"
    said = jobs.log(name)
    assert f"stopped: asked to stop by {'SIGUSR2' if how == 'warned' else 'SIGTERM'}; saved" in said
    assert [said.count(f"{part}\n") for part in KINDS[kind].parts] == [1] * len(KINDS[kind].parts), said
    assert kind != "search" or "resuming after search, plan" in said
    assert KINDS[kind].hashes(folder) == undisturbed
    if kind == "family":
        page = (folder / "report.html").read_text()
        assert all(f"macs={share}/report.html" in page for share in SHARES)
    assert not jobs.cluster.processes_of(job)
