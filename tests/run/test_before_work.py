"""What a run needs later is looked for before its work; images without labels serve wherever labels are unused."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_prune.utils import files
from tests.pictures import save
from tests.runs import CLASSES, VAL, Bench, result_of, tinted

NOBODY = 65534


# ── images without labels ──────────────────────────────────────────────────────────────────────────────────


def only_val(bench: Bench, folder: Path) -> Path:
    shutil.copytree(bench.data / "val", folder / "val")
    return folder


@pytest.mark.parametrize("method", [pytest.param("pca", marks=pytest.mark.slow), "fisher"])
def test_a_flat_folder_serves_statistics_and_correction_where_there_is_no_train(
    bench: Bench, tmp_path: Path, method: str
) -> None:
    """The same figures as with the same images in train/, whose labels nobody looks at."""
    data, loose = only_val(bench, tmp_path / "data"), tmp_path / "loose"
    shutil.copytree(bench.data / "train", loose)
    flags = {"method": method, "correct": "regression", "calibrate_images": 16, "epochs": 0}
    bench.commands.succeed(*bench.words(tmp_path / "usual", **flags), ranks=2)
    bench.commands.succeed(*bench.words(tmp_path / "run", data=data, calibrate_data=loose, **flags), ranks=2)
    usual, found = result_of(tmp_path / "usual"), result_of(tmp_path / "run")
    assert found["corrected"] == usual["corrected"] and found["parameter_hash"] == usual["parameter_hash"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"40 images of {loose}, without labels" in log
    assert f"held out: 2 images of {loose}, not used to solve from" in log
    assert "held out: 2 training images" in (tmp_path / "usual" / "log.txt").read_text()


def test_a_flat_train_serves_where_no_labels_are_used(bench: Bench, tmp_path: Path) -> None:
    data = only_val(bench, tmp_path / "data")
    for i in range(12):
        save(data / "train" / f"{i}.jpg", tinted(i % 4, i))
    bench.commands.succeed(*bench.words(tmp_path / "run", data=data, epochs=0), ranks=2)
    assert result_of(tmp_path / "run")["projected"]["images"] == VAL * len(CLASSES)
    assert "used without labels" in result_of(tmp_path / "run")["warnings"][0]
    done = bench.commands(*bench.words(tmp_path / "tuned", data=data, epochs=1))
    assert done.codes == [2] and "train has images but no class folders" in done.errors[0]


def test_classes_that_val_lacks_are_said_once(bench: Bench, tmp_path: Path) -> None:
    data = Path(shutil.copytree(bench.data, tmp_path / "data"))
    shutil.rmtree(data / "val" / "b")
    (data / "val" / "c" / "notes.txt").write_text("…")
    done = bench.commands.succeed(*bench.words(tmp_path / "run", data=data, epochs=0), ranks=2)
    assert result_of(tmp_path / "run")["dense"]["images"] == 3 * VAL
    (left, lacking) = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert left.endswith("not of a kind that DALI decodes: 1 .txt")
    assert lacking.endswith("has no images of 1 of 4 classes: b")


# ── statistics of something else ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def collected(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "run"
    bench.commands.succeed(*bench.words(folder, until="statistics"))
    return folder / "statistics.safetensors"


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "views of them": (
        {"mirrored": True, "statistics_views": True},
        "views: None there, {'mirrored': True, 'crops': 0, 'seed': None} here",
    ),
    "fewer images": ({"statistics_images": 8}, "40 images there, 8 here"),
    "as many others": ({"seed": 5, "statistics_images": 39}, "40 images there, 39 here"),
    "another method": ({"method": "fisher"}, "method: pca there, fisher here"),
    "another size": ({"resize": 20}, "resize: 0 there, 20 here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_statistics_of_something_else_are_refused_before_anything_is_written(
    bench: Bench, collected: Path, tmp_path: Path, name: str
) -> None:
    flags, message = OTHERS[name]
    done = bench.commands(*bench.words(tmp_path / "run", statistics=collected, **flags), ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and message in done.errors[0], done.err
    assert "baseline" not in done.out and not (tmp_path / "run").exists()


def test_statistics_of_another_network_are_refused_at_once(bench: Bench, collected: Path, tmp_path: Path) -> None:
    state = torch.load(bench.weights, weights_only=True)
    torch.save({name: 2 * tensor for name, tensor in state.items()}, tmp_path / "other.pt")
    done = bench.commands(*bench.words(tmp_path / "run", statistics=collected, weights=tmp_path / "other.pt"))
    assert done.codes == [2] and "another network there, or other weights" in done.errors[0]
    assert not (tmp_path / "run").exists()


def test_statistics_of_a_network_that_is_trained_first_can_be_taken(bench: Bench, tmp_path: Path) -> None:
    """Before the training nobody knows its weights: they are compared where an earlier run has kept them."""
    trained = {"weights": "none", "pretrain.epochs": 1, "epochs": 0}
    caches = [str(tmp_path / name) for name in ("one", "two")]
    bench.commands.succeed(
        *bench.words(tmp_path / "first", until="statistics", **trained), DIST_PRUNE_CACHE=caches[0]
    )
    statistics = tmp_path / "first" / "statistics.safetensors"
    for number, cache in enumerate(caches):
        words = bench.words(tmp_path / f"run{number}", statistics=statistics, **trained)
        bench.commands.succeed(*words, DIST_PRUNE_CACHE=cache)
    other = trained | {"pretrain.lr": 0.3}
    bench.commands.succeed(*bench.words(tmp_path / "other", **other), DIST_PRUNE_CACHE=caches[0])
    done = bench.commands(
        *bench.words(tmp_path / "refused", statistics=statistics, **other), DIST_PRUNE_CACHE=caches[0]
    )
    assert done.codes == [2] and "another network there" in done.errors[0], done.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"ranks": "budget:macs=0.8", "forms": "all"}, "has no patch moments of 0"),
    ],
)
def test_statistics_that_lack_what_later_stages_need_are_refused_at_once(
    bench: Bench, collected: Path, tmp_path: Path, flags: dict[str, object], text: str
) -> None:
    done = bench.commands(*bench.words(tmp_path / "run", statistics=collected, **flags), ranks=2)
    assert done.codes == [2, 2] and text in done.errors[0], done.err
    assert not (tmp_path / "run").exists()


# ── places that cannot be written ──────────────────────────────────────────────────────────────────────────


def as_nobody(*words: str) -> int:
    """The program for a user who may read everything, and write little."""
    import encodings.idna  # noqa: F401  for host names: Python itself may lie where only root can read

    from dist_prune.cli.main import main

    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    return main(list(words))


UNTRAINED = {"weights": "none", "pretrain.epochs": 1, "epochs": 0}
CACHED: dict[str, dict[str, object]] = {
    "the digits": {"data": "digits", "classes": 10, "crop": 32, "weights": "none", "pretrain.epochs": 1},
    "a network to train": UNTRAINED,
    "latencies": {"ranks": "budget:latency=0.9"},
}


@pytest.fixture
def public(bench: Bench) -> Iterator[Bench]:
    """The bench in a folder that anybody may read: pytest closes its own, again and again where several run."""
    folder = Path(tempfile.mkdtemp(prefix="dist-prune-public-"))
    folder.chmod(0o755)
    there = {name: folder / path.name for name in ("network", "weights") for path in [getattr(bench, name)]}
    for name, path in there.items():
        shutil.copy(getattr(bench, name), path)
        path.chmod(0o644)
    shutil.copytree(bench.data, folder / "images")
    for path in (folder / "images").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "images").chmod(0o755)
    yield replace(bench, data=folder / "images", **there)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_that_cannot_be_written_is_named_by_its_variable_before_work(public: Bench, name: str) -> None:
    cache, out = public.data.parent / "cache", public.data.parent / "out"
    cache.mkdir(mode=0o555)
    out.mkdir()
    out.chmod(0o777)
    words = public.words(out / "run", **CACHED[name])
    place = {"DIST_PRUNE_CACHE": str(cache / "deep")}
    done = public.commands(*words, function="tests.run.test_before_work:as_nobody", ranks=2, **place)
    assert done.codes == [1, 1], done.err
    (line,) = done.errors
    assert "could not be written (Permission denied)" in line and "DIST_PRUNE_CACHE" in line
    assert not (out / "run").exists()


def test_a_run_directory_that_cannot_be_written_is_named_by_its_flag(public: Bench) -> None:
    out = public.data.parent / "out"
    out.mkdir(mode=0o555)
    done = public.commands(*public.words(out / "run"), function="tests.run.test_before_work:as_nobody")
    assert done.codes == [1]
    assert "could not be written (Permission denied)" in done.errors[0] and "--run-dir" in done.errors[0]


def test_a_user_without_a_home_is_asked_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_PRUNE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    with pytest.raises(files.CheckpointError, match=r"Could not determine home.*DIST_PRUNE_CACHE"):
        files.cache_folder()


def test_what_the_statistics_were_made_of_is_kept_with_a_count(collected: Path) -> None:
    from safetensors import safe_open

    with safe_open(collected, "pt") as file:
        assert json.loads(file.metadata()["made_of"])["image_count"] == 40
