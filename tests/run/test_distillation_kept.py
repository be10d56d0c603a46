"""Distillation that brings nothing is taken back, and images that judge it are never trained on."""

from pathlib import Path

import pytest

from dist_prune.data.dataset import Split
from tests.runs import Bench, result_of


@pytest.mark.parametrize(("rate", "kept"), [(0.02, True), (300.0, False)])
def test_a_network_that_got_worse_on_images_held_out_is_what_it_was_before(
    bench: Bench, tmp_path: Path, rate: float, kept: bool
) -> None:
    flags = {"epochs": 0, "correct": "none", "distill_steps": 8, "distill_batch_size": 8, "distill_lr": rate}
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **flags), ranks=2)
    found = result_of(tmp_path / "run")
    assert "held-out KL" in done.out
    assert ("distillation brought nothing" in done.out + done.err) is not kept
    if kept:
        assert found["distilled"]["kl"] != found["projected"]["kl"]
    else:
        assert found["distilled"]["kl"] == pytest.approx(found["projected"]["kl"], rel=1e-4)


def test_images_that_judge_are_not_trained_on() -> None:
    every = Split(Path("train"), ("a",), tuple(f"{i}.jpg" for i in range(64)), (0,) * 64)
    chosen = every.subset(32, 0)
    judges = chosen.take(range(0, 32, 8))
    assert judges.files == chosen.files[::8]
    assert {*every.without(judges).files} == {*every.files} - {*judges.files}
