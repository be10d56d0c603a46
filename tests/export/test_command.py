"""`dist-prune export`: what leaves a run computes what the run's network computes, or does not leave it."""

import shutil
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_prune import load_compressed
from dist_prune.data.listing import DataError
from dist_prune.export.command import main
from dist_prune.export.formats import ExportError, compare, write_onnx, write_program
from dist_prune.utils.files import CheckpointError
from tests.runs import Bench, images_of

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def validation(bench: Bench) -> Tensor:
    return images_of(bench.data / "val")[0]


def logits(run: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return load_compressed(run)(images)


def test_onnx_is_held_against_pytorch_on_the_images_of_the_run(
    run: Path, bench: Bench, validation: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert main([str(run), "--format", "onnx", "--opset", "18"]) == 0
    said = capsys.readouterr().out
    assert "opset 18, images (batch, 3, 16, 16) → logits (batch, 4)" in said
    assert f"onnxruntime against PyTorch on 36 validation images of {bench.data}: largest difference" in said
    assert "top-1 the same for 36 of 36" in said

    path = run / "model.onnx"
    assert onnx.load(path).opset_import[0].version == 18
    assert [p.name for p in run.glob("*onnx*")] == ["model.onnx"], "weights are in the file"
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (found,) = session.run(None, {"images": validation[:count].numpy()})
        np.testing.assert_allclose(found, logits(run, validation[:count]), rtol=1e-4, atol=1e-5)


def test_a_torch_export_program_takes_any_number_of_images(
    run: Path, validation: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "net.pt2"
    assert main([str(run), "--format", "torch-export", "--out", str(path)]) == 0
    assert "top-1 the same for 36 of 36" in capsys.readouterr().out
    program = torch.export.load(path).module()
    for count in (1, 5):
        torch.testing.assert_close(program(validation[:count]), logits(run, validation[:count]))


def test_a_state_dict_is_the_tensors_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pt"
    assert main([str(run), "--format", "state-dict", "--out", str(path)]) == 0
    assert "read back with equal bits" in capsys.readouterr().out
    expected = load_compressed(run).state_dict()
    found = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_python_module_says_what_the_network_is(
    run: Path, validation: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.py"
    assert main([str(run), "--format", "python", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"and {tmp_path / 'net_weights.pt'}\nwithout this package, on 36 validation images of" in said
    assert "top-1 the same for 36 of 36" in said

    module = SourceFileLoader("net", str(path)).load_module()
    assert tuple("abcd") == module.LABELS
    assert module.MEAN == (0.485, 0.456, 0.406)
    with torch.no_grad():
        torch.testing.assert_close(module.load()(validation), logits(run, validation))
    assert str(run) not in path.read_text()

    path.unlink()
    with pytest.raises(CheckpointError, match=r"net_weights\.pt is there already"):
        main([str(run), "--format", "python", "--out", str(path)])


def test_images_of_another_folder_and_noise_are_called_so(
    run: Path, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "net.pt2")
    main([str(run), "--format", "torch-export", "--out", out, "--images", str(bench.data / "train" / "a")])
    assert f"on 10 images of {bench.data / 'train' / 'a'}:" in capsys.readouterr().out
    for name in ("plan.json", "model.safetensors", "model.safetensors.sha256", "network.py"):
        shutil.copy(run / name, tmp_path)
    main([str(tmp_path), "--format", "torch-export", "--out", out, "--overwrite"])
    assert "on 64 images of noise (the run's data is not known; give images with --images DIR):" in (
        capsys.readouterr().out
    )
    with pytest.raises(DataError, match="no images in"):
        main([str(run), "--format", "torch-export", "--images", str(run / "checkpoints"), "--overwrite"])


@pytest.mark.parametrize("format", ["onnx", "torch-export", "state-dict", "python"])
def test_a_file_that_is_there_stays_unless_one_says_overwrite(run: Path, tmp_path: Path, format: str) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match=r"precious is there already: .* add --overwrite"):
        main([str(run), "--format", format, "--out", str(path)])
    assert path.read_text() == "mine"
    if format == "state-dict":
        assert main([str(run), "--format", format, "--out", str(path), "--overwrite"]) == 0
        assert torch.load(path, weights_only=True)


# ── networks that a format cannot hold ─────────────────────────────────────────────────────────────────────


class Own(nn.Module):
    """One linear layer between an average and `function`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x.mean((2, 3))))


CANNOT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "values decide": (lambda y: y if y.sum() > 0 else -y, "torch.export cannot trace this network: .*data-dep"),
    "two images only": (lambda y: y.reshape(2, 4), "torch.export cannot trace this network: .*images"),
    "by chance": (lambda y: torch.dropout(y, 0.5, True), "computes something else .* it was not kept"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_a_program_says_why_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    function, message = CANNOT[name]
    with pytest.raises(ExportError, match=message):
        write_program(tmp_path / "net.pt2", Own(function), IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "opset", "message"),
    [
        (
            torch.special.bessel_j0,
            20,
            r"ONNX opset 20 cannot express .* \w+\.bessel_j0 has no translation",
        ),
        (lambda y: y.relu(), 13, r"ONNX opset 13 cannot express .*Re\w+.* as opset 18 does; use --opset 18"),
    ],
    ids=["no translation", "too old"],
)
def test_an_operator_that_onnx_cannot_express_is_named_with_the_opset(
    function: Callable[[Tensor], Tensor], opset: int, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match=message):
        write_onnx(tmp_path / "net.onnx", Own(function), IMAGES, opset)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_does_not_exist_is_refused_before_the_work(run: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match="--opset 999: expected 1 to"):
        main([str(run), "--format", "onnx", "--opset", "999"])


def test_a_network_that_is_not_the_same_is_seen() -> None:
    network = Own(lambda y: y)
    with torch.no_grad():
        right = network(IMAGES)
    scale = float(right.abs().max())
    close = compare(right + 1e-5 * scale, network, IMAGES)
    assert (close.images, close.same) == (4, 4)
    assert close.difference == pytest.approx(1e-5 * scale, rel=0.1)
    for wrong in (right + 0.1, right * torch.nan, right[:, :3], right[:3]):
        with pytest.raises(ExportError, match="it was not kept"):
            compare(wrong, network, IMAGES)


# ── directories that are no finished run ───────────────────────────────────────────────────────────────────


def unfinished(folder: Path) -> None:
    (folder / "result.json").unlink()


def damaged(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unfinished, r"its run is not finished \(no result.json\): continue it with --resume"),
        (damaged, r"its SHA-256 differs from the one in model.safetensors.sha256: damaged"),
        (lambda folder: (folder / "plan.json").unlink(), "no plan.json; expected the directory of a finished run"),
        (shutil.rmtree, "there is no such folder; expected the directory of a finished run"),
    ],
    ids=["unfinished", "damaged", "foreign", "absent"],
)
def test_only_finished_runs_are_taken(
    run: Path, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "*.onnx"))
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        main([str(folder), "--format", "state-dict"])
