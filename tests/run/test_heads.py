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


SWIN = """
import torch
from timm.models import SwinTransformerV2

def swin(num_classes):
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4}
    model = SwinTransformerV2(**sizes, num_classes=num_classes)
    for norm in model.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            torch.nn.init.ones_(norm.weight)  # of attention's outputs they begin with zeros
    return model
"""


@pytest.mark.slow
def test_biases_that_are_joined_when_attention_is_taken_apart_are_those_that_were_trained(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "swin.py").write_text(SWIN)
    flags = {**HEADS, "arch": f"{tmp_path}/swin.py:swin", "weights": "none", "sites": "*qkv,*proj,*mlp.fc*"}
    flags |= {
        "pretrain.epochs": 2,
        "pretrain.lr": 10,
        "pretrain.batch_size": 4,
        "correct": "none",
        "epochs": 0,
        "distill_steps": None,
    }
    flags |= {"distill_batch_size": None, "ranks": "budget:macs=0.9"}
    cache = tmp_path / "cache"
    for name in ("trained", "from the cache"):
        bench.commands.succeed(*bench.words(tmp_path / name, **flags), DIST_PRUNE_CACHE=str(cache))
        (file,) = cache.glob("*.pt")
        trained = torch.load(file)["layers.0.blocks.1.attn.q_bias"]
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert "layers.0.blocks.1.attn" in plan["attention"] and trained.abs().max() > 1e-4
        attention = load_compressed(tmp_path / name).get_submodule("layers.0.blocks.1.attn")
        torch.testing.assert_close(attention.qkv.bias[: len(trained)], trained)
