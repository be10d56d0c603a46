"""The program as its user starts it: whole runs, and what they leave behind."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.pictures import picture, save
from tests.runs import (
    CLASSES,
    FILES,
    KEYS,
    NETWORK,
    SITES,
    STAGES,
    TRAIN,
    VAL,
    Bench,
    content,
    curves,
    images_of,
    points,
    result_of,
)

# ── whole runs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_leaves_every_file_that_is_promised(runs: dict[int, Path], ranks: int) -> None:
    assert {p.name for p in runs[ranks].iterdir()} >= FILES
    assert any((runs[ranks] / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_result_has_exactly_the_promised_keys(runs: dict[int, Path], ranks: int) -> None:
    result = result_of(runs[ranks])
    assert set(result) == KEYS
    for stage in STAGES:
        figures = result[stage]
        if figures is not None:
            assert {"top1", "top5", "loss", "images"} <= set(figures)
            assert 0 <= figures["top1"] <= figures["top5"] <= 100
            assert figures["images"] == VAL * len(CLASSES)
    assert result["projected"]["kl"] > 0 and result["tuned"]["kl"] > 0
    for cost in ("macs", "params"):
        assert set(result[cost]) == {"dense", "compressed"}
        assert 0 < result[cost]["compressed"] < result[cost]["dense"]
    assert all(isinstance(s, float) and s >= 0 for s in result["seconds"].values())
    assert (result["world_size"], result["seed"]) == (ranks, 0)
    assert (result["method"], result["ranks"]) == ("pca", "uniform:0.5")
    assert len(result["parameter_hash"]) == 64


def test_the_number_of_ranks_does_not_change_what_is_computed(runs: dict[int, Path]) -> None:
    one, *others = (result_of(runs[ranks]) for ranks in (1, 2, 3))
    assert 30 < one["projected"]["top1"] < 100, "the comparison needs a network that knows something"
    for other in others:
        for stage in ("dense", "projected"):
            assert other[stage]["top1"] == pytest.approx(one[stage]["top1"], abs=0.01)
            assert other[stage]["loss"] == pytest.approx(one[stage]["loss"], rel=1e-3)
        assert other["projected"]["kl"] == pytest.approx(one["projected"]["kl"], rel=1e-3)
        assert (other["macs"], other["params"]) == (one["macs"], one["params"])


def print_what_is_loaded(run_dir: str, data: str) -> int:
    from dist_prune import load_compressed
    from dist_prune.distributed.fingerprint import digest

    model = load_compressed(run_dir)
    images, labels = images_of(Path(data) / "val")
    with torch.no_grad():
        logits = model(images)
    loss = nn.functional.cross_entropy(logits.double(), labels).item()
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"hash": digest(model), "top1": top1, "loss": loss, "parameters": parameters}))
    return 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_saved_network_is_the_one_that_was_measured(bench: Bench, runs: dict[int, Path], ranks: int) -> None:
    """Loaded by another process, which knows only the run's directory; images read by Pillow."""
    done = bench.commands.succeed(
        runs[ranks], bench.data, ranks=0, function="tests.test_pipeline:print_what_is_loaded"
    )
    found, result = json.loads(done.out), result_of(runs[ranks])
    assert found["hash"] == result["parameter_hash"]
    assert found["parameters"] == result["params"]["compressed"]
    assert found["top1"] == pytest.approx(result["tuned"]["top1"], abs=0.01)
    assert found["loss"] == pytest.approx(result["tuned"]["loss"], rel=1e-5)


def test_tensorboard_shows_the_run(runs: dict[int, Path]) -> None:
    found, result = curves(runs[2]), result_of(runs[2])
    tags = found.Tags()
    scalars = {f"val/{name}" for name in ("top1", "top5", "loss", "kl")}
    scalars |= {f"train/{name}" for name in ("loss", "lr", "images_per_second")}
    assert set(tags["scalars"]) >= scalars | {f"layer/{site}/rank" for site in SITES}
    assert set(tags["images"]) >= {f"layer/{site}/spectrum" for site in SITES}
    shown = {event.step: event.value for event in found.Scalars("val/top1")}
    text = {step: result[stage]["top1"] for step, stage in enumerate(STAGES) if result[stage]}
    assert shown == pytest.approx(text)
    assert [found.Scalars(f"layer/{site}/rank")[0].value for site in SITES] == [c / 2 for c in SITES.values()]
    assert found.Images("layer/5/spectrum")[0].width > 100
    assert found.Scalars("final/top1")[0].value == pytest.approx(result["tuned"]["top1"])
    assert set(tags["tensors"]) >= {"plan/text_summary", "custom_scalars__config__"}


def test_metrics_jsonl_has_the_same_points(runs: dict[int, Path]) -> None:
    found = curves(runs[2])
    lines = points(runs[2])
    assert {line["group"] for line in lines} == {"val", "top1", "train"}
    losses = [(line["step"], line["loss"]) for line in lines if line["group"] == "train"]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert losses[-1][0] == 2 * math.ceil(TRAIN * len(CLASSES) / 2 / 4)


def test_the_log_holds_what_the_console_showed(runs: dict[int, Path]) -> None:
    log = (runs[2] / "log.txt").read_text()
    assert "2 rank(s) on cpu" in log
    assert f"projected: top-1 {result_of(runs[2])['projected']['top1']:.2f} %" in log
    assert "16×16·3×3" in log, "the plan's table"


