"""A run's dense and compressed network in float32 and in 8-bit integers: what each step cost, side by side."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from dist_prune.artifacts.reader import read_run
from dist_prune.artifacts.run_directory import CONFIG
from dist_prune.config.flags import ConfigError
from dist_prune.config.recipe_files import from_dict
from dist_prune.config.run import Run
from dist_prune.correction.calibration import decode
from dist_prune.data.dataset import Dataset, Split
from dist_prune.data.listing import DataError
from dist_prune.data.loader import Stream, evaluation_stream
from dist_prune.distributed.alone import Alone
from dist_prune.export.formats import Function, onnx_session, write_onnx
from dist_prune.export.int8 import COMPARED, FEWEST, TOLERATED, CalibrationImages, in_view, quantise, watched
from dist_prune.export.speed import device_name
from dist_prune.factorization.latency import sample_calls
from dist_prune.network import models
from dist_prune.network.errors import ModelError
from dist_prune.run.images import open_images, open_unlabelled
from dist_prune.run.job import limited
from dist_prune.run.network import load_network
from dist_prune.run.train import cached_weights
from dist_prune.training.evaluate import Metrics, Predictions, predict, score
from dist_prune.utils.files import is_intact, replacing
from dist_prune.utils.tables import table

CPU = torch.device("cpu")
BATCHES = (1, 32)  # images of the passes that are timed
ROUNDS = 5  # samples of each, at least


@dataclass(frozen=True)
class RunSource:
    """The run that a network is of: its settings, images, and ranks."""

    config: Run
    dataset: Dataset
    calibration: Split
    ranks: int


@dataclass(frozen=True)
class File:
    """A network in a precision; `how` says how the ranges of int8 were found."""

    network: str
    precision: str
    path: Path
    how: str = ""

    def __str__(self) -> str:
        """Which it is."""
        return f"{self.network}, {self.precision}"


@dataclass(frozen=True)
class Measured:
    """Of a file: accuracy over all validation images, `megabytes`, and `milliseconds` by batch size.

    KL is to the dense network in float32, or, where that is not there, to the compressed one.
    """

    network: str
    precision: str
    metrics: Metrics
    megabytes: float
    milliseconds: Mapping[int, float]
    how: str = ""


@dataclass(frozen=True)
class FourWay:
    """All files of a run that were measured, in turns, on `device`, and what could not be."""

    device: str
    files: tuple[Measured, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Field by field."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        """For people: the table, then the steps in words, then warnings."""
        sizes = [*self.files[0].milliseconds]
        rows = []
        for one in self.files:
            apart = "" if one.metrics.kl is None else f"{one.metrics.kl:.4f}"
            times = [f"{one.milliseconds[size]:.3g} ms" for size in sizes]
            accuracy = f"{one.metrics.top1:.2f} %"
            rows.append([one.network, one.precision, accuracy, apart, f"{one.megabytes:.3g} MB", *times])
        head = ["network", "precision", "top-1", "KL", "size", *(f"batch {size}" for size in sizes)]
        hows = [f"{one.network}, {one.precision}: {one.how}" for one in self.files if one.how]
        return "\n".join([table(head, rows), self.steps, *hows, *self.notes, *self.warnings])

    @property
    def steps(self) -> str:
        """Points of top-1 from each file to the next."""
        parts = []
        for network in dict.fromkeys(one.network for one in self.files):
            whole, small = (self._top1(network, precision) for precision in ("float32", "int8"))
            parts.append(f"int8 of the {network} network {small - whole:+.2f} points")
        if "dense" in {one.network for one in self.files}:
            change = self._top1("compressed", "float32") - self._top1("dense", "float32")
            parts.insert(0, f"compression in float32 {change:+.2f} points of top-1")
        return "; ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """Files in int8 that are clearly below their float32."""
        found = []
        for one in self.files:
            lost = self._top1(one.network, "float32") - one.metrics.top1
            if one.precision == "int8" and lost > TOLERATED:
                found.append(
                    f"warning: int8 of the {one.network} network is {lost:.2f} points of top-1 below float32; "
                    f"keep the float32 file, try more --calibration-images, or tune the network first"
                )
        return found

    def _top1(self, network: str, precision: str) -> float:
        return next(f.metrics.top1 for f in self.files if (f.network, f.precision) == (network, precision))


class SessionModule(nn.Module):
    """A file as a network, as far as it can be asked for logits."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, H, W)."""
        return self.function(images)


