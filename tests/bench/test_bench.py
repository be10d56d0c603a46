import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_prune.network.models import build
from dist_prune.statistics import symmetric
from dist_prune.statistics.moments import Accumulator
from tests.bench.packed import SEVERAL, SINGLE, UNPACKED, opened_slowly, slow_opens
from tests.bench.timing import Pair, interleaved, machine
from tests.pictures import picture, save

NAMES = [
    "statistics pass ÷ forward: time",
    "… both channels last",
    "forward: channels last ÷ first",
    "statistics pass: channels last ÷ first",
    "statistics pass ÷ forward: memory",
    "fine-tuning ÷ bare DDP, 1 rank",
    "fine-tuning ÷ bare DDP, 2 ranks",
]


@pytest.mark.slow
def test_the_speed_comparison_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "new" / "speed.json"
    words = [sys.executable, "-m", "tests.bench.speed", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert list(found) == ["command", "date", "machine", "rows"]
    assert found["command"].startswith("uv run python -m tests.bench.speed --quick")
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["cpu"]
    assert [row["name"] for row in found["rows"]] == NAMES
    for row in found["rows"]:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["target"] >= 1
        assert "resnet18" in row["detail"]
        assert row["name"] in done.stdout


@pytest.mark.slow
def test_the_curvature_comparison_runs(tmp_path: Path) -> None:
    output = tmp_path / "curvature.json"
    words = [sys.executable, "-m", "tests.bench.curvature", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(output.read_text())["rows"]]
    assert names[:3] == [f"{kind} ÷ forward + backward" for kind in ("fisher", "gradient", "hessian-local")]
    assert len(names) == 6


@pytest.mark.slow
def test_the_start_with_many_files_runs(tmp_path: Path) -> None:
    """The second start finds the files sound and opens none."""
    save(tmp_path / "data" / "x.jpg", picture(240, 230, 0))
    output = tmp_path / "startup.json"
    sizes = ["--files", "3000", "--ranks", "2", "--output", str(output)]
    words = ["tests.bench.startup", "--images", str(tmp_path / "data"), *sizes]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=280)
    found = json.loads(output.read_text())
    assert list(found["first"]["seconds"]) == ["joined", "listed", "checked", "first batch"]
    assert found["second"]["read"] < 10_000 < found["first"]["read"] <= 3000 * 8192


