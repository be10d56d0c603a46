"""`Compression.export_int8`: calibrated on a program's own batches, measured on its labelled ones."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_prune import BatchesError, Compression, ConfigError, compress
from dist_prune.export.formats import ExportError
from dist_prune.export.int8 import Quantised
from dist_prune.export.int8_at_hand import Accuracy, Written
from dist_prune.utils.files import CheckpointError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
CLASSES = 5


class Net(nn.Module):
    """Logits of an image, or of its positions; the first channel, `outlier` times wider, counts for nothing."""

    def __init__(self, outlier: float = 1.0, positions: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, CLASSES, 1)
        self.positions = positions
        with torch.no_grad():
            self.conv1.weight[0] *= outlier
            self.conv2.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        return y if self.positions else y.mean((2, 3))


def images(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)


def compressed(model: nn.Module) -> Compression:
    return compress(model.eval(), [images()], "uniform:1.0", correct="none")


@pytest.fixture(scope="module")
def found() -> Compression:
    return compressed(Net())


def labelled(model: nn.Module, count: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Images with what the network says to them, but for every fourth one."""
    x = images(count)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    return list(zip(x.split(16), labels.split(16), strict=True))


def answers(path: Path, x: Tensor) -> np.ndarray:
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x.numpy()})[0]


def test_top1_is_that_of_the_file_on_the_labelled_images(found: Compression, tmp_path: Path) -> None:
    path, validation = tmp_path / "small.onnx", labelled(found.model)
    said = found.export_int8(path, images(40).split(8), validation=iter(validation))
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    x, labels = (torch.cat(parts) for parts in zip(*validation, strict=True))
    right = 100 * float(np.mean(answers(path, x).argmax(1) == labels.numpy()))
    assert f"top-1 on 40 labelled images: float32 75.00 %, int8 {right:.2f} % ({right - 75:+.2f} points)" in said
    assert "from 35 images; on 5 others: minmax " in said
    with pytest.raises(CheckpointError, match=r"small\.onnx"):
        found.export_int8(path)
    with pytest.raises(ConfigError, match="images: those of the correction stayed behind"):
        pickle.loads(pickle.dumps(found)).export_int8(tmp_path / "other.onnx")


def test_many_other_answers_are_warned_of(tmp_path: Path) -> None:
    """One activation is a thousand times the others, which share its scale: they round to nothing.

    Images are those of the correction where none are given.
    """
    found = compressed(Net(outlier=1000))
    with pytest.warns(UserWarning, match=r"another top-1 than float32 in \d+\.\d % of 8 answers.*`validation`"):
        assert "from 56 images; on 8 others: " in found.export_int8(tmp_path / "b.onnx")


@pytest.mark.parametrize(("int8", "warned"), [(89.1, False), (88.9, True)])
def test_more_than_a_point_below_float32_is_warned_of(int8: float, warned: bool) -> None:
    how = Quantised("minmax", {"minmax": 0.1}, {}, 56, 8, decisions=8, same=0)
    concern = Written(how, 1, 4, Accuracy(1000, 90.0, int8)).concern
    assert concern.startswith("int8 is 1.10 points of top-1 below float32; keep a float32 file") == warned
    assert bool(concern) == warned


def test_each_position_of_a_segmentation_is_an_answer(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="each of 36 positions"):
        found = compressed(Net(positions=True))
    path = tmp_path / "small.onnx"
    with pytest.warns(UserWarning, match=r"in \d\.\d % of 288 answers to images held out; keep a float32 file"):
        said = found.export_int8(path)
    with torch.no_grad():
        same = (found.model(images()[::8]).argmax(1).numpy() == answers(path, images()[::8]).argmax(1)).sum()
    assert f"top-1 the same for {same} of {8 * 36}" in said


@pytest.mark.slow
def test_features_are_compared_by_their_squared_change(tmp_path: Path) -> None:
    found = compress(Net().eval(), [images()], "uniform:1.0", correct="none", loss="mse")
    said = found.export_int8(tmp_path / "small.onnx")
    assert "from float32" in said and "top-1" not in said
    held = images()[::8]
    with torch.no_grad():
        change = (found.model(held) - torch.from_numpy(answers(tmp_path / "small.onnx", held))).square().sum(1)
    method = said.split("float32 ", 1)[1].split("\n", 1)[1].split(",")[0]
    shown = float(said.split(f"{method} ", 1)[1].split(",")[0].split(" ")[0])
    assert shown == pytest.approx(float(change.mean()) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "kind", "answer"),
    [
        ({"images": [images(4)]}, BatchesError, "images: 4; int8 is calibrated on 8 or more"),
        ({"images": images()}, BatchesError, "expected several: a list with it in it will do"),
        ({"validation": [images(8)]}, BatchesError, "validation: a batch has no labels"),
        ({"validation": []}, BatchesError, "validation: there are no batches"),
        ({"opset": 12}, ExportError, "opset 12: int8 needs 13 or more"),
    ],
)
def test_what_cannot_be_used_is_refused(
    found: Compression, tmp_path: Path, arguments: dict, kind: type[Exception], answer: str
) -> None:
    with pytest.raises(kind, match=answer):
        found.export_int8(tmp_path / "small.onnx", **arguments)
    assert not any(tmp_path.iterdir())
