"""Runs in which heads of attention lose dimensions: what is saved, and resuming."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from dist_prune import load_compressed
from dist_prune.distributed.fingerprint import digest
from tests.runs import CLASSES, WHOLE, Bench, result_of

NETWORK = """
from torchvision.models import VisionTransformer

def vit(num_classes):
    return VisionTransformer(16, 4, 2, 2, 16, 16, num_classes=num_classes)
"""
HEADS = {
    **WHOLE,
    "ranks": "budget:macs=0.8",
    "width": "on",
    "forms": "dense",
    "measure_sites": None,
    "sites": "*qkv,*self_attention.proj,*mlp*",
    "calibrate_images": 40,
}


@pytest.fixture
def vit(bench: Bench, tmp_path: Path) -> dict[str, object]:
    """Flags that name a transformer with weights that attend."""
    file, weights = tmp_path / "vit.py", tmp_path / "vit.pt"
    file.write_text(NETWORK)
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 16, num_classes=len(CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.save(model.state_dict(), weights)
    return {**HEADS, "arch": f"{file}:vit", "weights": weights}


def test_a_killed_run_resumes_to_the_very_same_network(
    bench: Bench, vit: dict[str, object], tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    bench.commands.succeed(*bench.words(whole, **vit), ranks=2)
    result, plan = result_of(whole), json.loads((whole / "plan.json").read_text())
    assert result["macs"]["compressed"] <= 0.8 * result["macs"]["dense"]
    assert {row["part"] for row in plan["widths"]} & {"queries and keys", "values"}
    assert len(plan["attention"]) == 2
    assert digest(load_compressed(whole)) == result["parameter_hash"]
    done = bench.commands(*bench.words(folder, **vit), ranks=2, kill_when=f"{folder}/checkpoints/00000004*")
    assert all(done.codes)
    bench.commands.succeed(*bench.words(folder, **vit, resume=True), ranks=2)
    assert result_of(folder)["parameter_hash"] == result["parameter_hash"]
