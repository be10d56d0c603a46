"""Runs of the program as jobs of the cluster: digits, and a network small enough for two cores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.commands import ROOT
from tests.slurm.cluster import Cluster

SCRIPT = ROOT / "slurm" / "prune_resnet18.sh"
NETWORK = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


def write_inputs(home: Path) -> Path:
    """A network and its weights in `home`."""
    (home / "net.py").write_text(NETWORK)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    torch.save(scope["tiny"](10).state_dict(), home / "weights.pt")
    return home


@dataclass(frozen=True)
class Jobs:
    """Submits from `home`, where the inputs are and what the jobs write goes."""

    cluster: Cluster
    home: Path

    @property
    def environ(self) -> dict[str, str]:
        """Caches below `home`: of images, and of bytecode, which makes up half of a start."""
        return {
            "DIST_PRUNE_CACHE": str(self.home / "cache"),
            "PYTHONPYCACHEPREFIX": str(self.home / "bytecode"),
            "PYTHONDONTWRITEBYTECODE": "",
            "OMP_NUM_THREADS": "1",
            "RECIPE": "digits",
        }

    def flags(self, **flags: object) -> list[str]:
        """Flags of a run of a few seconds; `flags` replace or extend them."""
        given: dict[str, object] = {
            "arch": self.home / "net.py:tiny",
            "weights": self.home / "weights.pt",
            "pretrain.epochs": 0,
            "correct": "none",
            "epochs": 2,
            "threads": 1,
        }
        return [
            word for name, value in (given | flags).items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def submit(
        self,
        run: str,
        *sbatch: object,
        nodes: int = 1,
        gpus: int = 2,
        script: Path = SCRIPT,
        data: object = "digits",
        environ: dict[str, str] | None = None,
        **flags: object,
    ) -> str:
        """`sbatch slurm/prune_resnet18.sh` into the directory `run`; the job's number."""
        size = [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--ntasks-per-node={gpus}", "--cpus-per-task=1"]
        words = [*size, "--time=10", f"--output={run}.log", *sbatch, script, data, "--", *self.flags(**flags)]
        more = self.environ | {"RUN_DIR": str(self.home / run)} | (environ or {})
        return self.cluster.submit(*words, cwd=self.home, **more)

    def result(self, run: str) -> dict[str, Any]:
        """What the run's result.json says."""
        found: dict[str, Any] = json.loads((self.home / run / "result.json").read_text())
        return found

    def log(self, run: str) -> str:
        """What the job said."""
        return (self.home / f"{run}.log").read_text()
