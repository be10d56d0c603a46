"""The benchmark for a GPU, on the CPU: every part, without DALI; and what its figures are made of."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis
from dist_prune.network.sites import View, survey
from tests.bench import gpu
from tests.bench.ceilings import Ceilings, Work, forward_work, moments_work, tensor_cores
from tests.bench.decoding import decoding
from tests.bench.figures import Figure, format_table, has_failed
from tests.bench.phases import Bench
from tests.bench.roughness import distance, kept_energy
from tests.bench.timing import interleaved

BARE = """
import runpy, sys
lacking = ["nvidia.dali", "submitit", "tomli_w", "jinja2", "timm", "onnx", "onnxscript", "onnxruntime"]
sys.modules.update(dict.fromkeys(lacking))  # importing one is an ImportError
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""


def test_every_part_runs_without_a_gpu_and_without_dali_and_says_what_it_lacks(tmp_path: Path) -> None:
    output = tmp_path / "new" / "gpu.json"
    words = [sys.executable, "-c", BARE, "--device", "cpu", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert list(found) == ["command", "date", "machine", "scale", "parts"]
    assert list(found["parts"]) == ["ceilings", *gpu.PARTS]
    assert found["machine"]["gpu"] is None
    for part, figures in found["parts"].items():
        names = [figure["name"] for figure in figures]
        assert len(set(names)) == len(names), "each is named once"
        assert all(f"{part}: {name}" in done.stdout for name in names)
        assert all(f["detail"] for f in figures if f["value"] is None), "what is missing says why"
        assert all(math.isfinite(f["value"]) for f in figures if f["value"] is not None)
    assert all(f["value"] is None and "cannot be imported" in f["detail"] for f in found["parts"]["decoding"])
    assert {f["detail"] for p in ("statistics", "bases") for f in found["parts"][p] if "tf32" in f["name"]} == {
        "this device has no TF32"
    }
    measured = [f["name"] for p in found["parts"].values() for f in p if f["value"] is not None]
    for name in (
        "resnet18, bf16: statistics pass ÷ forward",
        "bf16 forward, pca: subspace distance at half the ranks",
        "hessian-local, bf16: curvature pass ÷ forward + backward",
        "resnet18, bf16 and channels last: fine-tuning ÷ bare loop",
        "resnet18, uniform:0.5, float32, batch 2: part of the MACs' saving",
        "resnet18, budget:macs=0.5, bf16, batch 2, multiples of 8: time ratio",
    ):
        assert name in measured


def test_files_are_decoded_where_dali_is(world: World) -> None:
    bench = Bench(world, gpu.QUICK, Ceilings({}, 1.0), time.monotonic() + 60)
    mixed, cpu, both = decoding(bench)
    assert (mixed.detail, both.detail) == ("no GPU", "no GPU")
    assert cpu.value is not None and cpu.value > 0 and cpu.unit == "images/s"


def failing(_bench: Bench) -> Iterator[Figure]:
    yield Figure("first", 1.0)
    raise RuntimeError("CUDA out of memory\nand a long story")


def sound(_bench: Bench) -> Iterator[Figure]:
    yield Figure("second", 2.0)


def test_a_part_that_fails_keeps_what_it_had_and_the_others_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"bad": (failing, 1.0), "good": (sound, 1.0)})
    kept: list[list[str]] = []
    end = time.monotonic() + 60
    assert not gpu.measure(world, gpu.QUICK, ["bad", "good"], end, lambda found: kept.append(list(found)))
    assert kept == [["ceilings", "bad"], ["ceilings", "bad", "good"]], "written after every part"
    found: dict[str, list[Figure]] = {}
    gpu.measure(world, gpu.QUICK, ["bad", "good"], end, found.update)
    assert [f.value for f in found["bad"]] == [1.0, None]
    assert has_failed(found["bad"][1]) and found["bad"][1].detail == "RuntimeError: CUDA out of memory"
    assert [f.value for f in found["good"]] == [2.0]
    assert "bad: bad: failed: RuntimeError: CUDA out of memory" in format_table(found)
    assert gpu.measure(world, gpu.QUICK, ["good"], end, found.update)


def test_a_part_for_which_no_time_is_left_is_not_begun(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"bad": (failing, 1.0)})
    found: dict[str, list[Figure]] = {}
    assert gpu.measure(world, gpu.QUICK, ["bad"], time.monotonic(), found.update)
    assert found["bad"] == [Figure("bad", None, detail="no time was left: raise --seconds, or choose --parts")]


def test_rounds_end_when_the_time_is_up() -> None:
    taken = interleaved(lambda: None, lambda: None, 9, torch.device("cpu"), until=time.monotonic())
    assert len(taken.ours) == 1


def test_a_figure_beyond_its_target_is_said_to_be() -> None:
    assert [Figure("", v, target=1.1).verdict for v in (1.0, 1.2, None)] == ["met", "missed", ""]
    assert [Figure("", v, target=0.8, at_least=True).verdict for v in (0.9, 0.7)] == ["met", "missed"]


def test_the_floor_is_what_products_or_bytes_need_at_least() -> None:
    ceilings = Ceilings({"float32": 10.0, "bf16": 100.0}, 5.0)
    assert Work({"float32": 20, "bf16": 300}, 20).floor(ceilings) == (5.0, "products")
    assert Work({"float32": 20}, 40).floor(ceilings) == (8.0, "bytes")
    assert Work({"float32": 20}).times(2).fraction("x", 16.0, ceilings).value == 0.25


def test_work_is_counted_from_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    images = torch.randn(2, 3, 4, 4)
    found = forward_work(model, images, "float32")
    assert found.flops == {"float32": 2 * 2 * (16 * 8 * 27 + 128 * 5)}
    weights, outputs = 8 * 27 + 8 + 128 * 5 + 5, 2 * (8 * 16 + 128 + 5)
    assert found.bytes == 4 * (weights + outputs + 2 * (3 * 16 + 8 * 16 + 128))
    views = [View(site) for site in survey(model, images[:1]).sites]
    sums = moments_work(views, 2, 4)
    assert sums.flops == {"float32": 2 * (2 * 16 * 8 * 9 // 2 + 2 * 5 * 6 // 2)}
    assert sums.bytes == 4 * 2 * (16 * 8 + 5)


def test_subspaces_are_compared_by_angle_and_by_energy() -> None:
    identity = torch.eye(4, dtype=torch.float64)[None]

    def spanned(*order: int) -> Basis:
        rows = identity[:, list(order)]
        return Basis(rows, rows.mT, torch.zeros(1, 4), torch.ones(1, 4))

    assert distance(spanned(0, 1, 2, 3), spanned(1, 0, 3, 2)) == pytest.approx(0, abs=1e-7)
    assert distance(spanned(0, 1, 2, 3), spanned(2, 3, 0, 1)) == pytest.approx(1)
    assert distance(spanned(0, 1, 2, 3), spanned(0, 2, 1, 3)) == pytest.approx(math.sqrt(0.5))
    covariance = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))[None]
    assert kept_energy(spanned(0, 2, 1, 3), covariance) == 6.0


def test_precision_is_put_back() -> None:
    def state() -> tuple[str, bool, bool]:
        backends = torch.backends
        return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    before = state()
    with tensor_cores("tf32"):
        assert state() == ("high", True, True)
        with tensor_cores("float32"):
            assert state() == ("highest", False, False)
        assert state() == ("high", True, True)
    assert state() == before
