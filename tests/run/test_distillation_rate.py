"""A rate of distillation that nobody gave: it is lowered where it does harm."""

import itertools
import re
from pathlib import Path

import pytest

from tests.run.test_kills import written
from tests.runs import Bench, points, result_of

FLAGS: dict[str, object] = {
    "epochs": 0,
    "distill_steps": 40,
    "distill_batch_size": 4,
    "distill_cutmix": 0,
}
FUNCTION = "tests.run.test_distillation_rate:from_too_high_a_rate"


def from_too_high_a_rate(first: str, *words: str) -> int:
    """The program, whose first rate ruins this network."""
    from dist_prune.cli.main import main
    from dist_prune.run import distill

    distill.FIRST_RATE = float(first)
    return main(list(words))


def rates(said: str) -> list[float]:
    return [float(rate) for rate in re.findall(r"from the beginning again, at a rate of ([\d.e+-]+)", said)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_lowered_until_it_does_no_harm(bench: Bench, tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "run"
    done = bench.commands.succeed(3, *bench.words(folder, **FLAGS), ranks=ranks, function=FUNCTION)
    assert rates(done.out)[0] == 1
    assert all(later == pytest.approx(rate / 3, rel=0.1) for rate, later in itertools.pairwise(rates(done.out)))
    result = result_of(folder)
    assert result["distilled"]["kl"] < 1.05 * result["projected"]["kl"]
    curve = [point for point in points(folder) if point["group"] == "distill"]
    steps = [point["step"] for point in curve]
    assert steps == sorted({*steps}), "one point stands before or over another"
    assert steps[-1] == 40 + 20 * len(rates(done.out)), "steps that were taken back are on the curve, too"
    assert curve[0]["lr"] > 1 and curve[-3]["held_out_kl"] > result["projected"]["kl"]


def test_as_many_steps_are_taken_back_as_were_asked_for_and_no_more(bench: Bench, tmp_path: Path) -> None:
    """Where there is nothing to gain, every rate does harm."""
    folder = tmp_path / "run"
    done = bench.commands.succeed(30, *bench.words(folder, **FLAGS), ranks=2, function=FUNCTION)
    assert rates(done.out) == pytest.approx([10, 3.3])
    assert [point["step"] for point in points(folder) if point["group"] == "distill"] == [20, 40, 60, 80]
    assert "distillation brought nothing" in done.out + done.err
    assert result_of(folder)["distilled"]["kl"] == pytest.approx(result_of(folder)["projected"]["kl"], rel=1e-4)


def test_a_loss_that_is_no_number_lowers_it_too(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = bench.commands.succeed(1e30, *bench.words(folder, **FLAGS), ranks=2, function=FUNCTION)
    assert "the loss became nan" in done.out and len(rates(done.out)) > 10
    assert result_of(folder)["distilled"]["kl"] < 1.05 * result_of(folder)["projected"]["kl"]


def test_a_run_killed_after_it_was_lowered_ends_with_the_same_bits(bench: Bench, tmp_path: Path) -> None:
    """`written` counts a checkpoint after each step; the last ten are of the last rate."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    flags = {**FLAGS, "save_minutes": 0}
    done = bench.commands.succeed(3, *bench.words(whole, **flags), ranks=2, function=FUNCTION)
    killed = bench.commands(
        *(3, *bench.words(other, **flags)),
        ranks=2,
        function=FUNCTION,
        kill_when=f"{other}/checkpoints/{written(whole) - 10:08d}*",
    )
    assert all(killed.codes)
    again = bench.commands.succeed(3, *bench.words(other, **flags, resume=True), ranks=2, function=FUNCTION)
    assert rates(done.out) and not rates(again.out) and "resuming at epoch 1, step" in again.out
    assert result_of(other)["parameter_hash"] == result_of(whole)["parameter_hash"]
