"""`dist-prune export`: the compressed network of a run, in a format that needs nothing of this package."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torch import nn

from dist_prune.artifacts.run_directory import is_known
from dist_prune.artifacts.saved_model import Description, load_compressed, read_description
from dist_prune.export.formats import OPSET, require_onnx, write_onnx, write_program, write_state
from dist_prune.export.samples import Samples, samples
from dist_prune.export.source_code import weights_of, write_source
from dist_prune.run.finish import finished
from dist_prune.utils.files import CheckpointError

IMAGES = 64  # that the written network is compared on

Format = Literal["onnx", "torch-export", "state-dict", "python"]
FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "model.pt",
    "python": "model.py",
}


@dataclass(frozen=True)
class Export:
    """Write the compressed network of a run for use without this package, read it back and compare.

    Example: dist-prune export runs/first --format onnx
    """

    run: tyro.conf.Positional[Path]
    """A run's directory, or a folder with its plan.json, model.safetensors and model.safetensors.sha256."""
    format: Format
    """onnx: PyTorch's dynamo exporter, run in onnxruntime; torch-export: a torch.export program; state-dict: the
    tensors alone; python: a readable module that needs torch alone, and NAME_weights.pt next to it."""
    out: Path | None = None
    """File to write; default model.onnx, .pt2, .pt or .py in the run's directory."""
    images: Path | None = None
    """Folder of images, at any depth, to compare on; default: the run's validation images, or noise."""
    opset: int = OPSET
    """onnx: version of the operators."""
    overwrite: bool = False
    """Replace a file that is there."""


@dataclass(frozen=True)
class Compressed:
    """The network of `folder`, and what it is."""

    folder: Path
    network: nn.Module
    description: Description


def main(words: Sequence[str]) -> int:
    """Export what the words say; 0.

    Raises:
        CheckpointError: no finished run, a damaged one, or the file is there already.
        ExportError: the network cannot be written like that, or what was written computes something else.
        DataError: `--images` has none.
    """
    asked = parse(words)
    taken = take(asked.run)
    path = asked.out or asked.run / FILES[asked.format]
    print(WRITERS[asked.format](asked, taken, path))
    return 0


def parse(words: Sequence[str]) -> Export:
    """What the words ask for."""
    return tyro.cli(Export, args=words, prog="dist-prune export")


def take(folder: Path) -> Compressed:
    """The compressed network of a finished run.

    Raises:
        CheckpointError: it is not finished, not a run, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected the directory of a finished run")
    if is_known(folder) and not finished(folder):
        raise CheckpointError(f"{folder}: its run is not finished (no result.json): continue it with --resume")
    return Compressed(folder, load_compressed(folder), read_description(folder))


def require_absent(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file without --overwrite.

    Raises:
        CheckpointError: it would be.
    """
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} is there already: name another file with --out, or add --overwrite")


# ── one function a format: what it did, in words ───────────────────────────────────────────────────────────


def _onnx(asked: Export, taken: Compressed, path: Path) -> str:
    require_onnx(asked.opset)
    require_absent(path, asked.overwrite)
    chosen = _samples(asked, taken)
    agreement = write_onnx(path, taken.network, chosen.images, asked.opset)
    side, classes = taken.description.image.crop, taken.description.classes
    shape = f"opset {asked.opset}, images (batch, 3, {side}, {side}) → logits (batch, {classes})"
    return f"{_written(path)}, {shape}\nonnxruntime against PyTorch on {chosen.text}: {agreement}"


def _program(asked: Export, taken: Compressed, path: Path) -> str:
    require_absent(path, asked.overwrite)
    chosen = _samples(asked, taken)
    agreement = write_program(path, taken.network, chosen.images)
    return f"{_written(path)}, any number of images\nread back, on {chosen.text}: {agreement}"


def _state(asked: Export, taken: Compressed, path: Path) -> str:
    require_absent(path, asked.overwrite)
    count = write_state(path, taken.network)
    return f"{_written(path)}, {count} tensors, read back with equal bits"


def _python(asked: Export, taken: Compressed, path: Path) -> str:
    weights = weights_of(path)
    require_absent(path, asked.overwrite)
    require_absent(weights, asked.overwrite)
    chosen, what = _samples(asked, taken), taken.description
    constants = [f"MEAN, STD = {what.image.mean}, {what.image.std}"]
    constants += textwrap.wrap(f"LABELS = {what.labels}", 110, subsequent_indent="    ")
    title = f"{what.arch.rpartition('/')[2]} with low-rank layers."
    agreement = write_source(path, taken.network, chosen.images, title, constants)
    return f"{_written(path)}, and {weights}\nwithout this package, on {chosen.text}: {agreement}"


def _samples(asked: Export, taken: Compressed) -> Samples:
    return samples(taken.folder, taken.description.image, asked.images, IMAGES)


def _written(path: Path) -> str:
    return f"written to {path}, {path.stat().st_size / 1e6:.3g} MB"


WRITERS: dict[Format, Callable[[Export, Compressed, Path], str]] = {
    "onnx": _onnx,
    "torch-export": _program,
    "state-dict": _state,
    "python": _python,
}
