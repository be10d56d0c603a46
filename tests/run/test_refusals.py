"""Everything that can be wrong with what a run is given: said in one line, before anything is written."""

import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pictures import picture, save
from tests.runs import CLASSES, Bench, network, tinted, torchrun

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


def with_file(text: str) -> Case:
    def flags(bench: Bench, tmp_path: Path) -> dict[str, object]:
        (tmp_path / "mine.py").write_text(text)
        return {"arch": f"{tmp_path}/mine.py:net", "weights": "none", "pretrain.epochs": 1}

    return flags


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.rmtree(folder / name) for name in names] and None


def truncated(folder: Path) -> None:
    path = folder / "train" / "b" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-40])


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


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
    "a name that is not UTF-8": (
        with_images(lambda folder: (folder / "train" / "a" / "caf\udce9.jpg").write_bytes(b"")),
        "1 names are not UTF-8, and DALI cannot open them: a/caf\\xe9.jpg",
    ),
    "a crop larger than the images": (with_flags(crop=17), "(16×16 pixels, need 17), "),
    "empty image": (with_images(write("train/a/2.jpg", b"")), "a/2.jpg (empty)"),
    "garbage image": (with_images(write("val/d/1.png", b"not an image")), "d/1.png (not an image"),
    "truncated image": (with_images(truncated), "b/3.jpg (truncated JPEG)"),
    "unknown architecture": (with_flags(arch="resnet19"), "unknown architecture 'resnet19'; close: resnet18"),
    "no such network file": (with_flags(arch="absent.py:net"), "there is no file absent.py"),
    "no such function": (with_network("tyni"), "has no function 'tyni'; it has"),
    "a network file that is not Python": (
        with_file("def net(:\n"),
        "mine.py line 1 is not Python: invalid syntax",
    ),
    "a network file that raises": (with_file("1 / 0\n"), "ZeroDivisionError: division by zero (mine.py line 1)"),
    "a forward that raises": (
        with_file(
            "from torch import nn\n\nclass Odd(nn.Linear):\n    def forward(self, x):\n        return x + absent\n"
            "def net(num_classes):\n    return Odd(2, num_classes)\n"
        ),
        "does not take images of 3 × 16 × 16, see --crop (NameError: name 'absent' is not defined (mine.py",
    ),
    "a network of several inputs": (
        with_file(
            "from torch import nn\n\nclass Two(nn.Linear):\n    def forward(self, image, place, scale=1.0):\n"
            "        return place\ndef net(num_classes):\n    return Two(2, num_classes)\n"
        ),
        "takes several inputs (image, place), runs give it images; in Python, dist_prune.compress takes such",
    ),
    "another number of outputs": (with_network("five"), "has 5 outputs, --classes is 4"),
    "another input size": (with_network("dense_only"), "does not take images of 3 × 16 × 16, see --crop"),
    "a layout it cannot have": (
        lambda bench, path: with_network("viewing")(bench, path) | {"channels_last": True},
        "does not take images of 3 × 16 × 16, see --crop and --channels-last (view size is not compatible",
    ),
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
        "5 has output rank 17; expected 1 to 16",
    ),
    "plan of another network": (with_plan('[{"site": "conv7", "rank": 1}]'), "conv7 is not a site here"),
    "plan that is none": (with_plan('{"choices": [{"site": "5"}]}'), "not a plan: every row needs site, rank"),
    "plan not JSON": (with_plan("rank: 5"), "plan.json: not JSON"),
    "plan that is a number": (with_plan("5"), "not a plan"),
    "no sites": (with_flags(sites="layer9*"), "--sites 'layer9*' chooses none of 4 sites (0, 3, 5, 9)"),
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


def without_dali(*words: str) -> int:
    """The program where DALI is not installed."""
    from dist_prune.cli.main import main

    sys.modules.update({"nvidia.dali": None})  # type: ignore[dict-item]  importing it is an ImportError
    return main(list(words))


def test_without_dali_nothing_is_begun(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run")
    done = bench.commands(*words, ranks=2, function="tests.run.test_refusals:without_dali")
    assert done.codes == [2, 2]
    assert len(done.errors) == 1
    assert done.errors[0].startswith("error: reading images needs NVIDIA DALI, which cannot be imported")
    assert "install nvidia-dali-cuda120" in done.errors[0]
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
        "error: --data DIR is missing: a folder with train/ and val/, one folder per class",
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
    flags = with_images(lambda folder: save(folder / "val" / "d" / "2.png", picture(16, 12)))(bench, tmp_path)
    done = bench.commands(*bench.words(tmp_path / "run", **flags), ranks=2)
    assert done.codes == [1, 1], "it had started"
    assert done.errors
    assert all("d/2.png (16×12 pixels, need 16)" in line for line in done.errors)
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
    assert warnings[0].startswith("warning: fewer rows than dimensions in 1 layers (9: 2 for 4): ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(bench: Bench, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = bench.commands(*bench.words(tmp_path / "run"))
    assert done.codes == [1]
    assert len(done.errors) == 1 and "could not be written (Permission denied)" in done.errors[0]
