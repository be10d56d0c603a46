"""Runs of a network whose convolutions pad by themselves: planned, corrected, trained, taken along."""

import json
from pathlib import Path

import pytest
import torch

from dist_prune import load_compressed
from dist_prune.network.models import build
from tests.commands import PROGRAM
from tests.runs import CLASSES, Bench, images_of, result_of

NETWORK = """
import torch.nn.functional as F
from torch import nn

class Same(nn.Conv2d):
    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride)

def net(num_classes):
    return nn.Sequential(
        Same(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
        Same(8, 16, 3, 2), nn.ReLU(),
        Same(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


@pytest.fixture(scope="module")
def flags(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    home = tmp_path_factory.mktemp("padding")
    (home / "net.py").write_text(NETWORK)
    arch = f"{home}/net.py:net"
    torch.manual_seed(0)
    torch.save(build(arch, len(CLASSES)).state_dict(), home / "weights.pt")
    own = {
        "arch": arch,
        "weights": home / "weights.pt",
        "epochs": 1,
        "correct": "regression",
        "calibrate_images": 16,
    }
    return own | {"ranks": "budget:macs=0.6", "width": "off"}


@pytest.fixture(scope="module")
def folders(bench: Bench, flags: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    home = tmp_path_factory.mktemp("runs")
    for ranks in (1, 3):
        bench.commands.succeed(*bench.words(home / str(ranks), **flags), ranks=ranks)
    return {ranks: home / str(ranks) for ranks in (1, 3)}


def test_the_plan_is_the_same_on_any_number_of_ranks_and_they_are_noted(folders: dict[int, Path]) -> None:
    plans = [json.loads((folder / "plan.json").read_text())["choices"] for folder in folders.values()]
    assert plans[0] == [
        row | {"loss": pytest.approx(row["loss"], rel=1e-3)} if row.get("loss") else row for row in plans[1]
    ]
    assert {row["site"] for row in plans[0] if row["rank"]} & {"0", "3", "5"}
    for folder in folders.values():
        assert "3 convolution(s) that pad by themselves become plain ones" in (folder / "log.txt").read_text()
        assert result_of(folder)["macs"]["compressed"] <= 0.6 * result_of(folder)["macs"]["dense"]


def test_what_a_run_saved_is_loaded_exported_and_timed(
    bench: Bench, folders: dict[int, Path], tmp_path: Path
) -> None:
    folder, (x, labels) = folders[3], images_of(bench.data / "val")
    with torch.no_grad():
        right = (load_compressed(folder)(x).argmax(1) == labels).double().mean()
    assert 100 * float(right) == pytest.approx(result_of(folder)["tuned"]["top1"], abs=0.01)
    for words in (
        ("export", folder, "--format", "python", "--out", tmp_path / "small.py"),
        ("speed", folder, "--out", tmp_path / "speed.json", "--batches", 1, "--engines", "eager"),
    ):
        bench.commands.succeed(*words, ranks=0, function=PROGRAM)
    timed = {each["site"] for each in json.loads((tmp_path / "speed.json").read_text())["sites"]}
    assert timed & {"0", "3", "5"}, "the dense layer is timed beside its chain"
