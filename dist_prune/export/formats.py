"""A network as a file that others read: ONNX, torch.export, a state dict; each read back and compared."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_prune.network.inputs import Call, InputPacking
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating
from dist_prune.utils.files import replacing

Function = Callable[[Tensor], Tensor]  # images (N, 3, H, W) → logits (N, classes)

OPSET = 20  # unless asked for another; PyTorch's exporter writes 18 to 23 and converts to others
TOLERANCE = 1e-3  # of the largest logit: what other kernels in float32 stay far below
PROTOBUF_BYTES = 2**31  # no ONNX file can be larger


class ExportError(ValueError):
    """A network that cannot be written in a format, or was written and computes something else."""


@dataclass(frozen=True)
class Agreement:
    """How far a network that was written and read back is from the original.

    `difference` is the largest of all logits, `scale` the largest logit, `same` how many of `images` have the
    same top-1.
    """

    images: int
    difference: float
    scale: float
    same: int

    def __str__(self) -> str:
        """For people."""
        return (
            f"largest difference {self.difference:.2g} of logits up to {self.scale:.3g}, "
            f"top-1 the same for {self.same} of {self.images}"
        )


def parts(images: Tensor) -> list[Tensor]:
    """The batches to compare on: one image alone, and the others, so that the batch size must be free."""
    return [images[:1], images[1:]]


def call_of(images: Tensor, packing: InputPacking | None) -> Call:
    """What a network is called with for these images."""
    return ((images,), {}) if packing is None else packing.unpacked(images)


def _arguments(network: nn.Module, call: Call) -> dict[str, Any]:
    """What a network is called with, by the names that its forward has for it."""
    return dict(inspect.signature(network.forward).bind(*call[0], **call[1]).arguments)


def compare(found: Tensor, network: nn.Module, images: Tensor, packing: InputPacking | None = None) -> Agreement:
    """What was written, against the original.

    Args:
        found: (N, classes, …), the logits of what was read back, see `logits_of`.
        network: the original.
        images: (N, 3, H, W), or packed.
        packing: of images that hold several inputs.

    Raises:
        ExportError: they differ by more than rounding.
    """
    with evaluating(network):
        args, kwargs = call_of(images, packing)
        expected = logits_of(network(*args, **kwargs)).float()
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
        raise ExportError(f"what was written returns logits of shape {shapes}; it was not kept")
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    agreement = Agreement(len(images), difference, scale, same)
    if not difference <= TOLERANCE * scale:  # a NaN is no agreement
        raise ExportError(f"what was written computes something else ({agreement}); it was not kept")
    return agreement


# ── torch.export ───────────────────────────────────────────────────────────────────────────────────────────


def traced(network: nn.Module, images: Tensor, packing: InputPacking | None = None) -> ExportedProgram:
    """The network as a program of operators, for any number of images of this size.

    Raises:
        ExportError: its forward depends on the values of tensors, or on the number of images.
    """
    try:
        with evaluating(network), quiet():
            args, kwargs = call_of(images[:2], packing)
            free = {0: Dim("images")}
            named = _arguments(network, (args, kwargs)).items()
            shapes = {name: free if isinstance(value, Tensor) else None for name, value in named}
            return torch.export.export(network, args, dict(kwargs), dynamic_shapes=shapes)
    except Exception as error:  # torch._dynamo and torch.fx raise many kinds
        raise ExportError(f"torch.export cannot trace this network: {reason_of(error)}") from error


def write_program(
    path: Path, network: nn.Module, images: Tensor, packing: InputPacking | None = None
) -> Agreement:
    """Write a torch.export program, whose batch size is free, and read it back.

    Raises:
        ExportError: see `traced` and `compare`.
    """
    program = traced(network, images, packing)
    with replacing(path) as aside, quiet():
        with aside.open("wb") as file:
            torch.export.save(program, file)
        with aside.open("rb") as file:
            module = torch.export.load(file).module()
        calls = [call_of(some, packing) for some in parts(images)]
        found = torch.cat([logits_of(module(*args, **kwargs)) for args, kwargs in calls])
        return compare(found, network, images, packing)


# ── ONNX ───────────────────────────────────────────────────────────────────────────────────────────────────


def require_onnx(opset: int) -> None:
    """What can be wrong before the work.

    Raises:
        ExportError: the `onnx` extra is not installed, or it does not know the opset.
    """
    absent = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if absent:
        raise ExportError(f"ONNX needs {', '.join(absent)}: pip install 'dist_prune[onnx]'")
    newest = importlib.import_module("onnx").defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ExportError(f"--opset {opset}: expected 1 to {newest}, the newest that the installed onnx knows")


def write_onnx(
    path: Path, network: nn.Module, images: Tensor, opset: int = OPSET, packing: InputPacking | None = None
) -> Agreement:
    """Write ONNX through PyTorch's dynamo exporter, whose batch size is free, and run it in onnxruntime.

    Input `images` (batch, 3, H, W), output `logits` (batch, classes); weights are in the same file. Several inputs
    are called as in the network's forward.

    Raises:
        ExportError: an operator that this opset cannot express, by name; or see `traced` and `compare`.
    """
    size = sum(p.nbytes for p in network.state_dict().values())
    if size >= PROTOBUF_BYTES:
        raise ExportError(f"{size / 1e9:.1f} GB of weights: an ONNX file holds 2 GB; use --format torch-export")

    def feeds(some: Tensor) -> dict[str, Tensor]:
        if packing is None:
            return {"images": some}
        named = _arguments(network, packing.unpacked(some))
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    names = list(feeds(images[:1]))
    program = _converted(traced(network, images, packing), opset, names)
    with replacing(path) as aside:
        with quiet():
            program.save(str(aside), external_data=False)
        session = onnx_runner(aside)
        found = torch.cat([logits_of(session(feeds(some))) for some in parts(images)])
        return compare(found, network, images, packing)


def _converted(program: ExportedProgram, opset: int, names: list[str]) -> Any:  # noqa: ANN401  torch's ONNXProgram
    try:
        with quiet():
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # the exporter's kinds of errors are private
        operator = _operator_in(error)
        what = f"operator {operator} has no translation" if operator else reason_of(error)
        raise ExportError(f"ONNX opset {opset} cannot express this network: {what}") from error
    assert found is not None
    written = found.model.opset_imports[""]
    if written != opset:
        newer = _newer_operators(found.model_proto, opset)
        raise ExportError(
            f"ONNX opset {opset} cannot express {', '.join(newer)} as opset {written} does; use --opset {written}"
        )
    return found


def _operator_in(error: BaseException | None) -> str:
    """The PyTorch operator that an error, or one of its causes, says no translation was found for."""
    while error is not None:
        if match := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error)):
            return match[1]
        error = error.__cause__
    return ""


def _newer_operators(model: Any, opset: int) -> list[str]:  # noqa: ANN401  onnx.ModelProto
    """ONNX operators in the model that became what they are after `opset`."""
    schema = importlib.import_module("onnx").defs.get_schema
    used = {node.op_type for node in model.graph.node if not node.domain}
    known = model.opset_import[0].version
    return sorted(name for name in used if schema(name, known).since_version > opset)


def onnx_session(path: Path, device: str = "cpu") -> Function:
    """An ONNX file that takes images as a function; see `onnx_runner`."""
    run = onnx_runner(path, device)
    return lambda images: run({"images": images})


def onnx_runner(path: Path, device: str = "cpu") -> Callable[[Mapping[str, Tensor]], Tensor]:
    """An ONNX file as a function of its inputs, run by onnxruntime with as many threads as PyTorch uses.

    Raises:
        ExportError: onnxruntime does not take the file.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # pybind classes without a common base
        raise ExportError(f"onnxruntime does not take what was written: {reason_of(error)}") from error
    return lambda given: torch.from_numpy(
        session.run(["logits"], {n: x.cpu().numpy() for n, x in given.items()})[0]
    )


# ── a state dict ───────────────────────────────────────────────────────────────────────────────────────────


def write_state(path: Path, network: nn.Module) -> int:
    """Write the bare state dict, readable with `weights_only=True`; how many tensors it has."""
    state = network.state_dict()
    with replacing(path) as aside:
        torch.save(state, aside)
        found = torch.load(aside, map_location="cpu", weights_only=True)
        if not all(torch.equal(found[name], tensor) for name, tensor in state.items()):
            raise ExportError("the state dict that was written holds something else; it was not kept")
    return len(state)


# ── others' messages ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def reason_of(error: Exception) -> str:
    """The first line that says something, and the user's line of code where one is named."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    places = [line for line in lines if re.match(r'File ".+", line \d+', line)]
    return lines[0] + (f" ({places[-1]})" if places else "")
