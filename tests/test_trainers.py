"""The programs of launch/README.md run as they stand, in process groups that other people's trainers start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_prune import Plan, apply, load_compressed
from tests.commands import ROOT

MINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def build():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(256, 5))

generator = torch.Generator().manual_seed(0)
images, labels = torch.randn(94, 3, 8, 8, generator=generator), torch.randint(5, (94,), generator=generator)
dataset = TensorDataset(images, labels)
"""


def dense() -> nn.Module:
    scope: dict[str, object] = {}
    exec(MINE, scope)
    return scope["build"]()  # type: ignore[operator, no-any-return]


def program(words: str) -> str:
    """The one Python block of launch/README.md that has these words."""
    text = (ROOT / "launch" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if words in block)
    assert len(found.splitlines()) <= 40
    return str(found)


def run(folder: Path, code: str, *launcher: str) -> None:
    (folder / "mine.py").write_text(MINE)
    (folder / "program.py").write_text(code)
    here = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, "program.py"],
        cwd=folder,
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def torchrun(size: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))


def is_trained(saved: nn.Module, plan: Plan) -> bool:
    """Has half of the dense network's shapes, and other values in a layer that the plan leaves alone."""
    shapes = apply(plan, dense()).state_dict()
    assert {name: t.shape for name, t in saved.state_dict().items()} == {n: t.shape for n, t in shapes.items()}
    assert plan.ranks or plan.kept
    return bool(saved.state_dict()["0.1.num_batches_tracked"] > 0)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("Accelerator()", 2),
        *(pytest.param("Accelerator()", size, marks=slow) for size in (1, 3)),
        *(pytest.param("DistributedDataParallel(", size, marks=slow) for size in (1, 2, 3)),
    ],
)
def test_a_training_loop_goes_on_with_the_compressed_network(tmp_path: Path, words: str, size: int) -> None:
    run(tmp_path, program(words), *torchrun(size))
    plan = Plan.load(tmp_path / "small")
    saved = load_compressed(tmp_path / "small", dense())
    assert is_trained(saved, plan)


@slow
def test_lightning_compresses_in_its_process_group_and_loads_into_the_plan(tmp_path: Path) -> None:
    run(tmp_path, program("LightningModule"))
    plan = Plan.load(tmp_path / "plan.json")
    found = torch.load(tmp_path / "small.ckpt", weights_only=False)["state_dict"]
    network = apply(plan, dense())
    network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in found.items()})
    assert is_trained(network, plan)