def source_of(folder: Path, count: int) -> RunSource:
    """The run in that directory, and a seeded choice of `count` of the images that it was calibrated on.

    Raises:
        CheckpointError: not the directory of a finished run.
        DataError: its images are gone, or fewer than can be calibrated on.
    """
    run = read_run(folder)
    try:
        config = from_dict(run.settings)
    except ConfigError as error:
        raise ConfigError(
            f"{folder / CONFIG}: damaged, or of another version of this program ({error})"
        ) from error
    dataset, unlabelled = open_images(config), open_unlabelled(config)
    calibration = limited(unlabelled or dataset.train, count, config.seed)
    if len(calibration) < FEWEST:
        raise DataError(f"--int8 is calibrated on images, {FEWEST} or more; {folder} has {len(calibration)}")
    return RunSource(config, dataset, calibration, int(run.result["world_size"]))


def dense_of(source: RunSource) -> nn.Module:
    """The dense network of a run, on the CPU.

    Raises:
        ModelError: its weights are not where they were.
    """
    config, network = source.config, source.config.network
    dense, _ = load_network(config, Alone(CPU), lambda _: None)
    cached = cached_weights(config, source.ranks, source.dataset.train)
    if cached is not None:
        if not is_intact(cached):
            raise ModelError(f"the run trained it, and {cached} is no longer there")
        models.fill(dense, network.arch, network.classes, str(cached))
    return dense


def compare(compressed: nn.Module, source: RunSource, path: Path, opset: int) -> FourWay:
    """Write the compressed network in int8, and measure it beside the others.

    Args:
        compressed: the network, on the CPU.
        source: the run that it is of.
        path: where the file goes, once all is measured.
        opset: of ONNX.

    Raises:
        ExportError: a network cannot be expressed, or not so that its answers are finite.
    """
    networks, notes = {"compressed": compressed}, []
    try:
        networks = {"dense": dense_of(source), **networks}
    except ModelError as error:
        notes.append(f"without the dense network: {error}")
    kept = decode(_stream(source, source.calibration))
    images = CalibrationImages(kept.pixels, kept.prepare)
    with tempfile.TemporaryDirectory() as folder:
        files: list[File] = []
        for name, network in networks.items():
            whole, small = (Path(folder) / f"{name}-{precision}.onnx" for precision in ("float32", "int8"))
            write_onnx(whole, network, kept.prepare(kept.pixels[:COMPARED]), opset)
            how = quantise(whole, small, images, watched)
            files += [File(name, "float32", whole), File(name, "int8", small, str(how))]
        measured = tuple(measure(files, source))
        with replacing(path) as aside:
            shutil.copyfile(files[-1].path, aside)
    return FourWay(device_name(CPU), measured, tuple(notes))


def measure(files: Sequence[File], source: RunSource) -> Iterator[Measured]:
    """Accuracy of all files on the run's validation images; KL is to the first of them. Sizes and times."""
    sessions = [onnx_session(file.path) for file in files]
    found = [_predictions(session, source, str(file)) for session, file in zip(sessions, files, strict=True)]
    times, count = _times(sessions, source.config.images.image.crop), len(source.dataset.val)
    for place, (file, predictions, spent) in enumerate(zip(files, found, times, strict=True)):
        metrics = score(predictions, count, Alone(CPU), found[0] if place else None)
        yield Measured(file.network, file.precision, metrics, file.path.stat().st_size / 1e6, spent, file.how)


def _predictions(session: Function, source: RunSource, name: str) -> Predictions:
    stream = _stream(source, source.dataset.val)
    return predict(SessionModule(session), in_view(name, stream, len(stream)))


def _times(sessions: Sequence[Function], crop: int) -> list[dict[int, float]]:
    """Milliseconds of a pass of each file by batch size: medians, the files in turns."""
    noise = torch.randn(max(BATCHES), 3, crop, crop, generator=torch.Generator().manual_seed(0))
    spent: list[dict[int, float]] = [{} for _ in sessions]
    for size in BATCHES:
        calls = [partial(session, noise[:size]) for session in sessions]
        for one, samples in zip(spent, sample_calls(calls, CPU, ROUNDS), strict=True):
            one[size] = 1e3 * median(samples)
    return spent


def _stream(source: RunSource, split: Split) -> Stream:
    images = source.config.images
    return evaluation_stream(split, images.image, Alone(CPU), images.eval_batch_size, images.threads)
