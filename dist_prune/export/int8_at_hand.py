"""A network at hand in 8-bit integers: calibrated on batches at hand, and measured where these have labels."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_prune.data.batches import BatchesError, Reading, checked
from dist_prune.data.loader import Batch
from dist_prune.export.formats import onnx_session, write_onnx
from dist_prune.export.int8 import COMPARED, TOLERATED, CalibrationImages, Quantised, quantise, watched
from dist_prune.network.outputs import logits_of
from dist_prune.utils.files import replacing


@dataclass(frozen=True)
class Accuracy:
    """Of both files over the same labelled images: top-1, per cent."""

    images: int
    float32: float
    int8: float

    def __str__(self) -> str:
        """For people."""
        return (
            f"top-1 on {self.images} labelled images: float32 {self.float32:.2f} %, int8 {self.int8:.2f} % "
            f"({self.int8 - self.float32:+.2f} points)"
        )


@dataclass(frozen=True)
class Written:
    """A file in 8-bit integers: how it was made, its bytes and the float32 file's, and its accuracy, if known."""

    how: Quantised
    bytes: int
    float32_bytes: int
    accuracy: Accuracy | None

    def __str__(self) -> str:
        """For people."""
        sizes = f"{self.bytes / 1e6:.3g} MB, in float32 {self.float32_bytes / 1e6:.3g} MB"
        return "\n".join(map(str, filter(None, (sizes, self.how, self.accuracy))))

    @property
    def concern(self) -> str:
        """A warning where int8 costs much, or seems to; else empty."""
        advice = "keep a float32 file, give more images to calibrate on, or tune the network first"
        if self.accuracy is not None:
            lost = self.accuracy.float32 - self.accuracy.int8
            return f"int8 is {lost:.2f} points of top-1 below float32; {advice}" if lost > TOLERATED else ""
        other = 100 * (1 - self.how.same / self.how.decisions) if self.how.decisions else 0.0
        if other <= TOLERATED:
            return ""
        alone = self.how.decisions == self.how.held_out
        better = "give `validation`, batches with labels, to measure what that costs; if much, " if alone else ""
        return (
            f"int8 has another top-1 than float32 in {other:.1f} % of {self.how.decisions} answers to images held "
            f"out; {better}{advice}"
        )


def write_int8(
    path: Path,
    network: nn.Module,
    images: CalibrationImages,
    loss: str,
    opset: int,
    validation: Iterable[Any] | None = None,
) -> Written:
    """Write the network in 8-bit integers.

    Args:
        path: to write.
        network: in evaluation mode, on the CPU.
        images: to calibrate on.
        loss: by which onnxruntime's methods are compared, see `quantise`.
        opset: of ONNX.
        validation: batches with labels, to measure both files on; gone through once.

    Raises:
        ExportError: it cannot be expressed, or not so that its answers are finite.
        BatchesError: validation batches without labels, or that are none.
    """
    batches = None if validation is None else labelled(validation)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = (Path(folder) / f"{precision}.onnx" for precision in ("float32", "int8"))
        write_onnx(whole, network, images.prepare(images.pixels[:COMPARED]), opset)
        how = quantise(whole, small, images, watched, loss)
        accuracy = None if batches is None else _accuracy(whole, small, batches)
        with replacing(path) as aside:
            shutil.copyfile(small, aside)
        return Written(how, small.stat().st_size, whole.stat().st_size, accuracy)


def labelled(batches: Iterable[Any]) -> Iterator[Batch]:
    """One batch after the other, checked; the first one now.

    Raises:
        BatchesError: without labels, or no batch of images.
    """
    found = map(_with_labels, batches)
    first = next(found, None)
    if first is None:
        raise BatchesError("validation: there are no batches; an iterator that was gone through before gives none")
    return chain([first], found)


def _with_labels(given: Any) -> Batch:  # noqa: ANN401  whatever was given
    (batch,), _ = checked([given], Reading())
    if (batch.labels < 0).any():
        raise BatchesError("validation: a batch has no labels; expected images and labels (n,)")
    return batch


def _accuracy(whole: Path, small: Path, batches: Iterable[Batch]) -> Accuracy:
    sessions = [onnx_session(file) for file in (whole, small)]
    right, count = torch.zeros(2, dtype=torch.int64), 0
    for batch in batches:
        answers = [logits_of(session(batch.images)).argmax(1) for session in sessions]
        if answers[0].dim() > 1:
            raise BatchesError(
                f"validation: labels are of images, and the network answers at {answers[0].shape[1]} positions of "
                f"each; leave it out"
            )
        right += torch.stack([(answer == batch.labels).sum() for answer in answers])
        count += len(batch.images)
    float32, int8 = (100 * right / count).tolist()
    return Accuracy(count, float32, int8)
