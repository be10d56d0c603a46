"""The program as its user starts it: whole runs, leaving off and coming back, and everything that can be wrong."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.commands import ROOT, Commands, Done, shared_commands
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

def dense_only(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""
SITES = {"0": 8, "3": 16, "5": 16, "9": 4}  # name → channels
STAGES = ("dense", "projected", "corrected", "distilled", "tuned")
KEYS = {*STAGES, "macs", "params", "seconds", "world_size", "seed", "method", "ranks", "parameter_hash"}
FILES = {"config.json", "plan.json", "model.safetensors", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints"}


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
            "epochs": 2,
            "batch_size": 4,
            "run_dir": run_dir,
        }
        words = ["cifar10"]
        for name, value in (given | flags).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("bench")
    (home / "net.py").write_text(NETWORK)
    data = write_images(home / "images")
    return Bench(shared_commands(), data, home / "net.py", write_weights(home / "weights.pt", data))


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
        timeout=120,
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


# ── whole runs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on 1, 2 and 3 ranks; the one on 2 is started by torchrun itself."""
    home = tmp_path_factory.mktemp("runs")
    bench.commands.succeed(*bench.words(home / "1"), ranks=0)
    bench.commands.succeed(*bench.words(home / "3"), ranks=3)
    done = torchrun(bench.commands, *bench.words(home / "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {ranks: home / str(ranks) for ranks in (1, 2, 3)}


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
    from dist_prune.world import digest

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


def curves(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_shows_the_run(runs: dict[int, Path]) -> None:
    found, result = curves(runs[2]), result_of(runs[2])
    tags = found.Tags()
    scalars = {f"val/{name}" for name in ("top1", "top5", "loss", "kl")}
    scalars |= {f"train/{name}" for name in ("loss", "lr", "images_per_second")}
    assert set(tags["scalars"]) >= scalars | {f"layer/{site}/rank" for site in SITES}
    assert set(tags["images"]) >= {f"layer/{site}/spectrum" for site in SITES}
    shown = {event.step: event.value for event in found.Scalars("val/top1")}
    told = {step: result[stage]["top1"] for step, stage in enumerate(STAGES) if result[stage]}
    assert shown == pytest.approx(told)
    assert [found.Scalars(f"layer/{site}/rank")[0].value for site in SITES] == [c / 2 for c in SITES.values()]
    assert found.Images("layer/5/spectrum")[0].width > 100


def test_metrics_jsonl_has_the_same_points(runs: dict[int, Path]) -> None:
    found = curves(runs[2])
    lines = points(runs[2])
    assert {line["group"] for line in lines} == {"val", "train"}
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


def test_dry_run_does_not_touch_an_existing_run(bench: Bench, runs: dict[int, Path]) -> None:
    before = content(runs[1])
    bench.commands.succeed(*bench.words(runs[1], dry_run=True, overwrite=True))
    assert content(runs[1]) == before


# ── leaving off and coming back ────────────────────────────────────────────────────────────────────────────

EPOCHS = 40  # enough that a run killed after its first epoch has not ended when the signal arrives


@pytest.fixture(scope="module")
def killed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks, ended by SIGKILL once it had left its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = bench.commands(*bench.words(folder, epochs=EPOCHS), ranks=2, kill_when=f"{folder}/checkpoints/*.sha256")
    assert done.codes == [-signal.SIGKILL] * 2
    assert not (folder / "result.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:  # what a longer-lived run would have left
        file.write(json.dumps({"group": "train", "step": 10_000, "time": 0, "loss": 0}) + "\n" + '{"group": "tr')
    return folder


def copied(run_dir: Path, folder: Path) -> Path:
    shutil.copytree(run_dir, folder)
    return folder


@pytest.fixture(scope="module")
def resumed(bench: Bench, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = copied(killed, tmp_path_factory.mktemp("resumed") / "run")
    return folder, bench.commands.succeed(*bench.words(folder, epochs=EPOCHS, resume=True), ranks=2)


def test_a_killed_run_resumes_to_the_very_same_network(
    bench: Bench, resumed: tuple[Path, Done], tmp_path: Path
) -> None:
    folder, done = resumed
    assert "resuming after epoch" in done.out
    bench.commands.succeed(*bench.words(tmp_path / "undisturbed", epochs=EPOCHS), ranks=2)
    expected, found = result_of(tmp_path / "undisturbed"), result_of(folder)
    assert found["parameter_hash"] == expected["parameter_hash"]
    assert [found[stage] for stage in STAGES] == [expected[stage] for stage in STAGES]


def test_the_curves_of_a_resumed_run_do_not_overlap(resumed: tuple[Path, Done]) -> None:
    folder, _ = resumed
    steps = EPOCHS * math.ceil(TRAIN * len(CLASSES) / 2 / 4)
    told = [line["step"] for line in points(folder) if line["group"] == "train"]
    shown = [event.step for event in curves(folder).Scalars("train/loss")]
    assert told == sorted(set(told)) and told[-1] == steps
    assert shown == told
    stages = [line["step"] for line in points(folder) if line["group"] == "val"]
    assert stages == sorted(set(stages)) and len(stages) >= 3


def test_a_finished_run_is_left_alone(bench: Bench, resumed: tuple[Path, Done]) -> None:
    folder, _ = resumed
    before = content(folder)
    done = bench.commands.succeed(*bench.words(folder, epochs=EPOCHS, resume=True), ranks=2)
    assert f"{folder} holds a finished run; nothing to resume" in done.out
    assert content(folder) == before


def test_another_number_of_ranks_does_not_resume(bench: Bench, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path / "run")
    done = bench.commands(*bench.words(folder, epochs=EPOCHS, resume=True))
    assert done.codes == [2]
    assert done.errors == [
        "error: --resume: the run was left by 2 ranks, these are 1; start it with 2",
    ]


def test_other_settings_do_not_resume(bench: Bench, killed: Path) -> None:
    before = content(killed)
    done = bench.commands(*bench.words(killed, epochs=EPOCHS, resume=True, seed=7), ranks=2)
    assert all(done.codes)
    assert len(done.errors) == 1 and done.errors[0].endswith("other settings: seed: 0 → 7")
    assert content(killed) == before


def test_resume_with_nothing_there_starts(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands.succeed(*bench.words(tmp_path / "run", epochs=0, resume=True))
    assert "no checkpoint yet: starting from the beginning" in done.out
    assert (tmp_path / "run" / "result.json").exists()


def test_an_existing_run_is_neither_mixed_with_nor_lost(bench: Bench, runs: dict[int, Path]) -> None:
    before = content(runs[1])
    done = bench.commands(*bench.words(runs[1]), ranks=2)
    assert all(done.codes)
    assert len(done.errors) == 1 and "--resume, or replace it with --overwrite" in done.errors[0]
    assert content(runs[1]) == before


def test_overwrite_replaces_all_of_it(bench: Bench, runs: dict[int, Path], tmp_path: Path) -> None:
    folder = copied(runs[1], tmp_path / "run")
    bench.commands.succeed(*bench.words(folder, epochs=0, overwrite=True))
    assert result_of(folder)["tuned"] is None
    assert not (folder / "checkpoints").exists()
    assert [line["group"] for line in points(folder)] == ["val"] * len(points(folder))


# ── what can be wrong ──────────────────────────────────────────────────────────────────────────────────────

Case = Callable[[Bench, Path], dict[str, object]]


def with_images(change: Callable[[Path], object]) -> Case:
    """A copy of the images, changed."""

    def flags(bench: Bench, tmp_path: Path) -> dict[str, object]:
        folder = Path(shutil.copytree(bench.data, tmp_path / "images"))
        change(folder)
        return {"data": folder}

    return flags


def with_flags(**flags: object) -> Case:
    return lambda bench, tmp_path: flags


def with_plan(text: str) -> Case:
    def flags(bench: Bench, tmp_path: Path) -> dict[str, object]:
        (tmp_path / "plan.json").write_text(text)
        return {"ranks": tmp_path / "plan.json"}

    return flags


def with_weights(state: Callable[[Path], object]) -> Case:
    def flags(bench: Bench, tmp_path: Path) -> dict[str, object]:
        torch.save(state(bench.weights), tmp_path / "weights.pt")
        return {"weights": tmp_path / "weights.pt"}

    return flags


def with_network(function: str) -> Case:
    return lambda bench, tmp_path: {"arch": f"{bench.network}:{function}", "weights": "none", "pretrain.epochs": 1}


def occupied(bench: Bench, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "file").write_text("precious")
    return {"run_dir": tmp_path / "file"}


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.rmtree(folder / name) for name in names] and None


def truncated(folder: Path) -> None:
    path = folder / "train" / "b" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-40])


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def emptied(folder: Path) -> None:
    for path in (folder / "val" / "c").iterdir():
        path.unlink()


def thinned(folder: Path) -> None:
    """One class, one image of it in val."""
    for part in ("train", "val"):
        for name in "bcd":
            for path in sorted((folder / part / name).iterdir())[1:]:
                path.unlink()


BAD: dict[str, tuple[Case, str]] = {
    "no such folder": (with_flags(data="nowhere"), "nowhere is not a folder: expected nowhere/{train,val}/"),
    "no train": (with_images(drop("train")), "images/train is not a folder"),
    "no val": (with_images(drop("val")), "images/val is not a folder"),
    "class missing in val": (with_images(drop("val/b")), "differ: only in train: b; only in val: none"),
    "class without images": (with_images(emptied), "has class folders without images: c"),
    "empty image": (with_images(write("train/a/2.jpg", b"")), "a/2.jpg (empty)"),
    "garbage image": (with_images(write("val/d/1.png", b"not an image")), "d/1.png (not an image"),
    "truncated image": (with_images(truncated), "b/3.jpg (truncated JPEG)"),
    "unknown architecture": (with_flags(arch="resnet19"), "unknown architecture 'resnet19'; close: resnet18"),
    "no such network file": (with_flags(arch="absent.py:net"), "there is no file absent.py"),
    "no such function": (with_network("tyni"), "has no function 'tyni'; it has"),
    "another number of outputs": (with_network("five"), "has 5 outputs, --classes is 4"),
    "another input size": (with_network("dense_only"), "does not take images of 3 × 16 × 16, see --crop"),
    "another number of classes": (with_flags(classes=5, weights="none"), "--weights none leaves nothing"),
    "classes of the data": (
        with_flags(classes=5, **{"weights": "none", "pretrain.epochs": 1}),
        "has 4 classes, the network 5 outputs: give --classes 4",
    ),
    "weights absent": (with_flags(weights="absent.pt"), "absent.pt: there is no such file"),
    "weights of another network": (
        with_weights(lambda _: network("five").state_dict()),
        "the checkpoint is of another architecture (2 of another shape: 9.weight (5, 16) for (4, 16)",
    ),
    "weights that are not": (with_weights(lambda _: [1, 2]), "expected a state dict (name → tensor), got list"),
    "ratio too large": (with_flags(ranks="uniform:1.5"), "a ratio must be above 0 and at most 1, got 1.5"),
    "ratio zero": (with_flags(ranks="uniform:0"), "a ratio must be above 0 and at most 1, got 0"),
    "no such rule": (with_flags(ranks="halve"), "--ranks halve: expected uniform:RATIO"),
    "rank too large": (
        with_plan('[{"site": "5", "rank": 17, "reason": ""}]'),
        "5 has rank 17; expected 1 to 16",
    ),
    "plan of another network": (with_plan('[{"site": "conv7", "rank": 1}]'), "conv7 is not a site here"),
    "plan that is none": (with_plan('{"choices": [{"site": "5"}]}'), "not a plan: every row needs site, rank"),
    "plan not JSON": (with_plan("rank: 5"), "plan.json: not JSON"),
    "plan that is a number": (with_plan("5"), "not a plan"),
    "no sites": (with_flags(sites="layer9*"), "--sites 'layer9*' chooses none of 4 sites (0, 3, 5, 9, …)"),
    "unknown kind of site": (with_flags(sites="@depthwise"), "unknown kind '@depthwise'"),
    "cuda where there is none": (with_flags(device="cuda"), "sees no GPU"),
    "run directory is a file": (occupied, "holds files that are not of a run"),
    "statistics of too many": (with_flags(statistics_images=-1), "--statistics-images -1: expected"),
    "negative epochs": (with_flags(epochs=-1), "--epochs -1: expected 0 or more"),
    "both ways": (with_flags(resume=True, overwrite=True), "--resume and --overwrite exclude each other"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_said_in_one_line_before_anything_is_written(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    case, message = BAD[name]
    before = set(bench.commands.home.iterdir())
    done = bench.commands(*bench.words(tmp_path / "run", **case(bench, tmp_path)))
    assert done.codes == [2] or (name == "run directory is a file" and done.codes == [1])
    assert len(done.errors) == 1 and message in done.errors[0], done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
    assert set(bench.commands.home.iterdir()) - {bench.commands.home / "cache"} == before - {
        bench.commands.home / "cache"
    }


@pytest.mark.parametrize("name", ["truncated image", "unknown architecture", "cuda where there is none"])
def test_several_ranks_say_it_once(bench: Bench, tmp_path: Path, name: str) -> None:
    case, message = BAD[name]
    done = bench.commands(*bench.words(tmp_path / "run", **case(bench, tmp_path)), ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and message in done.errors[0], done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no such folder", "garbage image", "ratio too large", "weights absent"])
def test_torchrun_shows_the_error_line(bench: Bench, tmp_path: Path, name: str) -> None:
    """torchrun ends the other ranks as soon as one has ended: the line must be out by then."""
    case, message = BAD[name]
    done = torchrun(bench.commands, *bench.words(tmp_path / "run", **case(bench, tmp_path)))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_images(bench: Bench, tmp_path: Path) -> None:
    """Refused before the run's directory is made; the message says how many ranks would do."""
    flags = with_images(thinned)(bench, tmp_path)
    shutil.rmtree(tmp_path / "images" / "val")
    for name in CLASSES[:2]:
        save(tmp_path / "images" / "val" / name / "x.jpg", tinted(0, 0))
        shutil.rmtree(tmp_path / "images" / "train" / CLASSES[2 + "ab".index(name)])
    flags |= {"classes": 2, "weights": "none", "pretrain.epochs": 1}
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=3)
    assert done.codes == [2, 2, 2]
    assert len(done.errors) == 1 and "2 images in" in done.errors[0] and "use at most 2 ranks" in done.errors[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_gets_a_close_match(bench: Bench) -> None:
    done = bench.commands("resnet18-imagnet", ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1
    assert "unknown recipe 'resnet18-imagnet'; did you mean resnet18-imagenet" in done.errors[0]


def test_an_unknown_flag_is_named(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", epoch_count=3), ranks=2)
    assert done.codes == [2, 2]
    assert done.err.count("Unrecognized options: --epoch-count") == 1
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", data=None))
    assert done.codes == [2]
    assert done.errors == [
        "error: --data DIR is missing: a folder with train/ and val/, one folder a class",
    ]


def test_weights_that_are_not_numbers_name_the_first_layer_that_shows_it(bench: Bench, tmp_path: Path) -> None:
    def poisoned(file: Path) -> object:
        state = torch.load(file, weights_only=True)
        state["3.weight"][0, 0, 0, 0] = math.nan
        return state

    flags = with_weights(poisoned)(bench, tmp_path)
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert all(done.codes)
    assert len(done.errors) == 1
    assert "error: 3: its statistics hold NaN or infinity. Check the weights" in done.errors[0]
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_picture_that_cannot_be_used_is_named_in_the_middle_of_the_work(bench: Bench, tmp_path: Path) -> None:
    """Found by one rank: all hear of it, none waits for another."""
    flags = with_images(lambda folder: save(folder / "val" / "d" / "1.png", picture(16, 12)))(bench, tmp_path)
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert all(done.codes)
    assert done.errors
    assert all("d/1.png (16×12 pixels, need 16)" in line for line in done.errors)
    assert "Traceback" not in done.err
    assert done.seconds < 30


def test_training_that_explodes_is_told(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", lr=1e30, warmup=0), ranks=2)
    assert done.codes == [1, 1]
    assert done.errors and "try a lower --lr (it is 1e+30)" in done.errors[0]
    assert "Traceback" not in done.err
    assert not (tmp_path / "run" / "result.json").exists()


def test_fewer_rows_than_dimensions_are_warned_of(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", epochs=0, statistics_images=2, sites="5,9")
    done = bench.commands.succeed(*words, ranks=2)
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: 9: 2 rows for 4 dimensions")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(bench: Bench, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = bench.commands(*bench.words(tmp_path / "run"))
    assert done.codes == [1]
    assert len(done.errors) == 1 and "could not be written (Permission denied)" in done.errors[0]
