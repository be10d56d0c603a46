"""Distillation that brings nothing is taken back, and images that judge it are never trained on."""

from pathlib import Path

import pytest

from dist_prune.data.dataset import Split
from tests.runs import Bench, result_of


def distilled(bench: Bench, folder: Path, **more: float) -> tuple[str, dict[str, float], dict[str, float]]:
    """What a run on two ranks says, and the figures before and after."""
    flags = {
        "epochs": 0,
        "correct": "none",
        "distill_steps": 8,
        "distill_batch_size": 8,
        "distill_cutmix": 0,
        **more,
    }
    done = bench.commands.succeed(*bench.words(folder, **flags), ranks=2)
    found = result_of(folder)
    assert "held-out KL" in done.out
    return done.out + done.err, found["projected"], found["distilled"]


def test_what_helps_on_images_held_out_is_kept(bench: Bench, tmp_path: Path) -> None:
    said, before, after = distilled(bench, tmp_path / "run", distill_lr=0.02)
    assert "brought nothing" not in said
    assert after["kl"] < before["kl"]


def test_a_network_that_got_worse_on_images_held_out_is_what_it_was_before(bench: Bench, tmp_path: Path) -> None:
    """At the rate that was asked for, which is not lowered."""
    said, before, after = distilled(bench, tmp_path / "run", distill_lr=10.0)
    assert "distillation brought nothing" in said and "at a rate of" not in said
    assert after["kl"] == pytest.approx(before["kl"], rel=1e-4)


def test_images_that_judge_are_not_trained_on() -> None:
    every = Split(Path("train"), ("a",), tuple(f"{i}.jpg" for i in range(64)), (0,) * 64)
    chosen = every.subset(32, 0)
    judges = chosen.take(range(0, 32, 8))
    assert judges.files == chosen.files[::8]
    assert {*every.without(judges).files} == {*every.files} - {*judges.files}


def test_a_given_rate_at_which_the_loss_is_no_number_ends_the_run_and_names_the_flag(
    bench: Bench, tmp_path: Path
) -> None:
    flags = {"epochs": 0, "correct": "none", "distill_steps": 8, "distill_batch_size": 8, "distill_lr": 1e30}
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert done.codes == [1, 1]
    assert "the loss became nan" in done.errors[0] and "--distill-lr" in done.errors[0]
