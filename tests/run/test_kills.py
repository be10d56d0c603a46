"""Killed anywhere, by anything: the run that is taken up ends with the bits of one that nobody disturbed."""

import random
from pathlib import Path
from typing import Any

import pytest

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
    "channels_last": True,
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


@pytest.mark.slow
def test_three_ranks_add_in_the_same_order_after_they_were_killed(bench: Bench, tmp_path: Path) -> None:
    """With two ranks a sum has one order; with three it depends on how DDP packs its messages."""
    flags = {"epochs": 4, "sites": "5", "correct": "none", "save_minutes": 0}
    bench.commands.succeed(*bench.words(tmp_path / "whole", **flags), ranks=3)
    folder = tmp_path / "killed"
    middle = written(tmp_path / "whole") - 5
    bench.commands(*bench.words(folder, **flags), ranks=3, kill_when=f"{folder}/checkpoints/{middle:08d}*")
    bench.commands.succeed(*bench.words(folder, **flags, resume=True), ranks=3)
    assert "finetune, epoch" in places(folder)[0]
    check(folder, result_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    "how", [{"kill_rank": "1"}, pytest.param({}, marks=pytest.mark.slow)], ids=["one rank", "all ranks"]
)
def test_a_run_killed_while_it_trains_its_dense_network_ends_with_the_same_bits(
    bench: Bench, tmp_path: Path, how: dict[str, str]
) -> None:
    flags = {"weights": "none", "pretrain.epochs": 3, "method": "weight-svd", "epochs": 0, "save_minutes": 0}
    caches = [{"DIST_PRUNE_CACHE": str(tmp_path / name)} for name in ("cache", "another cache")]
    bench.commands.succeed(*bench.words(tmp_path / "whole", **flags), ranks=2, **caches[0])
    folder = tmp_path / "killed"
    bench.commands(
        *bench.words(folder, **flags), ranks=2, kill_when=f"{folder}/checkpoints/00000002*", **caches[1], **how
    )
    assert not any((tmp_path / "another cache").glob("*.pt")), "it had not come to the end of training"
    done = bench.commands.succeed(*bench.words(folder, **flags, resume=True), ranks=2, **caches[1])
    assert "resuming after pretrain, epoch" in done.out
    check(folder, result_of(tmp_path / "whole"))
