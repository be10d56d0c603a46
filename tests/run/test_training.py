"""Fine-tuning as part of a run: what its flags promise, and ranks that do not keep step."""

from pathlib import Path

import pytest

from tests.commands import shared_commands
from tests.runs import NETWORK, Bench, points, result_of, write_images, write_weights

EVERYTHING = {
    "accumulate": 2,
    "clip": 1,
    "ema": 0.9,
    "distill": "0.5,2",
    "label_smoothing": 0.1,
    "channels_last": True,
}
ASTRAY = """
import os
import torch

def astray(num_classes, training, number):
    # on rank 1, in its forward pass of that number in that mode, the last bias changes
    model, passes = tiny(num_classes), []
    def hook(module, inputs):
        passes.append(module.training)
        if os.environ.get("RANK") == "1" and module.training == training and passes.count(training) == number:
            with torch.no_grad():
                list(module.parameters())[-1][2] += 1e-6
    model.register_forward_pre_hook(hook)
    return model

def loose(num_classes):
    return astray(num_classes, False, 1)

def looser(num_classes):
    return astray(num_classes, True, 3)

class Stumbling(nn.Identity):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        return x * float("nan") if os.environ.get("RANK") == "1" and self.steps == 3 else x

def stumbling(num_classes):
    return nn.Sequential(*tiny(num_classes), Stumbling())
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("training")
    (home / "net.py").write_text(NETWORK + ASTRAY)
    data = write_images(home / "images")
    return Bench(shared_commands(), data, home / "net.py", write_weights(home / "weights.pt", data))


def test_a_run_says_how_it_trains_and_saves_the_averaged_weights(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands.succeed(*bench.words(tmp_path / "run", **EVERYTHING), ranks=2)
    assert "2 epochs of 3 steps, global batch 16 (4 images × 2 × 2 rank(s))" in done.out
    assert "loss: 0.5 × 4 × KL(dense ‖ compressed) at temperature 2 + 0.5 × cross-entropy" in done.out
    assert "weights evaluated and saved: running average, 0.9 of the old at each step" in done.out
    bench.commands.succeed(*bench.words(tmp_path / "last", **(EVERYTHING | {"ema": 0})), ranks=2)
    averaged, last = result_of(tmp_path / "run"), result_of(tmp_path / "last")
    assert averaged["projected"] == last["projected"]
    assert averaged["parameter_hash"] != last["parameter_hash"]
    trained = [
        [line["loss"] for line in points(tmp_path / name) if line["group"] == "train"] for name in ("run", "last")
    ]
    assert trained[0] == trained[1], "averaging does not touch training itself"


@pytest.mark.parametrize(
    ("network", "text"),
    [
        ("loose", "parameters (dense) {} 1 of 12: 9.bias"),
        ("looser", "parameters and buffers after step 5 {} 1 of 17: 9.expand.bias"),
    ],
)
def test_a_rank_with_another_parameter_ends_the_run_at_the_next_comparison(
    bench: Bench, tmp_path: Path, network: str, text: str
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", arch=f"{bench.network}:{network}"), ranks=2)
    assert all(done.codes)
    message = text.format("must be the same on all ranks, but rank 1 differs from rank 0 in")
    assert done.errors and all(message in line for line in done.errors)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_loss_that_is_no_number_on_one_rank_ends_all(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", arch=f"{bench.network}:stumbling"), ranks=3)
    assert done.codes == [1, 1, 1]
    assert len(done.errors) == 1
    assert done.errors[0].startswith("error: the loss became nan on rank 1 in step 3; try a lower --lr")


def test_synchronised_batch_norm_without_cuda_is_refused_before_the_run(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", bn="sync"), ranks=2)
    assert done.codes == [2, 2]
    assert done.errors == [
        "error: --bn sync: torch.nn.SyncBatchNorm runs on CUDA only, this is cpu; use local or frozen",
    ]
    assert not (tmp_path / "run").exists()
