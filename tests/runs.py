"""Whole runs for tests: images, a network that has learnt something, and the flags of a good run."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.commands import ROOT, Commands
from tests.pictures import picture, save

CLASSES = "abcd"
TRAIN, VAL = 10, 9  # images a class
NETWORK = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

def five(num_classes):
    return tiny(5)

class Viewed(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)

def viewing(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), Viewed(), nn.Linear(4 * 4 * 4, num_classes))

def dense_only(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""
SITES = {"0": 8, "3": 16, "5": 16, "9": 4}  # name → channels
STAGES = ("dense", "projected", "corrected", "distilled", "tuned")
KEYS = {*STAGES, "macs", "params", "seconds", "world_size", "seed", "method", "ranks", "parameter_hash"}
KEYS |= {"warnings"}
FILES = {
    "config.json",
    "plan.json",
    "model.safetensors",
    "answers.safetensors",
    "layers.json",
    "metrics.jsonl",
    "log.txt",
    "tensorboard",
    "checkpoints",
    "report.html",
    "report.md",
}


# flags of a run with every stage
WHOLE: dict[str, object] = {
    "method": "fisher",
    "correct": "regression",
    "calibrate_images": 16,
    "measure_sites": True,
    "distill_steps": 20,
    "distill_batch_size": 4,
    "epochs": 1,
}


# ── a data set, a network, weights that have learnt something ──────────────────────────────────────────────


def tinted(label: int, seed: int) -> Image.Image:
    """A picture in whose noise the class can be told by its colour, mostly."""
    noise = np.asarray(picture(16, 16, seed), dtype=np.float64)
    colour = 255 * np.array([label & 1, label >> 1, 0.5])
    return Image.fromarray((0.88 * noise + 0.12 * colour).astype(np.uint8))


def write_images(folder: Path) -> Path:
    for label, name in enumerate(CLASSES):
        for i in range(TRAIN):
            save(folder / "train" / name / f"{i}.jpg", tinted(label, 100 * label + i))
        for i in range(VAL):
            save(folder / "val" / name / f"{i}.png", tinted(label, 1000 + 100 * label + i))
    return folder


def images_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A split as the networks see it, read without the program's own streams."""
    files = sorted(folder.glob("*/*"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = torch.tensor([CLASSES.index(f.parent.name) for f in files])
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), labels


def network(name: str, classes: int = len(CLASSES)) -> nn.Module:
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    return scope[name](classes)


def write_weights(path: Path, data: Path) -> Path:
    torch.manual_seed(0)
    model = network("tiny")
    images, labels = images_of(data / "train")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)
    return path


@dataclass(frozen=True)
class Bench:
    """Where the tests work, and the flags of a good run."""

    commands: Commands
    data: Path
    network: Path
    weights: Path

    def words(self, run_dir: Path, /, **flags: object) -> list[str]:
        """A good command line; `flags` replace or extend it, None takes a flag away, True is a bare flag."""
        given: dict[str, object] = {
            "data": self.data,
            "arch": f"{self.network}:tiny",
            "weights": self.weights,
            "classes": len(CLASSES),
            "crop": 16,
            "sites": "*",
            "correct": "none",
            "epochs": 2,
            "batch_size": 4,
            "run_dir": run_dir,
        }
        words = ["cifar10"]
        for name, value in (given | flags).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words


def torchrun(
    commands: Commands, *words: object, ranks: int = 2, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The real thing: `torchrun --standalone --nproc-per-node N launch/local.py …`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, str(ROOT / "launch" / "local.py"), *map(str, words)],
        cwd=commands.home,
        env=commands.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def result_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def content(folder: Path) -> dict[str, str]:
    """Every file below and the hash of what is in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def points(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curves(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def copied(run_dir: Path, folder: Path) -> Path:
    shutil.copytree(run_dir, folder)
    return folder