def test_config_json_says_how_to_run_it_again(bench: Bench, runs: dict[int, Path]) -> None:
    config = json.loads((runs[2] / "config.json").read_text())
    assert config["run"]["images"]["data"] == str(bench.data)
    assert config["run"]["tuning"]["epochs"] == 2
    assert "--batch-size 4" in config["environment"]["command"]
    assert config["environment"]["packages"]["torch"]


def test_without_fine_tuning_tuned_is_null(bench: Bench, tmp_path: Path) -> None:
    bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0), ranks=2)
    result = result_of(tmp_path / "run")
    assert set(result) == KEYS
    assert result["tuned"] is None
    assert result["projected"]["images"] == VAL * len(CLASSES)


@pytest.mark.slow
def test_the_same_command_gives_the_same_network_and_another_seed_another(
    bench: Bench, runs: dict[int, Path], tmp_path: Path
) -> None:
    for seed in (0, 1):
        bench.commands.succeed(*bench.words(tmp_path / str(seed), seed=seed), ranks=2)
    same, other = (result_of(tmp_path / str(seed))["parameter_hash"] for seed in (0, 1))
    assert same == result_of(runs[2])["parameter_hash"]
    assert same != other, "the order of the training images does not depend on the seed"


def test_a_plan_can_be_edited_and_used_again(bench: Bench, runs: dict[int, Path], tmp_path: Path) -> None:
    plan = json.loads((runs[1] / "plan.json").read_text())
    plan["choices"] = [c | {"rank": 3} for c in plan["choices"] if c["site"] == "5"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0, ranks=tmp_path / "plan.json"))
    used = json.loads((tmp_path / "run" / "plan.json").read_text())["choices"]
    assert {c["site"]: c["rank"] for c in used} == {"0": None, "3": None, "5": 3, "9": None}


def test_dense_weights_are_trained_once_and_then_taken_from_the_cache(bench: Bench, tmp_path: Path) -> None:
    flags = {"weights": "none", "pretrain.epochs": 3, "pretrain.batch_size": 4, "epochs": 0}
    cache = str(tmp_path / "cache")
    for name in ("first", "second"):
        bench.commands.succeed(*bench.words(tmp_path / name, **flags), ranks=2, DIST_PRUNE_CACHE=cache)
    first, second = (result_of(tmp_path / name) for name in ("first", "second"))
    assert "pretrain" in first["seconds"] and "pretrain" not in second["seconds"]
    assert second["dense"] == first["dense"]
    assert second["parameter_hash"] == first["parameter_hash"]


def test_the_cache_is_not_used_for_a_network_that_was_edited(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    flags = {"arch": f"{tmp_path}/net.py:tiny", "weights": "none", "pretrain.epochs": 1, "epochs": 0}
    cache = str(tmp_path / "cache")
    bench.commands.succeed(*bench.words(tmp_path / "first", **flags), DIST_PRUNE_CACHE=cache)
    (tmp_path / "net.py").write_text(NETWORK.replace("nn.ReLU()", "nn.Tanh()"))
    bench.commands.succeed(*bench.words(tmp_path / "second", **flags), DIST_PRUNE_CACHE=cache)
    assert "pretrain" in result_of(tmp_path / "second")["seconds"]


@pytest.mark.slow
def test_photos_of_any_size_through_the_imagenet_recipe(bench: Bench, tmp_path: Path) -> None:
    import torchvision

    sizes = [(300, 420), (500, 333), (375, 500), (311, 307), (480, 320), (333, 499)]
    for part in ("train", "val"):
        for i, (width, height) in enumerate(sizes):
            save(tmp_path / "photos" / part / "xyz"[i % 3] / f"{i}.JPEG", picture(width, height, i))
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "weights.pt")
    words = ["resnet18-imagenet", "--data", tmp_path / "photos", "--weights", tmp_path / "weights.pt"]
    words += ["--classes", 3, "--epochs", 0, "--threads", 1, "--eval-batch-size", 4, "--run-dir", tmp_path / "run"]
    bench.commands.succeed(*words, ranks=2)
    result = result_of(tmp_path / "run")
    assert result["dense"]["images"] == 6
    assert result["macs"]["dense"] == 1_814_073_344 - 997 * 512
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["image"]["crop"] == 224


# ── the plan without a run ─────────────────────────────────────────────────────────────────────────────────


def test_dry_run_needs_no_data_and_no_weights_and_leaves_nothing(bench: Bench) -> None:
    before = set(bench.commands.home.iterdir())
    done = bench.commands.succeed("resnet18-imagenet", "--dry-run", http_proxy="http://127.0.0.1:9")
    assert set(bench.commands.home.iterdir()) == before
    assert "MACs 1814.1 M → " in done.out
    assert "parameters 11.69 M → " in done.out
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.startswith("layer")}
    assert "64×64·3×3" in lines["layer1.0.conv1"] and "32/64" in lines["layer1.0.conv1"]
    assert lines["layer2.0.conv1"].endswith("not in --sites @stride1")
    assert len(lines) == 19
    assert "channels that can be removed: 8 of 13 groups" in done.out


def test_dry_run_does_not_touch_an_existing_run(bench: Bench, runs: dict[int, Path]) -> None:
    before = content(runs[1])
    bench.commands.succeed(*bench.words(runs[1], dry_run=True, overwrite=True))
    assert content(runs[1]) == before
