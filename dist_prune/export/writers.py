"""One function per format: the network written, read back and compared, and in words what was done."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from dist_prune.artifacts.saved_model import Description
from dist_prune.export.formats import OPSET, ExportError, require_onnx, write_onnx, write_program, write_state
from dist_prune.export.samples import Samples
from dist_prune.export.source_code import weights_of, write_source
from dist_prune.utils.files import require_absent

Format = Literal["onnx", "torch-export", "state-dict", "python"]
FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "model.pt",
    "python": "model.py",
}
_ADVICE = "name another file with --out, or add --overwrite"


@dataclass(frozen=True)
class Exportable:
    """A network to be written, and how.

    Attributes:
        network: in evaluation mode, on the CPU.
        description: what it is.
        samples: gives images to compare on; called where a format needs them, once the rest is checked.
        opset: of ONNX.
        overwrite: whether a file that is there is replaced.
    """

    network: nn.Module
    description: Description
    samples: Callable[[], Samples]
    opset: int = OPSET
    overwrite: bool = False


def require_free(overwrite: bool, *paths: Path) -> None:
    """Refuse to replace files, unless that was asked for.

    Raises:
        CheckpointError: one would be.
    """
    for path in () if overwrite else paths:
        require_absent(path, _ADVICE)


def _onnx(given: Exportable, path: Path) -> str:
    require_onnx(given.opset)
    require_free(given.overwrite, path)
    chosen = given.samples()
    agreement = write_onnx(path, given.network, chosen.images, given.opset, chosen.packing)
    size = ", ".join(map(str, chosen.images.shape[1:]))
    taken = f"images (batch, {size})" if chosen.packing is None else f"inputs {chosen.packing}"
    shape = f"opset {given.opset}, {taken} → logits (batch, {given.description.classes})"
    return f"{_written(path)}, {shape}\nonnxruntime against PyTorch on {chosen.text}: {agreement}"


def _program(given: Exportable, path: Path) -> str:
    require_free(given.overwrite, path)
    chosen = given.samples()
    agreement = write_program(path, given.network, chosen.images, chosen.packing)
    return f"{_written(path)}, any number of images\nread back, on {chosen.text}: {agreement}"


def _state(given: Exportable, path: Path) -> str:
    require_free(given.overwrite, path)
    count = write_state(path, given.network)
    return f"{_written(path)}, {count} tensors, read back with equal bits"


def _python(given: Exportable, path: Path) -> str:
    weights = weights_of(path)
    require_free(given.overwrite, path, weights)
    chosen, what = given.samples(), given.description
    if chosen.packing:
        raise ExportError(
            f"--format python writes networks of images alone, this one takes {chosen.packing}; use torch-export "
            f"or onnx"
        )
    constants = [f"MEAN, STD = {what.image.mean}, {what.image.std}"] if what.arch else []
    if what.labels:
        constants += textwrap.wrap(f"LABELS = {what.labels}", 110, subsequent_indent="    ")
    title = f"{what.arch.rpartition('/')[2] or type(given.network).__name__} with low-rank layers."
    agreement = write_source(path, given.network, chosen.images, title, constants)
    return f"{_written(path)}, and {weights}\nwithout this package, on {chosen.text}: {agreement}"


def _written(path: Path) -> str:
    return f"written to {path}, {path.stat().st_size / 1e6:.3g} MB"


WRITERS: dict[Format, Callable[[Exportable, Path], str]] = {
    "onnx": _onnx,
    "torch-export": _program,
    "state-dict": _state,
    "python": _python,
}
