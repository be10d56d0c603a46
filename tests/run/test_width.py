"""Runs that remove channels: the budget, what is saved, every stage after, ranks, and resuming."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_prune import load_compressed
from dist_prune.distributed.fingerprint import digest
from dist_prune.network.factored import Factored
from tests.commands import PROGRAM
from tests.runs import CLASSES, VAL, WHOLE, Bench, copied, images_of, result_of

NARROW = {**WHOLE, "ranks": "budget:macs=0.5", "width": "on", "measure_sites": None}
BOTH = {**NARROW, "ranks": "budget:macs=0.3", "measure_sites": True, "distill_features": 1}


@pytest.fixture(scope="module")
def narrow(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """On one rank and on three, so that three ranks share nine images each class unevenly."""
    folders = {ranks: tmp_path_factory.mktemp("narrow") / f"{ranks}" for ranks in (1, 3)}
    for ranks, folder in folders.items():
        done = bench.commands.succeed(*bench.words(folder, **NARROW), ranks=ranks)
        assert "channels removed in" in done.out
    return folders


@pytest.fixture(scope="module")
def both(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both") / "run"
    bench.commands.succeed(*bench.words(folder, **BOTH), ranks=2)
    return folder


def kept(run_dir: Path) -> dict[str, list[int]]:
    return {w["producers"][0]: w["kept"] for w in json.loads((run_dir / "plan.json").read_text())["widths"]}


def test_the_budget_is_met(narrow: dict[int, Path]) -> None:
    result, model = result_of(narrow[1]), load_compressed(narrow[1])
    assert 0.4 < result["macs"]["compressed"] / result["macs"]["dense"] <= 0.5
    assert result["params"]["compressed"] == sum(p.numel() for p in model.parameters())
    widths = kept(narrow[1])
    assert {"0", "3", "5"} >= set(widths) and widths
    ends = {name: [m for m in model.get_submodule(name).modules() if isinstance(m, nn.Conv2d)] for name in widths}
    assert all(ends[name][-1].out_channels == len(channels) for name, channels in widths.items())


def test_any_number_of_ranks_removes_the_same_channels(narrow: dict[int, Path]) -> None:
    one, three = result_of(narrow[1]), result_of(narrow[3])
    assert kept(narrow[1]) == kept(narrow[3])
    assert three["projected"]["kl"] == pytest.approx(one["projected"]["kl"], rel=1e-3)
    assert three["macs"] == one["macs"]


@pytest.mark.parametrize("which", ["narrow", "both"])
def test_what_is_loaded_is_what_was_measured(
    bench: Bench, narrow: dict[int, Path], both: Path, which: str
) -> None:
    folder = narrow[1] if which == "narrow" else both
    model, result = load_compressed(folder), result_of(folder)
    images, labels = images_of(bench.data / "val")
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean().item()
    assert len(images) == VAL * len(CLASSES)
    assert digest(model) == result["parameter_hash"]
    assert 100 * right == pytest.approx(result["tuned"]["top1"], abs=0.01)


def test_layers_are_factored_for_what_channels_leave_of_the_budget(both: Path) -> None:
    result, model = result_of(both), load_compressed(both)
    assert result["macs"]["compressed"] <= 0.3 * result["macs"]["dense"]
    assert kept(both) and any(isinstance(module, Factored) for module in model.modules())
    assert result["params"]["compressed"] == sum(p.numel() for p in model.parameters())
    assert all(result[stage] for stage in ("projected", "corrected", "distilled", "tuned"))


def test_a_killed_run_resumes_to_the_very_same_network(bench: Bench, both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    done = bench.commands(*bench.words(folder, **BOTH), ranks=2, kill_when=f"{folder}/checkpoints/00000003*")
    assert all(done.codes)
    bench.commands.succeed(*bench.words(folder, **BOTH, resume=True), ranks=2)
    assert result_of(folder)["parameter_hash"] == result_of(both)["parameter_hash"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"step": 0.7}, pytest.param({"alternate": 1}, marks=pytest.mark.slow)])
def test_rounds_begin_with_the_narrow_network(bench: Bench, tmp_path: Path, way: dict[str, object]) -> None:
    flags = {**NARROW, "ranks": "budget:macs=0.3", "correct": "none", "distill_steps": None, "tune_epochs": 1}
    bench.commands.succeed(*bench.words(tmp_path / "run", **flags, **way), ranks=2)
    result = result_of(tmp_path / "run")
    assert kept(tmp_path / "run") and result["macs"]["compressed"] <= 0.3 * result["macs"]["dense"]
    assert digest(load_compressed(tmp_path / "run")) == result["parameter_hash"]


@pytest.mark.parametrize(
    "form",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch-export")), "state-dict", "python"],
)
def test_exports_compute_the_same(bench: Bench, both: Path, tmp_path: Path, form: str) -> None:
    """What is written is read back and compared; a difference is an error."""
    folder = copied(both, tmp_path / "run")
    bench.commands.succeed("export", folder, "--format", form, ranks=0, function=PROGRAM)


@pytest.mark.parametrize("command", [pytest.param("speed", marks=pytest.mark.slow), "report", "compare"])
def test_a_run_with_fewer_channels_is_read_like_any_other(
    bench: Bench, both: Path, narrow: dict[int, Path], tmp_path: Path, command: str
) -> None:
    folder = copied(both, tmp_path / "run")
    more = [narrow[1]] if command == "compare" else []
    bench.commands.succeed(command, folder, *more, ranks=0, function=PROGRAM)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"width": "on"}, "--width on with --ranks uniform:0.5: channels are removed for a budget of MACs"),
        ({"width": "on", "ranks": "budget:macs=0.01", "method": "fisher"}, "out of reach, the least is"),
        ({"width": "on", "ranks": "budget:macs=0.5", "method": "pca"}, "--width on with --method pca"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    bench: Bench, tmp_path: Path, flags: dict[str, object], said: str
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert done.codes == [2, 2]
    assert any(said in line for line in done.errors)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_removes_channels_is_not_taken_for_one_of_the_whole_network(
    bench: Bench, narrow: dict[int, Path], tmp_path: Path
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", ranks=narrow[1] / "plan.json"), ranks=1)
    assert done.codes == [2]
    assert any("removes channels of" in line and "--width off" in line for line in done.errors)
    assert not (tmp_path / "run").exists()
