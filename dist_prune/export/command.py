"""`dist-prune export`: the compressed network of a run, in a format that needs nothing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import nn

from dist_prune.artifacts.run_directory import is_known
from dist_prune.artifacts.saved_model import Description, load_compressed, read_description
from dist_prune.config.flags import require
from dist_prune.export.formats import OPSET
from dist_prune.export.int8 import FEWEST, require_int8
from dist_prune.export.quantised import compare, source_of
from dist_prune.export.samples import Samples, samples
from dist_prune.export.writers import FILES, WRITERS, Exportable, Format, require_free
from dist_prune.run.finish import finished
from dist_prune.utils.files import CheckpointError, write_text

INT8_FILE = "model-int8.onnx"
IMAGES = 64  # that the written network is compared on


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
    int8: bool = False
    """onnx: in 8-bit integers, calibrated on images of the run; dense and compressed, float32 and int8 are
    then measured side by side on all validation images. Default file model-int8.onnx, and .json beside it."""
    calibration_images: int = 512
    """--int8: how many of the run's calibration images; every eighth chooses among onnxruntime's methods."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        require(not self.int8 or self.format == "onnx", f"--int8 with --format {self.format}: goes with onnx")
        require(
            self.calibration_images >= FEWEST,
            f"--calibration-images {self.calibration_images}: expected at least {FEWEST}",
        )
        require(not self.int8 or self.images is None, "--images with --int8: it takes the run's own; leave it out")


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
        DataError: `--images` has none; with `--int8`, the run's images are gone.
        ConfigError: flags that do not go together.
    """
    asked = parse(words)
    taken = take(asked.run)
    if asked.int8:
        print(export_int8(asked, taken))
        return 0
    path = asked.out or asked.run / FILES[asked.format]

    def to_compare() -> Samples:
        return samples(taken.folder, taken.description.image, asked.images, IMAGES)

    given = Exportable(taken.network, taken.description, to_compare, asked.opset, asked.overwrite)
    print(WRITERS[asked.format](given, path))
    return 0


def export_int8(asked: Export, taken: Compressed) -> str:
    """Write the network in 8-bit integers and what was measured of it; that in words."""
    path = asked.out or asked.run / INT8_FILE
    figures = path.with_suffix(".json")
    require_int8(asked.opset)
    require_free(asked.overwrite, path, figures)
    source = source_of(taken.folder, asked.calibration_images)
    found = compare(taken.network, source, path, asked.opset)
    write_text(figures, found.to_json())
    return f"{found}\nwritten to {path}, and {figures}"


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
    description = read_description(folder)
    if description.inputs:
        raise CheckpointError(
            f"{folder}: its network takes inputs by name ({', '.join(description.inputs)}), this command knows "
            f"images alone; in Python, use Compression.export"
        )
    return Compressed(folder, load_compressed(folder), description)
