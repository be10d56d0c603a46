"""How long a run that was killed takes to its next step, and what its checkpoints cost.

    uv run python -m tests.bench.resume [--rounds N] [WORDS OF A RUN]

The run is killed in fine-tuning, some steps into an epoch, and taken up; by default an untrained ResNet-18 on the
digits. The seconds until it has made a step, and written the checkpoint after it, are told beside those that a
process spends on imports alone.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_prune.distributed.world import joined
from dist_prune.network import models
from dist_prune.utils import files
from tests.bench.timing import Row, command_line, report, table, write_json
from tests.commands import ROOT

RESULT = Path(__file__).parent / "results" / "resume.json"
QUICKLY = ["--method", "weight-svd", "--correct", "none", "--epochs", "1000", "--save-minutes", "0"]
LEFT = 8  # the checkpoint after which it is killed: four stages, then steps
SECONDS = 15.0  # that a start may take besides imports
INTERVAL_S, SHARE = 600.0, 0.02  # of a run's time that saving may take


@dataclass(frozen=True)
class Taken:
    """Seconds of a process, by the clock on the wall and of processors."""

    wall: float
    cpu: float

    def __sub__(self, other: Taken) -> Taken:
        return Taken(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Taken:
    """Both clocks; the second one counts processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(time.perf_counter(), used.ru_utime + used.ru_stime)


def first_step(words: list[str], folder: Path) -> tuple[Taken, Taken]:
    """What a process takes that takes the run up, to its first step; and one that only imports."""
    run = [sys.executable, str(ROOT / "launch" / "local.py"), *words, "--run-dir", str(folder), "--resume"]
    until(lambda: written(folder) >= LEFT, run)
    newest = written(folder)
    taken = until(lambda: written(folder) > newest, run)
    began = now()
    subprocess.run([sys.executable, "-c", "import dist_prune.cli.main, nvidia.dali.plugin.pytorch"], check=True)
    return taken, now() - began


def written(folder: Path) -> int:
    """The number of the newest checkpoint."""
    return max([0, *(int(path.name[:8]) for path in folder.glob("checkpoints/*.sha256"))])


def untrained(home: Path) -> Path:
    """Weights that can be compressed, though nothing was learnt."""
    torch.save(models.build("resnet18", 10).state_dict(), home / "weights.pt")
    return home / "weights.pt"


def until(happened: Callable[[], bool], words: list[str]) -> Taken:
    """Start a process and kill it as soon as that has happened; what it took."""
    began = now()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while not happened():
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode} before it could be killed")
            time.sleep(0.01)
        process.kill()
    return now() - began


def saving(folder: Path) -> tuple[float, int]:
    """Seconds to save the run's newest checkpoint once more, the median of five; and how many bytes it has."""
    with joined("cpu") as world:
        found, _ = files.newest(folder / "checkpoints", world)
        assert found is not None
        times = []
        for _ in range(5):
            began = time.perf_counter()
            path = files.save(folder / "saved", found, world)
            times.append(time.perf_counter() - began)
    return statistics.median(times), path.stat().st_size


def measure(words: list[str], rounds: int) -> list[Row]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory() as home:
        given = words or ["digits", "--weights", str(untrained(Path(home)))]
        taken = [first_step([*given, *QUICKLY], Path(home) / str(number)) for number in range(rounds)]
        save_s, size = saving(Path(home) / "0")
    beyond = [whole - imports for whole, imports in taken]
    ratios = sorted(each.wall / SECONDS for each in beyond)
    share, imports = save_s / INTERVAL_S, statistics.median(each.wall for _, each in taken)
    detail = (
        f"{given[0]}: {statistics.median(each.wall for each in beyond):.1f} s, of processors "
        f"{statistics.median(each.cpu for each in beyond):.1f} s, besides {imports:.1f} s of imports"
    )
    return [
        Row("first step after --resume ÷ 15 s", statistics.median(ratios), ratios[0], ratios[-1], 1.0, detail),
        Row("saving ÷ 10 minutes", share, share, share, SHARE, f"{size / 2**20:.0f} MiB in {save_s:.2f} s"),
    ]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help=f"default: results/{RESULT.name}")
    options, words = parser.parse_known_args()
    rows = measure(words, options.rounds)
    print(table(rows))
    write_json(options.output or RESULT, report(rows, command_line("tests.bench.resume")))


if __name__ == "__main__":
    main()
