"""`dist-prune export --int8`: onnxruntime's integers, and what they cost, measured on the run's own images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_prune.data.listing import DataError
from dist_prune.export.command import main
from dist_prune.export.formats import ExportError, onnx_session, write_onnx
from dist_prune.export.int8 import CalibrationImages, quantise
from dist_prune.export.quantised import FourWay, Measured
from dist_prune.network.models import build
from dist_prune.network.sites import evaluating
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.files import CheckpointError
from tests.runs import Bench, images_of

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
WORDS = ("--format", "onnx", "--int8", "--calibration-images", "24")


@pytest.fixture(scope="module")
def said(run: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text: lines.append(text))
        assert main([str(run), *WORDS]) == 0
    return "\n".join(lines)


def top1(path: Path, images: Tensor, labels: Tensor) -> float:
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return 100 * float(np.mean(logits.argmax(1) == labels.numpy()))


def test_the_file_holds_8_bit_weights_with_a_scale_per_channel(run: Path, said: str) -> None:
    model = onnx.load(run / "model-int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    weights = {t.name: t for t in model.graph.initializer}
    kernels = [t for t in weights.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert len(kernels) >= 3
    scales = [weights[t.name.replace("_quantized", "_scale")] for t in kernels]
    assert [s.dims[0] for s in scales] == [t.dims[0] for t in kernels], "one for each output channel"


def test_the_four_are_measured_on_all_validation_images(run: Path, said: str, bench: Bench) -> None:
    """Against the file run by onnxruntime here, on images that were read without the program."""
    found = json.loads((run / "model-int8.json").read_text())
    rows = {(f["network"], f["precision"]): f for f in found["files"]}
    assert [*rows] == [(n, p) for n in ("dense", "compressed") for p in ("float32", "int8")]
    assert {f["metrics"]["images"] for f in rows.values()} == {36}
    small = rows["compressed", "int8"]
    path = run / "model-int8.onnx"
    assert small["metrics"]["top1"] == pytest.approx(top1(path, *images_of(bench.data / "val")))
    assert small["megabytes"] == pytest.approx(path.stat().st_size / 1e6)
    result = json.loads((run / "result.json").read_text())
    assert rows["dense", "float32"]["metrics"]["top1"] == pytest.approx(result["dense"]["top1"])
    assert rows["compressed", "float32"]["metrics"]["kl"] == pytest.approx(result["projected"]["kl"], abs=1e-4)
    for row in rows.values():
        assert all(row["milliseconds"][size] > 0 for size in ("1", "32"))


def test_every_step_is_said(run: Path, said: str) -> None:
    for text in (
        "network     precision",
        "compression in float32 ",
        "int8 of the dense network ",
        "int8 of the compressed network ",
        "from 21 images; on 3 others: minmax ",
        f"written to {run / 'model-int8.onnx'}, and {run / 'model-int8.json'}",
    ):
        assert text in said


def test_nothing_is_replaced_unasked(run: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=r"model-int8\.onnx.*--overwrite"):
        main([str(run), *WORDS])


def test_a_run_whose_images_are_gone_is_refused_before_the_work(run: Path, said: str, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["run"]["images"]["data"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="gone"):
        main([str(copy), *WORDS, "--overwrite"])


def test_without_the_dense_weights_the_compressed_network_is_measured_alone(
    run: Path, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["run"]["network"]["weights"] = str(tmp_path / "gone.pt")
    (copy / "config.json").write_text(json.dumps(config))
    assert main([str(copy), *WORDS, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "without the dense network: " in shown and "gone.pt" in shown
    files = json.loads((copy / "model-int8.json").read_text())["files"]
    assert [f["network"] for f in files] == ["compressed", "compressed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "python", "--int8"], "--int8 with --format python: goes with onnx"),
        ([*WORDS, "--calibration-images", "4"], "--calibration-images 4: expected at least 8"),
        ([*WORDS, "--images", "x"], "--images with --int8"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(run), *words])
    assert message in capsys.readouterr().err


def test_an_opset_without_scales_per_channel_is_refused(run: Path) -> None:
    with pytest.raises(ExportError, match="--opset 12: int8 needs 13 or more"):
        main([str(run), *WORDS, "--opset", "12"])


def figures(network: str, precision: str, accuracy: float) -> Measured:
    return Measured(network, precision, Metrics(accuracy, 100.0, 0.5, 1000, 0.1), 1.0, {1: 1.0})


@pytest.mark.parametrize(("small", "warned"), [(89.1, False), (88.9, True)])
def test_more_than_a_point_below_float32_is_warned_of(small: float, warned: bool) -> None:
    files = figures("compressed", "float32", 90.0), figures("compressed", "int8", small)
    shown = str(FourWay("a CPU", files, ()))
    assert ("warning: int8 of the compressed network is 1.10 points of top-1 below" in shown) == warned


# ── the ranges ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_method_nearest_to_float32_on_images_held_out_is_taken(tmp_path: Path) -> None:
    """One pixel in a million is large: the whole range, of minmax, would leave few steps for all others."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    pixels = torch.randn(64, 3, 16, 16) + 2 * torch.randn(64, 3, 1, 1)  # images that differ in colour
    pixels[1, 0, 3, 3] = 4e3
    write_onnx(tmp_path / "whole.onnx", network, pixels[2:6])
    found = quantise(
        tmp_path / "whole.onnx", tmp_path / "small.onnx", CalibrationImages(pixels), lambda _, batches: batches
    )
    assert (found.images, found.held_out) == (56, 8)
    assert found.method == min(found.losses, key=found.losses.__getitem__) != "minmax"
    assert found.losses[found.method] < 0.1 * found.losses["minmax"]
    held = pixels[::8]
    with evaluating(network):
        expected = network(held)
    answers = onnx_session(tmp_path / "small.onnx")(held)
    loss = (expected.softmax(1) * (expected.log_softmax(1) - answers.log_softmax(1))).sum(1).mean()
    assert float(loss) == pytest.approx(found.losses[found.method], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "efficientnet_b0", "vit_tiny_patch16_224", "resnet18"])
def test_networks_of_many_kinds_can_be_expressed(arch: str, tmp_path: Path) -> None:
    """Depthwise kernels, gates, hard swish, attention; random weights."""
    torch.manual_seed(0)
    network, pixels = build(arch, 10).eval(), torch.randn(16, 3, 224, 224)
    write_onnx(tmp_path / "whole.onnx", network, pixels[:4])
    images = CalibrationImages(pixels)
    quantise(tmp_path / "whole.onnx", tmp_path / "small.onnx", images, lambda _, batches: batches)
    assert (tmp_path / "small.onnx").stat().st_size < 0.4 * (tmp_path / "whole.onnx").stat().st_size
