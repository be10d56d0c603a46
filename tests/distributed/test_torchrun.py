"""Under a real torchrun: the launcher dies, starts a dead rank again, or passes on that it is asked to leave."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.ranks import free_address
from tests.run.test_kills import EVERYTHING, check, places, undisturbed, written  # noqa: F401  the fixture
from tests.runs import Bench

Undisturbed = tuple[dict[str, Any], int]
PHASES = ("statistics", "correction", "distillation", "finetune")
ENDLESS = 100_000  # epochs
ORPHANED_S = 30  # after which no rank may be left once its launcher is gone


@dataclass
class Launched:
    """torchrun, the two ranks it started, each in a session of its own, and where they work."""

    launcher: subprocess.Popen[str]
    folder: Path
    ranks: list[int] = field(default_factory=list)

    def reach(self, phase: str) -> None:
        """Return once rank 0 is in that phase; empty: once both ranks are started, and import."""
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 2, 100)
        self.ranks = [int(pid) for pid in children.read_text().split()]
        log = self.folder / "log.txt"
        wait_for(lambda: not phase or (log.is_file() and f"── {phase}" in log.read_text()), 200)

    def living(self) -> list[int]:
        return [pid for pid in self.ranks if b"launch/local.py" in cmdline(pid)]

    def end(self) -> str:
        """What all said, once all are gone."""
        return self.launcher.communicate(timeout=250)[0]


@contextmanager
def launched(
    bench: Bench, folder: Path, *more: str, epochs: int = 2, standalone: bool = True
) -> Iterator[Launched]:
    meeting = ["--standalone"] if standalone else ["--master-port", free_address().rpartition(":")[2]]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2", *more]
    words = bench.words(folder, **EVERYTHING, epochs=epochs, resume=True)
    launcher = subprocess.Popen(
        [*command, str(ROOT / "launch" / "local.py"), *words],
        cwd=bench.commands.home,
        env=bench.commands.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = Launched(launcher, folder)
    try:
        yield run
    finally:
        launcher.kill()
        for pid in run.living():
            os.kill(pid, signal.SIGKILL)
        launcher.communicate()


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen in {seconds:g} s"
        time.sleep(0.005)


def cmdline(pid: int) -> bytes:
    """Empty for a process that has ended, buried or not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.parametrize(
    ("store", "phase"),
    [
        ("torchrun", "correction"),
        *(
            pytest.param("torchrun", phase, marks=pytest.mark.slow)
            for phase in ("", *PHASES)
            if phase != "correction"
        ),
        pytest.param("rank 0", "finetune", marks=pytest.mark.slow),
    ],
)
def test_ranks_whose_torchrun_was_killed_end_soon_and_the_run_can_be_taken_up(
    bench: Bench, tmp_path: Path, store: str, phase: str
) -> None:
    """torchrun serves the store itself; without --standalone rank 0 does, who outlives it."""
    with launched(bench, tmp_path / "run", epochs=ENDLESS, standalone=store == "torchrun") as run:
        run.reach(phase)
        run.launcher.kill()
        run.launcher.wait()
        began = time.monotonic()
        wait_for(lambda: not run.living(), 4 * ORPHANED_S)
        seconds = time.monotonic() - began
        said = run.end()
    assert re.search(r"torchrun, which (served|started|should serve)", said), said
    assert seconds < ORPHANED_S or not phase, "ranks that still import notice it when they want to meet"
    print(f"{seconds:.1f} s")
    number, folder = written(run.folder) + 1, run.folder / "checkpoints"
    words = bench.words(run.folder, **EVERYTHING, epochs=ENDLESS, resume=True)
    bench.commands(*words, ranks=2, kill_when=f"{folder}/{number:08d}*.sha256")
    assert places(run.folder) or not phase
    assert written(run.folder) >= number


@pytest.mark.slow
@pytest.mark.parametrize("phase", [*PHASES, "evaluate tuned"])
def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on(
    bench: Bench,
    undisturbed: Undisturbed,  # noqa: F811
    tmp_path: Path,
    phase: str,
) -> None:
    with launched(bench, tmp_path / "run", "--max-restarts", "1") as run:
        run.reach(phase)
        os.kill(run.ranks[-1], signal.SIGKILL)
        said = run.end()
    assert run.launcher.returncode == 0, said
    assert places(run.folder)
    check(run.folder, undisturbed[0])


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("SIGTERM", "finetune"),
        pytest.param("SIGTERM", "statistics", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", "correction", marks=pytest.mark.slow),
        pytest.param("SIGUSR2", "distillation", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_torchrun_has_the_ranks_save_and_leave(
    bench: Bench,
    undisturbed: Undisturbed,  # noqa: F811
    tmp_path: Path,
    name: str,
    phase: str,
) -> None:
    """torchrun itself then ends with 1; it passes on other signals than SIGTERM and SIGINT only if told to."""
    with launched(bench, tmp_path / "run", "--signals-to-handle", f"SIGTERM,{name}") as run:
        run.reach(phase)
        run.launcher.send_signal(signal.Signals[name])
        said = run.end()
    assert f"stopped: asked to stop by {name}; saved" in said, said
    assert run.launcher.returncode == 1, said
    assert not run.living()
    bench.commands.succeed(*bench.words(tmp_path / "run", **EVERYTHING, resume=True), ranks=2)
    assert places(tmp_path / "run")
    check(tmp_path / "run", undisturbed[0])
