"""Killed anywhere, by anything: the run that is taken up ends with the bits of one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.runs import STAGES, Bench, result_of

# Every kind of stage, and a checkpoint after every batch, step and site.
EVERYTHING: dict[str, object] = {
    "method": "hessian-local",
    "statistics_images": 24,
    "correct": "regression",
    "calibrate_images": 16,
    "distill_steps": 7,
    "distill_batch_size": 4,
    "ema": 0.9,
    "accumulate": 2,
    "save_minutes": 0,
    "eval_batch_size": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the run gives, and how long its work takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.commands.succeed(*bench.words(folder, **EVERYTHING), ranks=2)
    result = result_of(folder)
    return result, sum(result["seconds"].values())


def check(folder: Path, expected: dict[str, Any]) -> None:
    found = result_of(folder)
    assert found["parameter_hash"] == expected["parameter_hash"]
    assert [found[stage] for stage in STAGES] == [expected[stage] for stage in STAGES]


def places(folder: Path) -> list[str]:
    """Where the run was taken up, as its log says."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [line.partition("resuming after ")[2] for line in lines if "resuming after" in line]


def disturb(bench: Bench, folder: Path, seconds: float, seed: int, kills: int, **how: str) -> None:
    """Kill the run again and again, at moments drawn from the whole of its work, then let it end."""
    moment = random.Random(seed)
    for attempt in range(kills):
        (folder / "owner.json").unlink(missing_ok=True)  # is there again once all ranks have met
        done = bench.commands(
            *bench.words(folder, **EVERYTHING, resume=bool(attempt) or None),
            ranks=2,
            kill_when=f"{folder}/owner.json",
            kill_after=str(moment.uniform(0, 1.2 * seconds / kills)),
            **how,
        )
        assert all(done.codes) or (folder / "result.json").exists(), done.err
        assert done.seconds < 60
    bench.commands.succeed(*bench.words(folder, **EVERYTHING, resume=True), ranks=2)


@pytest.mark.parametrize("how", [{}, {"kill_rank": "1"}], ids=["all ranks", "one rank"])
def test_a_run_that_is_killed_ends_with_the_same_bits(
    bench: Bench, undisturbed: tuple[dict[str, Any], float], tmp_path: Path, how: dict[str, str]
) -> None:
    expected, seconds = undisturbed
    disturb(bench, tmp_path / "run", seconds, seed=1, kills=2, **how)
    check(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("how", [{}, {"kill_rank": "0"}, {"kill_rank": "1"}], ids=["all", "rank 0", "rank 1"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(
    bench: Bench, undisturbed: tuple[dict[str, Any], float], tmp_path: Path, how: dict[str, str], seed: int
) -> None:
    expected, seconds = undisturbed
    disturb(bench, tmp_path / "run", seconds, seed, kills=4, **how)
    check(tmp_path / "run", expected)
    print(places(tmp_path / "run"))


PHASES = ("statistics", "correction", "distillation", "finetune", "evaluate tuned")


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def start_torchrun(bench: Bench, folder: Path, *more: str) -> subprocess.Popen[str]:
    """The launcher, its ranks in its process group."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    return subprocess.Popen(
        [*launcher, str(ROOT / "launch" / "local.py"), *bench.words(folder, **EVERYTHING, resume=True)],
        cwd=bench.commands.home,
        env=bench.commands.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said(folder: Path, words: str) -> bool:
    return (folder / "log.txt").is_file() and words in (folder / "log.txt").read_text()


def is_over(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "phase", [PHASES[1], *(pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES if phase != PHASES[1])]
)
def test_ranks_without_their_launcher_end_and_the_run_is_taken_up(
    bench: Bench, undisturbed: tuple[dict[str, Any], float], tmp_path: Path, phase: str
) -> None:
    folder = tmp_path / "run"
    launcher = start_torchrun(bench, folder)
    try:
        wait_for(lambda: said(folder, f"── {phase}"))
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: is_over(launcher.pid), 30)
    finally:
        if not is_over(launcher.pid):
            os.killpg(launcher.pid, signal.SIGKILL)
    bench.commands.succeed(*bench.words(folder, **EVERYTHING, resume=True), ranks=2)
    check(folder, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on(
    bench: Bench, undisturbed: tuple[dict[str, Any], float], tmp_path: Path, phase: str
) -> None:
    folder = tmp_path / "run"
    launcher = start_torchrun(bench, folder, "--max-restarts", "1")
    try:
        wait_for(lambda: said(folder, f"── {phase}"))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        output, _ = launcher.communicate(timeout=120)
    finally:
        if not is_over(launcher.pid):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, output
    assert places(folder)
    check(folder, undisturbed[0])
