"""An ONNX file in 8-bit integers: onnxruntime's static quantisation, calibrated on images.

Weights get a scale per output channel, activations one per tensor, found on calibration images; QuantizeLinear and
DequantizeLinear stand around each operator (QDQ), and onnxruntime fuses them into integer kernels. Of its ways to
find the activations' ranges, that one is taken which, on images held out, is nearest to the float32 file.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dist_prune.correction.calibration import HELD
from dist_prune.export.formats import ExportError, Function, onnx_session, quiet, reason_of, require_onnx
from dist_prune.network.outputs import logits_of
from dist_prune.statistics.probes import LOSSES
from dist_prune.utils.caller import bar
from dist_prune.utils.files import replacing

T = TypeVar("T")
Method = Literal["minmax", "percentile", "entropy"]
Watch = Callable[[str, Sequence[Tensor]], Iterable[Tensor]]  # shows how far a named pass over batches has come

OPSET_NEEDED = 13  # the first in which scales can be per channel
BATCH = 16  # images whose activations are all in memory at a time
COMPARED = 64  # images that a float32 file is compared with PyTorch on, before it is quantised
TOLERATED = 1.0  # points of top-1 that int8 may lose without a warning
FEWEST = HELD  # images, of which one is held out

# onnxruntime's names and settings. Its histograms for `entropy` have 128 bins by default, as many as are searched
# for: nothing would be left to choose.
METHODS: Mapping[Method, tuple[str, Mapping[str, float]]] = {
    "minmax": ("MinMax", {}),
    "percentile": ("Percentile", {"percentile": 99.99}),
    "entropy": ("Entropy", {"num_bins": 512, "num_quantized_bins": 128}),
}


@dataclass(frozen=True)
class CalibrationImages:
    """Images without labels: every eighth is held out, ranges are found on the others.

    Attributes:
        pixels: (N, …), eight or more, on the CPU.
        prepare: what the network wants of some of them, as new tensors.
    """

    pixels: Tensor
    prepare: Callable[[Tensor], Tensor] = torch.clone

    def batches(self, held_out: bool) -> list[Tensor]:
        """Views of the images that are held out, or of all others."""
        out = torch.arange(len(self.pixels)) % HELD == 0
        return list(torch.split(self.pixels[out if held_out else ~out], BATCH))


@dataclass(frozen=True)
class Quantised:
    """What a file in 8-bit integers came to, on the images held out.

    Attributes:
        method: how the ranges of its activations were found.
        losses: to the float32 file, of every method that could be tried, mean over images.
        failed: why others could not.
        images: how many ranges were found on.
        held_out: how many the method was chosen by.
        decisions: answers to these: one for an image, or for each of its positions.
        same: of these, how many have the same top-1 as in float32; 0 of 0 where outputs are no logits.
    """

    method: Method
    losses: Mapping[Method, float]
    failed: Mapping[Method, str]
    images: int
    held_out: int
    decisions: int
    same: int

    def __str__(self) -> str:
        """For people."""
        tried = ", ".join(f"{name} {loss:.3g}" for name, loss in self.losses.items())
        failed = "".join(f"; {name} failed: {reason}" for name, reason in self.failed.items())
        same = f"; top-1 the same for {self.same} of {self.decisions}" if self.decisions else ""
        rest = failed + same
        return f"{self.method}, from {self.images} images; on {self.held_out} others: {tried} from float32{rest}"


def require_int8(opset: int) -> None:
    """What can be wrong before the work.

    Raises:
        ExportError: the `onnx` extra is not installed, or the opset has no scales per channel.
    """
    require_onnx(opset)
    if opset < OPSET_NEEDED:
        raise ExportError(f"--opset {opset}: int8 needs {OPSET_NEEDED} or more, for scales per channel")
    try:
        _quantization()
    except ImportError as error:
        raise ExportError(
            f"int8 needs onnxruntime.quantization, which cannot be imported ({error}): "
            f"pip install 'dist_prune[onnx]'"
        ) from error


def quantise(
    float32: Path,
    path: Path,
    images: CalibrationImages,
    watch: Watch,
    loss: str = "kl",
    methods: Iterable[Method] = tuple(METHODS),
) -> Quantised:
    """Write the network of an ONNX file in 8-bit integers.

    Args:
        float32: as `write_onnx` makes it.
        path: to write.
        images: to calibrate from.
        watch: see `Watch`.
        loss: by which methods are compared, see `LOSSES`.
        methods: to be tried.

    Raises:
        ExportError: onnxruntime cannot quantise it, or not so that the answers are finite.
    """
    held, outputs = images.batches(held_out=True), dict[Method, Tensor]()
    failed: dict[Method, str] = {}
    expected = _answers(onnx_session(float32), held, images.prepare)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        _prepare(float32, prepared)
        for method in methods:
            file = Path(folder) / f"{method}.onnx"
            try:
                shown = watch(f"calibration, {method}", images.batches(held_out=False))
                _write(prepared, _ranges(prepared, method, map(images.prepare, shown)), file)
                outputs[method] = _answers(onnx_session(file), held, images.prepare)
            except Exception as error:  # of onnxruntime, which raises many kinds
                failed[method] = reason_of(error)
        losses = {m: float(LOSSES[loss](expected.double(), y.double()).mean()) for m, y in outputs.items()}
        finite = {m: value for m, value in losses.items() if value < float("inf")}  # NaN is not
        if not finite:
            why = "; ".join(f"{m}: {text}" for m, text in failed.items()) or "its answers are not finite"
            raise ExportError(f"onnxruntime cannot quantise this network ({why}); export it in float32")
        best = min(finite, key=finite.__getitem__)
        with replacing(path) as aside:
            shutil.copyfile(Path(folder) / f"{best}.onnx", aside)
    agree = (outputs[best].argmax(1) == expected.argmax(1)).flatten() if loss != "mse" else torch.zeros(0)
    counts = len(images.pixels) - len(expected), len(expected), len(agree), int(agree.sum())
    return Quantised(best, finite, failed, *counts)


def watched(name: str, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """With a bar."""
    return in_view(name, batches, len(batches))


def in_view(name: str, batches: Iterable[T], count: int) -> Iterator[T]:
    """So many batches with a bar."""
    with bar(count, name, "batch", None, True) as step:
        for batch in batches:
            yield batch
            step()


def _answers(session: Function, batches: Iterable[Tensor], prepare: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([logits_of(session(prepare(batch))) for batch in batches])


def _quantization() -> Any:  # noqa: ANN401  a module
    return importlib.import_module("onnxruntime.quantization")


def _prepare(float32: Path, prepared: Path) -> None:
    """Shapes inferred, batch norm fused: what onnxruntime asks for before quantisation.

    Its symbolic inference does not know every operator; the plain one is enough for most networks.
    """
    reasons = []
    for plain in (False, True):
        try:
            with quiet():
                _quantization().quant_pre_process(str(float32), str(prepared), skip_symbolic_shape=plain)
            return
        except Exception as error:  # of onnx, of onnxruntime, or a plain Exception
            reasons.append(reason_of(error))
    raise ExportError(f"onnxruntime cannot prepare this network for int8: {'; '.join(dict.fromkeys(reasons))}")


def _ranges(prepared: Path, method: Method, batches: Iterator[Tensor]) -> Any:  # noqa: ANN401  TensorsData
    """The range of every activation, one batch in memory at a time: left alone, onnxruntime would keep all."""
    name, settings = METHODS[method]
    quantization = _quantization()
    with tempfile.TemporaryDirectory() as folder, quiet():
        calibrator = quantization.create_calibrator(
            str(prepared),
            _operators(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=getattr(quantization.CalibrationMethod, name),
            extra_options=dict(settings),
        )
        for batch in batches:
            calibrator.collect_data(_Reader(batch))
        return calibrator.compute_data()


@dataclass
class _Reader:
    """One batch, as onnxruntime asks for it: then no more."""

    batch: Tensor | None

    def get_next(self) -> dict[str, Any] | None:
        batch, self.batch = self.batch, None
        return None if batch is None else {"images": batch.numpy()}


def _operators() -> list[str]:
    """All that onnxruntime can quantise."""
    registry = importlib.import_module("onnxruntime.quantization.registry")
    return sorted({*registry.QDQRegistry, *registry.QLinearOpsRegistry})


def _write(prepared: Path, ranges: Any, path: Path) -> None:  # noqa: ANN401  TensorsData
    quantization, model = _quantization(), importlib.import_module("onnx").load(str(prepared))
    with quiet():
        quantizer = quantization.QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=getattr(quantization.QuantType, activations()),
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=_operators(),
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path), False)


def activations() -> str:
    """What this machine's kernels take: unsigned on x86, where signed ones took three times as long."""
    return "QInt8" if platform.machine().lower() in ("aarch64", "arm64") else "QUInt8"
