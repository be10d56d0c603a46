"""Whole runs that come nearer to the dense network without labels: correction, distillation, their images."""

from pathlib import Path

import pytest

from tests.commands import shared_commands
from tests.test_pipeline import CLASSES, NETWORK, VAL, Bench, points, result_of, write_images, write_weights


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("bench")
    (home / "net.py").write_text(NETWORK)
    data = write_images(home / "images")
    return Bench(shared_commands(), data, home / "net.py", write_weights(home / "weights.pt", data))


def test_distillation_is_a_stage_of_its_own(bench: Bench, tmp_path: Path) -> None:
    flags = {"distill_steps": 30, "distill_batch_size": 10, "distill_features": 0.1, "distill_lr": 0.02, "pad": 0}
    bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0, **flags), ranks=2)
    result = result_of(tmp_path / "run")
    assert result["corrected"] is None and result["tuned"] is None
    assert result["distilled"]["images"] == VAL * len(CLASSES)
    assert result["distilled"]["kl"] < result["projected"]["kl"]
    assert result["seconds"]["distillation"] > 0
    steps = [point["step"] for point in points(tmp_path / "run") if point["group"] == "distill"]
    assert steps == [20, 30]
