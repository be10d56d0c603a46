"""`dist-prune check`: a machine that is ready, and one thing wrong at a time."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from dist_prune.cli import folders, machine
from dist_prune.cli.check import looked, looks
from dist_prune.cli.findings import Finding, agreed, shown
from dist_prune.config.recipes import parse
from dist_prune.distributed.world import World
from tests.commands import PROGRAM
from tests.runs import Bench

SUBJECTS = ("packages", "device", "ranks", "DALI", "space for runs", "space for cache", "run directory")
SUBJECTS += ("shared folder", "locks", "train", "val", "classes", "read", "weights", "network", "plan")


def verdicts(out: str) -> dict[str, str]:
    lines = [line for line in out.splitlines() if line.startswith(("ok", "warn", "fail"))]
    return {subject: line[:4].strip() for line in lines for subject in SUBJECTS if line[6:].startswith(subject)}


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_machine_that_is_ready(bench: Bench, tmp_path: Path, ranks: int) -> None:
    words = bench.words(tmp_path / "run", device="cpu")
    done = bench.commands.succeed("check", *words, function=PROGRAM, ranks=ranks)
    found = verdicts(done.out)
    assert set(found) == set(SUBJECTS)
    assert not [subject for subject, verdict in found.items() if verdict == "fail"]
    assert "40 images in" in done.out and "36 images in" in done.out and "\nready\n" in done.out
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"


def findings(subject: str, bench: Bench, world: World, run_dir: Path, **flags: object) -> dict[str, Finding]:
    """What one look finds."""
    config = parse([str(word) for word in bench.words(run_dir, **({"device": "cpu"} | flags))])
    return {f.subject: f for f in agreed(looked(subject, looks(config, world)[subject]), world)}


def test_damaged_images_are_named(bench: Bench, world: World, tmp_path: Path) -> None:
    data = Path(shutil.copytree(bench.data, tmp_path / "images"))
    (data / "val/b/3.png").write_bytes(b"")
    found = findings("images", bench, world, tmp_path / "run", data=data)
    assert found["images"].verdict == "fail" and "b/3.png (empty)" in found["images"].text
    (data / "val/b/3.png").write_bytes((bench.data / "val/b/4.png").read_bytes())
    broken = bytearray((data / "train/a/0.jpg").read_bytes())
    broken[4:200] = bytes(196)  # both ends are sound
    (data / "train/a/0.jpg").write_bytes(bytes(broken))
    found = findings("images", bench, world, tmp_path / "run", data=data)
    assert found["train"].verdict == "ok" and "a/0.jpg" in found["images"].text


def test_classes_that_are_not_the_networks(bench: Bench, world: World, tmp_path: Path) -> None:
    found = findings("images", bench, world, tmp_path / "run", classes=7)
    assert found["images"].verdict == "fail" and "has 4 classes, the network 7 outputs" in found["images"].text


def test_without_data_nothing_is_claimed(bench: Bench, world: World, tmp_path: Path) -> None:
    found = findings("images", bench, world, tmp_path / "run", data=None)
    assert [f.verdict for f in found.values()] == ["warn"]


@pytest.mark.parametrize(
    ("flags", "verdict", "text"),
    [
        ({"weights": "none"}, "fail", "none, and no --pretrain.epochs"),
        ({"weights": "none", "pretrain.epochs": 2}, "ok", "trained first, 2 epochs"),
        ({"weights": "absent.pt"}, "fail", "no such file"),
        ({"arch": "resnet18", "weights": "IMAGENET1K_V1", "classes": 1000, "crop": 64}, "warn", "downloaded"),
    ],
)
def test_weights_that_are_not_there(
    bench: Bench,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, object],
    verdict: str,
    text: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = findings("weights", bench, world, tmp_path / "run", **flags)["weights"]
    assert (found.verdict, text in found.text) == (verdict, True), found
    assert "IMAGENET1K_V1" not in found.text or "resnet18-f37072fd.pth" in found.advice


@pytest.fixture(scope="module")
def collected(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "run"
    bench.commands.succeed(*bench.words(folder, until="statistics"))
    return folder / "statistics.safetensors"


def test_statistics_are_compared_with_what_the_run_would_need(
    bench: Bench, collected: Path, tmp_path: Path
) -> None:
    words = {"device": "cpu", "statistics": collected}
    done = bench.commands.succeed("check", *bench.words(tmp_path / "run", **words), function=PROGRAM, ranks=2)
    assert "of these images and this network" in done.out and "\nready\n" in done.out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"statistics": "absent.safetensors"}, "there is no such file"),
        ({"statistics_images": 8}, "40 images there, 8 here"),
        ({"resize": 20}, "resize: 0 there, 20 here"),
        ({"method": "fisher"}, "method: pca there, fisher here"),
        ({"weights": "other"}, "another network there, or other weights"),
        ({"statistics": "damaged"}, "damaged"),
        ({"statistics": None, "ranks": "budget:macs=0.01"}, "out of reach"),
        ({"statistics": None, "correct": "regression", "calibrate_data": "few"}, "7 images in"),
        ({"statistics": None, "data": None}, "not looked at"),
    ],
)
def test_what_the_stages_need_is_tried_as_a_run_tries_it(
    bench: Bench, world: World, collected: Path, tmp_path: Path, flags: dict[str, object], text: str
) -> None:
    """Each of these would end a run before its work."""
    if flags.get("weights") == "other":
        state = torch.load(bench.weights, weights_only=True)
        torch.save({name: 2 * tensor for name, tensor in state.items()}, tmp_path / "other.pt")
        flags = flags | {"weights": tmp_path / "other.pt"}
    if flags.get("statistics") == "damaged":
        damaged = Path(shutil.copytree(collected.parent, tmp_path / "damaged")) / collected.name
        damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(range(8)))
        flags = flags | {"statistics": damaged}
    if flags.get("calibrate_data") == "few":
        few = sorted((bench.data / "train" / "a").iterdir())[:7]
        (tmp_path / "few").mkdir()
        flags = flags | {"calibrate_data": tmp_path / "few"}
        for path in few:
            shutil.copy(path, tmp_path / "few")
    words = bench.words(tmp_path / "run", **({"device": "cpu", "statistics": collected} | flags))
    found = looks(parse([str(word) for word in words]), world)
    for subject in ("images", "weights"):
        looked(subject, found[subject])
    (finding,) = [each for each in looked("plan", found["plan"]) if each.verdict != "ok"]
    assert text in finding.text, finding


def test_a_run_directory_that_is_taken(bench: Bench, world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    found = findings("run directory", bench, world, tmp_path / "run")["run directory"]
    assert found.verdict == "fail" and "not of a run" in found.text


def test_a_folder_that_cannot_be_written(bench: Bench, world: World) -> None:
    found = findings("shared folder", bench, world, Path("/proc/nothing/run"))["shared folder"]
    assert found.verdict == "fail" and "/proc cannot be written" in found.text
    found = findings("space", bench, world, Path("/proc/nothing/run"))["space for runs"]
    assert found.verdict == "fail" and "0.0 GB free" in found.text


def test_a_rank_that_does_not_see_anothers_file(
    bench: Bench, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PATIENCE_S", 0.3)
    (tmp_path / "0.txt").touch()
    assert folders._unseen(tmp_path, 3) == [1, 2]
    assert folders._unseen(tmp_path, 1) == []


def test_a_lock_that_keeps_nobody_out_is_found(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert "got what another holds" in folders._hole_in_lock(tmp_path / "lock")


def test_another_version_than_asked_for_fails(
    bench: Bench, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [Requirement("torch>=99"), Requirement("no-such-package>=1"), Requirement("numpy>=2")]
    monkeypatch.setattr(machine, "requirements", lambda: wanted)
    found = findings("packages", bench, world, tmp_path / "run")
    assert found["torch"].verdict == found["no-such-package"].verdict == "fail"
    assert ">=99" in found["torch"].text and "not installed" in found["no-such-package"].text
    assert "numpy" in found["packages"].text


def test_what_this_program_needs_is_known() -> None:
    assert {"torch", "torchvision", "numpy", "submitit", "nvidia-dali-cuda120"} <= {
        r.name for r in machine.requirements()
    }


class Two:
    """Two ranks, of which the second found something worse."""

    def gather(self, mine: list[Finding]) -> list[list[Finding]]:
        return [mine, [Finding("disk", "fail", "full", "make room"), Finding("GPU", "ok", "another")]]


def test_the_worst_of_all_ranks_is_told_with_its_rank() -> None:
    world: Any = Two()
    found = agreed([Finding("disk", "warn", "low"), Finding("GPU", "ok", "one")], world)
    assert found == [Finding("disk", "fail", "rank 1: full", "make room"), Finding("GPU", "ok", "one")]


def test_findings_fit_sixty_columns() -> None:
    lines = shown(Finding("shared folder", "fail", "a long story " * 9, "what to do " * 9), 60).splitlines()
    assert all(len(line) <= 60 for line in lines) and lines[0].startswith("fail  shared folder")


def test_what_fails_ends_with_exit_code_1(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", device="cpu", data=tmp_path)
    done = bench.commands("check", *words, function=PROGRAM, ranks=2)
    assert done.codes == [1, 1] and verdicts(done.out)["network"] == "ok"
    assert "train is not a folder" in done.out.replace("\n" + " " * 22, " ")
    assert subprocess.run(["ls", str(tmp_path)], capture_output=True, check=True).stdout == b""
