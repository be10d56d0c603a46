"""Jobs that are interrupted: they go on where they were, to the same weights, or say that they failed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.commands import shared_commands
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import Jobs
from tests.slurm.test_sweeps import submit

pytestmark = pytest.mark.timeout(1200)
EPOCHS, MANY, LONG = 20, 100, 400
SMALL = ("--gpus-per-node", 1, "--cpus-per-task", 1, "--time", 10)


def undisturbed(jobs: Jobs, folder: Path, epochs: int) -> str:
    """The parameter hash of the same run on two ranks that nothing happened to."""
    words = ["digits", *jobs.flags(epochs=epochs), "--run-dir", folder]
    shared_commands().succeed(*words, ranks=2, deadline_s=400)
    found: str = json.loads((folder / "result.json").read_text())["parameter_hash"]
    return found


@pytest.fixture(scope="module")
def expected(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed(jobs, tmp_path_factory.mktemp("undisturbed") / "run", EPOCHS)


def started(jobs: Jobs, run: str, *sbatch: object, epochs: int = EPOCHS, **more: object) -> str:
    """A job of two ranks that is a few epochs into tuning; its number."""
    job = jobs.submit(run, *sbatch, epochs=epochs, **more)
    wait_for(lambda: is_tuning(jobs, run), 500, f"{run} tuning")
    return job


def is_tuning(jobs: Jobs, run: str) -> bool:
    path = jobs.home / f"{run}.log"
    return path.is_file() and "epoch 3/" in path.read_text()


def require_gone_on(jobs: Jobs, run: str, job: str, expected: str, starts: int = 2) -> None:
    """It ended well, in so many starts, each text in one log; with the weights expected; nothing of it is left."""
    assert jobs.cluster.finish(job, 500) == "COMPLETED", jobs.log(run)
    assert jobs.cluster.show(job)["Restarts"] == str(starts - 1)
    said = jobs.log(run)
    assert [said.count(f", start {n} on ") for n in range(1, starts + 1)] == [1] * starts
    assert said.count("── baseline") == 1, "what was done was done again"
    assert jobs.result(run)["parameter_hash"] == expected
    assert not jobs.cluster.processes_of(job)


def test_a_warning_before_the_time_limit_saves_requeues_and_goes_on(jobs: Jobs, expected: str) -> None:
    job = started(jobs, "warned", "--nodelist=n1")
    jobs.cluster.run("scancel", "--signal=USR2", job)
    require_gone_on(jobs, "warned", job, expected)
    assert "stopped: asked to stop by SIGUSR2; saved" in jobs.log("warned")


@pytest.mark.slow
def test_a_warning_while_ranks_still_start_has_the_job_queued_again(jobs: Jobs) -> None:
    job = jobs.submit("early", "--nodelist=n1", gpus=1)
    wait_for(
        lambda: any(b"launch/local.py" in command_of(pid) for pid in jobs.cluster.processes_of(job)), 100, "a rank"
    )
    jobs.cluster.run("scancel", "--signal=USR2", job)
    assert jobs.cluster.finish(job, 500) == "COMPLETED", jobs.log("early")
    assert jobs.cluster.show(job)["Restarts"] == "1"
    assert "ranks ended with status 140: queued again" in jobs.log("early")


@pytest.mark.slow
def test_a_warning_while_a_sweeps_ranks_still_start_has_it_queued_again(jobs: Jobs) -> None:
    folder = jobs.home / "early sweep"
    said = submit(jobs, *SMALL, *jobs.flags(method="random", epochs=1, sweep_dir=folder))
    assert said.code == 0, said.err
    (job,) = [line["job"] for line in map(json.loads, (folder / "submitted.jsonl").read_text().splitlines())]
    wait_for(lambda: any(b"submitit" in command_of(pid) for pid in jobs.cluster.processes_of(job)), 100, "a rank")
    jobs.cluster.run("scancel", "--signal=USR2", job)
    assert jobs.cluster.finish(job, 500) == "COMPLETED"
    assert jobs.cluster.show(job)["Restarts"] == "1"
    assert (folder / "run" / "result.json").is_file()


def test_a_killed_rank_ends_the_job_with_a_failure_within_a_minute(jobs: Jobs) -> None:
    job = started(jobs, "killed", "--nodelist=n2")
    kill_one_rank(jobs, job)
    began = time.monotonic()
    assert jobs.cluster.finish(job) == "FAILED"
    assert time.monotonic() - began < 60
    assert jobs.cluster.show(job)["Restarts"] == "0"
    assert not jobs.cluster.processes_of(job)


def kill_one_rank(jobs: Jobs, job: str) -> None:
    ranks = [pid for pid in jobs.cluster.processes_of(job) if b"launch/local.py" in command_of(pid)]
    assert len(ranks) >= 2
    os.kill(max(ranks), signal.SIGKILL)


def command_of(pid: int) -> bytes:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b" ".join(words) if b"srun" not in words[0] and b"bash" not in words[0] else b""


@pytest.mark.slow
def test_with_retries_a_killed_rank_costs_a_restart_only(jobs: Jobs, expected: str) -> None:
    job = started(jobs, "retried", "--nodelist=n2", environ={"RETRIES": "1"})
    kill_one_rank(jobs, job)
    require_gone_on(jobs, "retried", job, expected)


@pytest.mark.slow
def test_a_job_of_a_higher_partition_preempts_it_and_it_goes_on(jobs: Jobs, expected: str) -> None:
    job = started(jobs, "preempted", "--nodelist=n3")
    preempt(jobs, "n3")
    require_gone_on(jobs, "preempted", job, expected)
    assert "stopped: asked to stop by SIGTERM; saved" in jobs.log("preempted")


def preempt(jobs: Jobs, node: str) -> None:
    """A job of a partition that goes first takes the node for three seconds."""
    size = [f"--nodelist={node}", "--gpus-per-node=2", "--ntasks-per-node=2", "--time=1", "--output=none.log"]
    urgent = jobs.cluster.submit("--partition=urgent", *size, "--wrap=sleep 3", cwd=jobs.home)
    assert jobs.cluster.finish(urgent) == "COMPLETED"


@pytest.mark.slow
def test_scontrol_requeue(jobs: Jobs, expected: str) -> None:
    job = started(jobs, "requeued", "--nodelist=n4")
    jobs.cluster.run("scontrol", "requeue", job)
    require_gone_on(jobs, "requeued", job, expected)


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled_and_its_run_can_be_gone_on_with(jobs: Jobs, expected: str) -> None:
    job = started(jobs, "cancelled", "--nodelist=n1")
    jobs.cluster.run("scancel", job)
    assert jobs.cluster.finish(job) == "CANCELLED"
    wait_for(lambda: not jobs.cluster.processes_of(job), 40, "the end of its processes")
    time.sleep(5)
    assert jobs.cluster.state(job) == "CANCELLED"
    assert not (jobs.home / "cancelled" / "result.json").exists()
    again = jobs.submit("cancelled", epochs=EPOCHS)
    assert jobs.cluster.finish(again) == "COMPLETED"
    assert jobs.result("cancelled")["parameter_hash"] == expected


@pytest.mark.slow
def test_a_node_that_goes_down_in_the_middle(jobs: Jobs, expected: str) -> None:
    """Its daemon and everything on it die at once; the job waits for the node, and goes on."""
    cluster = jobs.cluster
    job = started(jobs, "down", "--nodelist=n3,n4", nodes=2, gpus=1)
    on_node = [pid for pid in cluster.processes_of(job) if b"SLURMD_NODENAME=n4\0" in environ_of(pid)]
    cluster.stop_daemon("n4", signal.SIGKILL)
    for pid in on_node:
        os.kill(pid, signal.SIGKILL)
    cluster.run("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=test")
    wait_for(lambda: cluster.state(job) in ("PENDING", "REQUEUED"), 60, "the job back in the queue")
    cluster.start_node("n4")
    cluster.ready("n4")
    require_gone_on(jobs, "down", job, expected)


def environ_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_longer_than_its_time_limit_takes_several_turns(jobs: Jobs, tmp_path: Path) -> None:
    expected = undisturbed(jobs, tmp_path / "run", LONG)
    job = jobs.submit("limited", "--time=3", "--signal=USR2@60", epochs=LONG)
    assert jobs.cluster.finish(job, 1000) == "COMPLETED", jobs.log("limited")
    restarts = int(jobs.cluster.show(job)["Restarts"])
    assert restarts >= 1
    require_gone_on(jobs, "limited", job, expected, restarts + 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweeps_run_may_reach_its_time_limit_more_than_three_times(jobs: Jobs, tmp_path: Path) -> None:
    """submitit would give up after three; its own signal handler requeues through scontrol."""
    expected = undisturbed(jobs, tmp_path / "run", MANY)
    folder, turns = tmp_path / "sweep", 5
    size = ["--gpus-per-node", 2, "--cpus-per-task", 1, "--time", 8]
    said = submit(jobs, *size, *jobs.flags(epochs=MANY, sweep_dir=folder, seed=0))
    assert said.code == 0, said.err
    lines = map(json.loads, (folder / "submitted.jsonl").read_text().splitlines())
    jobs_of = {line["task"]: line["job"] for line in lines}
    for name in [name for name in jobs_of if name.startswith("statistics")]:
        assert jobs.cluster.finish(jobs_of[name]) == "COMPLETED"
    log = folder / "run" / "log.txt"
    for turn in range(1, turns + 1):
        wait_for(lambda: epochs_of(log, jobs_of["run"], jobs) >= 3 * turn, 200, f"turn {turn}")  # noqa: B023
        jobs.cluster.run("scancel", "--signal=USR2", jobs_of["run"])
        wait_for(lambda: jobs.cluster.show(jobs_of["run"])["Restarts"] == str(turn), 60, f"requeue {turn}")  # noqa: B023
    assert jobs.cluster.finish(jobs_of["run"], 400) == "COMPLETED"
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["parameter_hash"] == expected


def epochs_of(log: Path, job: str, jobs: Jobs) -> int:
    """How many epochs the run has text; a job that waits after a requeue is let go."""
    if jobs.cluster.show(job).get("Reason") == "BeginTime":
        jobs.cluster.release(job)
    return log.read_text().count(" epoch ") if log.is_file() else 0