@pytest.mark.slow
def test_the_comparison_of_loaders_runs(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i in range(5):
            save(tmp_path / "data" / part / str(i % 2) / f"{i}.jpg", picture(240 + i, 230, i))
    output = tmp_path / "loading.json"
    words = ["tests.bench.loading", "--quick", "--data", str(tmp_path / "data"), "--output", str(output)]
    done = subprocess.run([sys.executable, "-m", *words], check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["command"].startswith("uv run python -m tests.bench.loading --quick --data DIR")
    names = [row["name"] for row in found["rows"]]
    parts = ("training", "validation")
    assert names[:2] == [f"DALI, {part} ÷ torchvision, {part}, cpu seconds" for part in parts]
    assert len(names) == 7
    assert all(row["ratio"] > 0 and row["name"] in done.stdout for row in found["rows"])


@pytest.mark.slow
def test_where_files_open_slowly_threads_open_them_faster_than_dalis_reader(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i in range(1500 if part == "train" else 2):
            save(tmp_path / "data" / part / str(i % 2) / f"{i}.jpg", picture(32, 32, i % 7))
    library, data = slow_opens(tmp_path), (tmp_path / "data").resolve()
    one, several, trained = (opened_slowly(read, data, library, 10) for read in (SINGLE, SEVERAL, UNPACKED))
    assert max(one, trained) <= 100, "a wait of 10 ms in every opening"
    assert several > 3 * max(one, trained)


@pytest.mark.slow
def test_the_comparison_of_solves_and_pass_runs(tmp_path: Path) -> None:
    output = tmp_path / "eigen.json"
    words = [sys.executable, "-m", "tests.bench.eigen", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    eight, many, few = json.loads(output.read_text())["rows"]
    assert eight["name"] == "resnet18, 8 ranks, 1,281,167 images: solves ÷ pass"
    assert many["ratio"] == pytest.approx(
        8 * eight["ratio"], rel=1e-6
    )  # the widest layer alone is the share of both
    assert few["ratio"] == pytest.approx(128.1167 * eight["ratio"], rel=1e-6)


@pytest.mark.slow
def test_the_cost_of_planning_is_put_together_for_a_run(tmp_path: Path) -> None:
    output = tmp_path / "planning.json"
    words = [sys.executable, "-m", "tests.bench.planning", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    planning, solving = json.loads(output.read_text())["rows"]
    assert planning["detail"] == solving["detail"]
    parts = re.findall(r"([a-z ]+) ([\d.e+-]+)(?:,|$)", planning["detail"].split("CPU seconds:")[1])
    whole, losses, decompositions, choice, forward, correction = (float(value) for _, value in parts)
    assert planning["ratio"] == pytest.approx((losses + decompositions + choice) / whole, rel=1e-2)
    assert solving["ratio"] == pytest.approx((correction - 120) / forward, rel=1e-2)


@pytest.mark.slow
def test_the_profile_names_what_each_phase_spends_most_in(tmp_path: Path) -> None:
    output = tmp_path / "profiles.json"
    words = [sys.executable, "-m", "tests.bench.profiles", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    phases = ["statistics, pca", "statistics, fisher", "correction", "fine-tuning"]
    assert [row["phase"] for row in rows] == [phase for phase in phases for _ in range(5)]
    for phase in phases:
        shares = [row["share"] for row in rows if row["phase"] == phase]
        assert shares == sorted(shares, reverse=True)
        assert 0.3 < sum(shares) < 1
    assert {"aten::convolution_backward"} <= {row["name"] for row in rows if row["phase"] == "fine-tuning"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quality_comparison_runs(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("val", 3)):
        for label in range(10):
            for i in range(count):
                save(tmp_path / "data" / part / str(label) / f"{i}.jpg", picture(32, 32, 100 * label + i))
    torch.manual_seed(0)
    dense = build("resnet20", 10)
    for norm in (module for module in dense.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # equal scales say nothing about channels
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    given = ["--data", tmp_path / "data", "--weights", tmp_path / "dense.pt", "--runs", tmp_path / "runs"]
    asked = ["--seeds", 0, "--budgets", 0.584, "--peers", "--tuned", 0, "--tuning-images", 20]
    words = [*given, *asked, "--output", tmp_path / "quality.json"]
    command = [sys.executable, "-m", "tests.bench.quality", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["way"].split(",")[0] for row in found] == [
        "PCA",
        *4 * ["all forms and widths"],
        *2 * ["all forms"],
        *2 * ["widths alone"],
        *2 * ["k×k → 1×1 alone"],
        "weight SVD",
        "Tucker-2 of the weights",
        "BALF: whitened SVD",
        *6 * ["Torch-Pruning"],
    ]
    assert all(0 < row["macs"] <= 0.585 for row in found)
    assert all(len(row["tuned"]) == (0 if ", by budget, 512" in row["way"] else 2) for row in found)


def test_turns_alternate_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []
    taken = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), 3, torch.device("cpu"))
    assert "".join(calls) == "ab" + "abbaab"
    assert len(taken.ours) == len(taken.plain) == 3


def test_a_row_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    row = Pair(ours=(2.0, 3.0, 40.0), plain=(1.0, 2.0, 4.0)).row("x", 1.1, "y")
    assert (row.ratio, row.low, row.high) == (2.0, 1.5, 10.0)


def test_the_machine_is_described_in_plain_types() -> None:
    assert json.loads(json.dumps(machine())) == machine()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_makes_the_statistics_fast_leaves_them_right(
    groups: int, layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks, the last one smaller; several panels, the last one narrower; every layout."""
    monkeypatch.setattr(symmetric, "CPU_TILES", symmetric.Tiles(8 * 60 * 49 * 4, 7, 1, False))
    y = torch.randn(19, 60, 7, 7, generator=torch.Generator().manual_seed(0)) + 3
    y = y.to(dtype).contiguous(memory_format=layout)
    accumulator = Accumulator(groups, 60 // groups, torch.device("cpu"))
    for part in (y[:2], y[2:]):
        accumulator.add(part.flatten(2).transpose(0, 1))
    found = accumulator.moments()
    rows = y.double().transpose(0, 1).reshape(groups, 60 // groups, -1)
    expected = torch.stack([torch.cov(group, correction=0) for group in rows])
    torch.testing.assert_close(found.covariance, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean, rows.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.outer, found.outer.mT)
    assert int(found.count) == 19 * 49


@pytest.mark.slow
def test_the_latency_comparison_runs(tmp_path: Path) -> None:
    output = tmp_path / "latency.json"
    words = [sys.executable, "-m", "tests.bench.latency", "--quick", "--output", str(output)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    rows = [(row["rule"], row["engine"], row["batch"]) for row in found["rows"]]
    assert rows == [(rule, "eager", batch) for rule in ("uniform:0.5", "uniform:0.25") for batch in (1, 2)]
    for row in found["rows"]:
        assert 0 < row["macs_ratio"] < 1
        assert row["saving"] == pytest.approx((1 - row["time_ratio"]) / (1 - row["macs_ratio"]))
        assert row["low"] <= row["saving"] <= row["high"]
    assert found["sites"]["uniform:0.5"]


@pytest.mark.slow
def test_the_comparison_on_imagenet_runs_and_keeps_the_rows_of_other_networks(tmp_path: Path) -> None:
    for part in ("calibrate", "val"):
        for i in range(9):
            save(tmp_path / "photos" / part / f"{i:03}-n0{i}.jpg", picture(40, 40, i))
    output = tmp_path / "imagenet.json"
    output.write_text(json.dumps({"rows": [{"network": "other", "way": "ours", "budget": 0.5}]}))
    words = ["tests.bench.imagenet", "--photos", str(tmp_path / "photos"), "--arch", "resnet20", "--crop", "32"]
    words += ["--budgets", "0.6", "--ways", "ours", "PCA, uniform", "--output", str(output), "--classes", "10"]
    done = subprocess.run([sys.executable, "-m", *words], check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    other, *found = json.loads(output.read_text())["rows"]
    assert other["network"] == "other"
    assert [(row["way"], row["budget"]) for row in found] == [("dense", 1.0), ("ours", 0.6), ("PCA, uniform", 0.6)]
    dense, ours, pca = found
    assert dense["kl"] == 0 and dense["top5"] >= dense["top1"]
    for row in (ours, pca):
        assert row["macs"] <= 0.6 and row["kl"] > 0
    assert ours["predicted"] > 0 and ours["held_out"] > 0 and pca["predicted"] is None
