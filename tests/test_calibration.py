"""Whole runs that come nearer to the dense network without labels: correction, distillation, their images."""

from pathlib import Path

import pytest
import torch

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


# ── networks that are hard to follow ───────────────────────────────────────────────────────────────────────

HARD = (
    NETWORK
    + """
import torch

class Deciding(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = tiny(classes)

    def forward(self, x):
        return self.body(x) if x.mean() < 1000 else -self.body(x)

class Noisy(Deciding):
    def forward(self, x):
        return self.body(x) + torch.randn(len(x), 1) * torch.arange(4)

def deciding(num_classes):
    return Deciding(num_classes)

def noisy(num_classes):
    return Noisy(num_classes)
"""
)


def hard(bench: Bench, folder: Path, name: str) -> dict[str, object]:
    """Flags of a network with the good one's weights."""
    (folder / "hard.py").write_text(HARD)
    state = torch.load(bench.weights, weights_only=True)
    torch.save({f"body.{key}": tensor for key, tensor in state.items()}, folder / "hard.pt")
    return {"arch": f"{folder}/hard.py:{name}", "weights": folder / "hard.pt", "epochs": 0}


def test_a_network_that_cannot_be_traced_is_corrected_towards_plain_targets(bench: Bench, tmp_path: Path) -> None:
    flags = hard(bench, tmp_path, "deciding") | {"correct": "regression"}
    bench.commands.succeed(*bench.words(tmp_path / "run", **flags), ranks=2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "plain targets, and each layer's inputs computed from the images again: torch.fx cannot trace" in log
    result = result_of(tmp_path / "run")
    assert result["corrected"]["kl"] < result["projected"]["kl"]


def test_a_network_that_answers_differently_each_time_is_refused(bench: Bench, tmp_path: Path) -> None:
    flags = hard(bench, tmp_path, "noisy") | {"correct": "refit"}
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and "make it deterministic, or use --correct none" in done.errors[0]
    assert not (tmp_path / "run").exists()
    bench.commands.succeed(*bench.words(tmp_path / "run", **flags | {"correct": "none"}))
