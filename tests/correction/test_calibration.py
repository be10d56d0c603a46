"""Whole runs that come nearer to the dense network without labels: correction, distillation, their images."""

from pathlib import Path

import pytest
import torch

from tests.pictures import save
from tests.runs import CLASSES, NETWORK, VAL, Bench, points, result_of, tinted


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


# ── correction ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_network_is_corrected_unless_told_otherwise(bench: Bench, tmp_path: Path) -> None:
    bench.commands.succeed(*bench.words(tmp_path / "run", correct=None, epochs=0), ranks=2)
    result, log = result_of(tmp_path / "run"), (tmp_path / "run" / "log.txt").read_text()
    assert result["corrected"]["kl"] < result["projected"]["kl"]
    assert result["distilled"] is None
    assert "fewer rows than inputs in" not in log and "not solved" not in log
    assert "held-out KL" in log and "kept damping" in log


def test_batch_norm_is_re_estimated_on_request_and_told_by_itself(bench: Bench, tmp_path: Path) -> None:
    bench.commands.succeed(
        *bench.words(tmp_path / "run", epochs=0, reestimate_bn=True, ranks="uniform:0.25"), ranks=2
    )
    result, log = result_of(tmp_path / "run"), (tmp_path / "run" / "log.txt").read_text()
    assert "batch norm re-estimated in 1 layers: held-out KL " in log
    assert ("; kept" in log) == (result["corrected"]["kl"] != result["projected"]["kl"])
    assert "batch norm" in result["seconds"] and "correction" not in result["seconds"]


# ── images without labels ──────────────────────────────────────────────────────────────────────────────────


def write_unlabelled(folder: Path, count: int) -> Path:
    for i in range(count):
        save(folder / "abc"[i % 3] / str(i % 2) / f"{i}.jpg", tinted(i % 4, 5000 + i))
    return folder


def test_a_folder_of_unlabelled_images_corrects_and_distils(bench: Bench, tmp_path: Path) -> None:
    """15 of them, of which 2 judge: fewer than the last layer has inputs."""
    loose = write_unlabelled(tmp_path / "loose", 15)
    flags = {"correct": "regression", "calibrate_data": loose, "distill_steps": 3, "distill_batch_size": 4}
    bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0, **flags), ranks=2)
    result, log = result_of(tmp_path / "run"), (tmp_path / "run" / "log.txt").read_text()
    assert (
        "fewer rows than inputs in 1 layers (9: 13 for 16): what they leave open stays as in the dense layers"
        in log
    )
    assert "3 steps on 13 images" in log
    assert result["corrected"] is not None and result["distilled"] is not None


UNUSABLE = {
    "absent": (lambda folder: None, {}, "loose is not a folder: expected one with images, at any depth"),
    "empty": (lambda folder: folder.mkdir(), {}, "loose, at any depth: expected names ending in .bmp"),
    "too few": (lambda folder: write_unlabelled(folder, 1), {}, "1 images in"),
    "damaged": (
        lambda folder: (write_unlabelled(folder, 3) / "a" / "x.jpg").write_bytes(b""),
        {},
        "1 damaged in",
    ),
    "unused": (
        lambda folder: write_unlabelled(folder, 3),
        {"correct": "none", "method": "gradient"},
        "--correct none and --method gradient leave it unused",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unlabelled_images_that_cannot_be_used_are_refused_at_once(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    prepare, more, message = UNUSABLE[name]
    prepare(tmp_path / "loose")
    flags = {"correct": "refit", "calibrate_data": tmp_path / "loose"} | more
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and message in done.errors[0], done.err
    assert not (tmp_path / "run").exists()


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
