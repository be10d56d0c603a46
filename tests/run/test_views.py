"""Statistics of mirror images and crops: the same on any number of ranks, and in a run that is taken up."""

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Bench, result_of

FLAGS: dict[str, object] = {
    "method": "fisher",
    "ranks": "budget:macs=0.5",
    "mirrored": True,
    "crops": 1,
    "statistics_views": True,
    "epochs": 0,
    "eval_batch_size": 4,
}


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("views") / "run"
    bench.commands.succeed(*bench.words(folder, **FLAGS))
    return result_of(folder)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_sees_the_same_views(
    bench: Bench, alone: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    bench.commands.succeed(*bench.words(tmp_path / "run", **FLAGS), ranks=ranks)
    found = result_of(tmp_path / "run")
    assert found["ranks"] == alone["ranks"]
    assert found["projected"]["kl"] == pytest.approx(alone["projected"]["kl"], rel=1e-3)


def test_a_pass_over_views_is_taken_up_in_its_middle(bench: Bench, alone: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = bench.words(folder, **FLAGS, save_minutes=0)
    killed = bench.commands(*words, kill_when=f"{folder}/checkpoints/00000004*")
    assert killed.codes != [0]
    again = bench.commands.succeed(*words, "--resume")
    assert "resuming at pass, batch" in again.out
    assert result_of(folder)["parameter_hash"] == alone["parameter_hash"]
