"""MNIST in its own format: read exactly, refused when damaged, and through the whole pipeline."""

import gzip
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dist_prune.data.dataset import open_dataset
from dist_prune.data.listing import DataError
from dist_prune.data.mnist import has_idx, unpack
from dist_prune.factorization.forms import FORMS
from dist_prune.network.models import build
from dist_prune.network.sites import survey
from tests.commands import shared_commands

RANKS = {"conv1": 8, "conv2": 32, "fc1": 64}


def write_idx(path: Path, values: np.ndarray) -> None:
    """As the format is described, independently of what reads it."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as 28×28 pictures."""
    data = load_digits()
    pictures = [Image.fromarray((i * (255 / 16)).astype(np.uint8)).resize((28, 28)) for i in data.images[:count]]
    return np.stack([np.asarray(p) for p in pictures]), data.target[:count].astype(np.uint8)


def write_mnist(folder: Path, train: int = 40, val: int = 20, ending: str = "") -> Path:
    folder.mkdir(parents=True)
    images, labels = digits(train + val)
    for name, part in (("train", slice(0, train)), ("t10k", slice(train, None))):
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", labels[part])
    return folder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_pixel_and_label_is_kept(tmp_path: Path, ending: str) -> None:
    source = write_mnist(tmp_path / "raw", val=40, ending=ending)
    assert has_idx(source) and not has_idx(tmp_path)
    data, (images, labels) = open_dataset(unpack(source, tmp_path / "cache")), digits(80)
    assert (len(data.train), len(data.val)) == (40, 40)
    assert data.train.classes == data.val.classes == tuple("0123456789")
    for split, offset in ((data.train, 0), (data.val, 40)):
        for file, label in zip(split.files, split.labels, strict=True):
            place = offset + int(Path(file).stem)
            assert np.array_equal(np.asarray(Image.open(split.root / file)), images[place])
            assert label == labels[place]


def test_files_are_unpacked_once_and_whole_and_again_when_they_change(tmp_path: Path) -> None:
    source, cache = write_mnist(tmp_path / "raw"), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=unpack, args=(source, cache)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    (folder,) = cache.iterdir()
    stamp = (folder / "train" / "0").stat().st_mtime_ns
    assert unpack(source, cache) == folder
    assert (folder / "train" / "0").stat().st_mtime_ns == stamp
    write_idx(source / "train-images-idx3-ubyte", 255 - digits(40)[0])
    assert unpack(source, cache) != folder


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def broken_gzip(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())[:-50])
    path.with_suffix(".gz").rename(path.with_name(path.name + ".gz"))
    path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one file missing": (
        without("t10k-labels-idx1-ubyte"),
        r"has no t10k-labels-idx1-ubyte: expected",
    ),
    "labels for images": (
        lambda f: (f / "train-images-idx3-ubyte").write_bytes((f / "train-labels-idx1-ubyte").read_bytes()),
        "train-images-idx3-ubyte: begins with 00000801, expected 00000803 and 3 sizes",
    ),
    "a web page": (
        rewritten("train-labels-idx1-ubyte", lambda _: b"<html>404</html>"),
        "train-labels-idx1-ubyte: begins with 3c68746d, expected 00000801",
    ),
    "empty": (
        rewritten("t10k-images-idx3-ubyte", lambda _: b""),
        "t10k-images-idx3-ubyte: begins with , expected",
    ),
    "truncated": (
        rewritten("train-images-idx3-ubyte", lambda c: c[:-1]),
        "its header promises 40×28×28 values, it has 31359",
    ),
    "too long": (
        rewritten("t10k-labels-idx1-ubyte", lambda c: c + b"\0"),
        "t10k-labels-idx1-ubyte: its header promises 20 values, it has 21",
    ),
    "truncated gzip": (broken_gzip, r"train-images-idx3-ubyte\.gz: cannot be unpacked"),
    "counts that differ": (
        lambda f: write_idx(f / "train-labels-idx1-ubyte", digits(39)[1]),
        "has 40 images, .*train-labels-idx1-ubyte 39 labels: expected as many",
    ),
    "a label too many": (
        lambda f: write_idx(f / "t10k-labels-idx1-ubyte", np.full(20, 10)),
        "has the label 10: expected 0 to 9",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named_and_leave_nothing(tmp_path: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    source = write_mnist(tmp_path / "raw")
    spoil(source)
    with pytest.raises(DataError, match=message):
        unpack(source, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_the_network_is_two_convolutions_and_two_linear_layers() -> None:
    model = build("mnist", 10)
    found = survey(model, torch.zeros(1, 3, 28, 28))
    assert [(s.name, s.kind, s.outputs, s.inputs) for s in found.sites] == [
        ("conv1", "conv", 32, 25),
        ("conv2", "conv", 64, 800),
        ("fc1", "linear", 128, 3136),
        ("fc2", "linear", 10, 128),
    ]
    for site in found.sites[:3]:
        assert FORMS["output"].macs(site, (RANKS[site.name],)) < site.macs
    image = torch.rand(2, 1, 28, 28)
    assert model(image.expand(-1, 3, -1, -1)).shape == (2, 10)


def results(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    result = json.loads((folder / "result.json").read_text())
    choices = json.loads((folder / "plan.json").read_text())["choices"]
    return result, {c["site"]: c["rank"] for c in choices if c["rank"]}


def test_the_recipe_runs_and_beats_the_same_shape_without_training_before(tmp_path: Path) -> None:
    """On a few hundred digits: 8, 32 and 64 channels, fine-tuned for as long from random weights."""
    commands = shared_commands()
    words = ["mnist", "--data", write_mnist(tmp_path / "raw", 300, 100, ".gz"), "--threads", 1]
    words += ["--batch-size", 32, "--pretrain.batch-size", 32, "--pretrain.epochs", 6, "--epochs", 1]
    cache = str(tmp_path / "cache")
    for method in ("pca", "random-init"):
        run = [*words, "--method", method, "--run-dir", tmp_path / method]
        commands.succeed(*run, ranks=2, DIST_PRUNE_CACHE=cache)
    (found, ranks), (untrained, same_ranks) = results(tmp_path / "pca"), results(tmp_path / "random-init")
    assert ranks == same_ranks == RANKS
    assert found["macs"] == untrained["macs"] and found["macs"]["compressed"] < 0.6 * found["macs"]["dense"]
    assert found["dense"]["images"] == 100 and found["dense"]["top1"] > 70
    assert found["tuned"]["top1"] > untrained["tuned"]["top1"] + 10
    assert len([p for p in Path(cache).iterdir() if p.name.startswith("mnist-") and p.is_dir()]) == 1


def test_damaged_files_end_the_run_with_a_line(tmp_path: Path) -> None:
    source = write_mnist(tmp_path / "raw")
    (source / "t10k-images-idx3-ubyte").write_bytes(b"")
    done = shared_commands()("mnist", "--data", source, "--run-dir", tmp_path / "run", ranks=2)
    assert done.codes == [2, 2]
    assert len(done.errors) == 1 and "t10k-images-idx3-ubyte: begins with" in done.errors[0]
    assert not (tmp_path / "run").exists()
