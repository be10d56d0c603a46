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
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """What the run gives, and how many checkpoints it writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.commands.succeed(*bench.words(folder, **EVERYTHING), ranks=2)
    return result_of(folder), written(folder)


def written(folder: Path) -> int:
    return max([0, *(int(path.name[:8]) for path in (folder / "checkpoints").glob("*.sha256"))])


def check(folder: Path, expected: dict[str, Any]) -> None:
    found = result_of(folder)
    assert found["parameter_hash"] == expected["parameter_hash"]
    assert [found[stage] for stage in STAGES] == [expected[stage] for stage in STAGES]


def places(folder: Path) -> list[str]:
    """Where the run was taken up, as its log says."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [line.partition("resuming after ")[2] for line in lines if "resuming after" in line]


def disturb(bench: Bench, folder: Path, checkpoints: int, seed: int, kills: int, **how: str) -> None:
    """Kill the run again and again, some moments after a checkpoint drawn from all of it, then let it end."""
    moment = random.Random(seed)
    for attempt in range(kills):
        done, left = written(folder), kills - attempt
        number = done + moment.randint(1, max(1, (checkpoints - done) * 2 // (left + 1)))
        killed = bench.commands(
            *bench.words(folder, **EVERYTHING, resume=bool(attempt) or None),
            ranks=2,
            kill_when=f"{folder}/checkpoints/{number:08d}*",
            kill_after=str(moment.uniform(0, 0.1)),
            **how,
        )
        assert all(killed.codes) or (folder / "result.json").exists(), killed.err
    bench.commands.succeed(*bench.words(folder, **EVERYTHING, resume=True), ranks=2)


@pytest.mark.parametrize("how", [{}, {"kill_rank": "1"}], ids=["all ranks", "one rank"])
def test_a_run_that_is_killed_ends_with_the_same_bits(
    bench: Bench, undisturbed: tuple[dict[str, Any], int], tmp_path: Path, how: dict[str, str]
) -> None:
    expected, checkpoints = undisturbed
    disturb(bench, tmp_path / "run", checkpoints, seed=1, kills=1, **how)
    check(tmp_path / "run", expected)
    assert places(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", [{}, {"kill_rank": "0"}, {"kill_rank": "1"}], ids=["all", "rank 0", "rank 1"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(
    bench: Bench, undisturbed: tuple[dict[str, Any], int], tmp_path: Path, how: dict[str, str], seed: int
) -> None:
    """27 kills."""
    expected, checkpoints = undisturbed
    disturb(bench, tmp_path / "run", checkpoints, seed, kills=3, **how)
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
    bench: Bench, undisturbed: tuple[dict[str, Any], int], tmp_path: Path, phase: str
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
    bench: Bench, undisturbed: tuple[dict[str, Any], int], tmp_path: Path, phase: str
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
