"""How large and how fast a compressed network is against the dense one, on this device.

All times are medians of samples taken in turn; see `latency.sample_calls`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_prune.export.formats import OPSET, ExportError, onnx_session, require_onnx, write_onnx
from dist_prune.export.int8 import FEWEST, CalibrationImages, quantise, require_int8
from dist_prune.export.pair_times import SiteSpeed, time_pairs
from dist_prune.factorization.execution import PLAIN, Execution
from dist_prune.factorization.latency import sample_calls
from dist_prune.network.memory_format import channels_last
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import evaluating, survey
from dist_prune.utils.text import read_text

Engine = Literal["eager", "channels-last", "compile", "onnxruntime", "onnxruntime-int8"]
Network = Callable[[Tensor], object]
ROUNDS = 5  # samples of whole passes, at least


@dataclass(frozen=True)
class Amount:
    """Something of the dense and of the compressed network."""

    dense: float
    compressed: float

    @property
    def ratio(self) -> float:
        """Compressed ÷ dense."""
        return self.compressed / self.dense


@dataclass(frozen=True)
class TimedPass:
    """One batch through both networks: milliseconds, and dense ÷ compressed, median and range over the rounds."""

    engine: Engine
    batch: int
    dense: float
    compressed: float
    speedup: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Speed:
    """What `dist-prune speed` measures, and `speed.json` holds, field by field.

    Attributes:
        device: its name, with the number of threads on a CPU.
        torch: version.
        macs: multiply-adds of one image.
        params: parameters.
        megabytes: of parameters and buffers.
        passes: one entry per engine and batch size.
        sites: in order of execution, for batches of `site_batch` images, eager.
        site_batch: images.
        site_share: part of the dense eager pass that these sites take, 0 to 1; the rest is not compressed.
        notes: engines that could not be measured, and why.
        bf16: whether all ran in bfloat16 autocast.
    """

    device: str
    torch: str
    macs: Amount
    params: Amount
    megabytes: Amount
    passes: tuple[TimedPass, ...]
    sites: tuple[SiteSpeed, ...]
    site_batch: int
    site_share: float
    notes: tuple[str, ...] = ()
    bf16: bool = False

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Speed:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            amounts = {name: Amount(**found[name]) for name in ("macs", "params", "megabytes")}
            passes = tuple(TimedPass(**entry) for entry in found["passes"])
            sites = tuple(SiteSpeed(**entry) for entry in found["sites"])
            return Speed(**found | amounts | {"passes": passes, "sites": sites, "notes": tuple(found["notes"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what `dist-prune speed` writes ({error!r})") from error


def measure_speed(
    dense: nn.Module,
    compressed: nn.Module,
    image: Tensor,
    batches: Sequence[int],
    engines: Sequence[Engine],
    execution: Execution = PLAIN,
) -> Speed:
    """Time both networks.

    Args:
        dense: on the device to measure; its weights do not matter.
        compressed: the same with `Factored` sites, there.
        image: (1, 3, H, W), there.
        batches: how many images a pass has.
        engines: what runs them; one that cannot is noted.
        execution: the precision; what is compiled follows from `engines`.
    """
    with evaluating(dense), evaluating(compressed), execution.autocast(image.device):
        whole = [survey(network, image) for network in (dense, compressed)]
        passes, notes = _passes(dense, compressed, image, batches, engines, execution)
        images = _batch(image, sorted(batches)[len(batches) // 2])
        sites = time_pairs(dense, compressed, whole[0].sites, images, execution)
        (eager,) = sample_calls([lambda: dense(images)], images.device, ROUNDS)
    return Speed(
        device=device_name(image.device),
        torch=torch.__version__,
        macs=Amount(*(found.macs for found in whole)),
        params=Amount(*(found.params for found in whole)),
        megabytes=Amount(_megabytes(dense), _megabytes(compressed)),
        passes=passes,
        sites=sites,
        site_batch=len(images),
        site_share=min(1.0, sum(site.dense for site in sites) / (1e3 * median(eager))),
        notes=notes,
        bf16=execution.bf16,
    )


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    """As the kernel reports it."""
    info = Path("/proc/cpuinfo")
    lines = read_text(info).splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _megabytes(network: nn.Module) -> float:
    own = {tensor.data_ptr(): tensor.nbytes for tensor in network.state_dict().values()}
    return float(sum(own.values())) / 1e6


# ── whole passes ───────────────────────────────────────────────────────────────────────────────────────────


def _passes(
    dense: nn.Module,
    compressed: nn.Module,
    image: Tensor,
    batches: Sequence[int],
    engines: Sequence[Engine],
    execution: Execution,
) -> tuple[tuple[TimedPass, ...], tuple[str, ...]]:
    """All that could be measured, and what could not."""
    passes: list[TimedPass] = []
    notes: list[str] = []
    for engine in engines:
        try:
            passes += timed_passes(engine, dense, compressed, [_batch(image, n) for n in batches], execution)
        except ExportError as error:
            notes.append(f"{engine}: {error}")
    return tuple(passes), tuple(notes)


def timed_passes(
    engine: Engine,
    dense: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Tensor],
    execution: Execution = PLAIN,
) -> list[TimedPass]:
    """Both networks on the same batches, in turns.

    Raises:
        ExportError: the engine cannot run them.
    """
    if execution.bf16 and engine.startswith("onnxruntime"):
        raise ExportError("it knows no autocast, and would run as without; measure it without --bf16")
    torch.compiler.reset()  # what is compiled counts by function, not by network, and after eight runs eagerly
    with execution.autocast(batches[0].device):
        first, second = (ENGINES[engine](network, batches[0]) for network in (dense, compressed))
        return [_timed(engine, first, second, images) for images in batches]


def _timed(engine: Engine, dense: Network, compressed: Network, images: Tensor) -> TimedPass:
    first, second = sample_calls([lambda: dense(images), lambda: compressed(images)], images.device, ROUNDS)
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    times = (1e3 * median(first), 1e3 * median(second))
    return TimedPass(engine, len(images), *times, median(ratios), min(ratios), max(ratios))


def _batch(image: Tensor, count: int) -> Tensor:
    return image.expand(count, -1, -1, -1).contiguous()


def _compile(network: nn.Module, images: Tensor) -> Network:
    compiled: Network = torch.compile(network)
    try:
        compiled(images)
    except Exception as error:  # of the compiler, or of there being none
        raise ExportError(f"torch.compile failed ({str(error).strip().splitlines()[0]})") from error
    return compiled


def _onnxruntime(network: nn.Module, images: Tensor) -> Network:
    require_onnx(OPSET)
    with tempfile.TemporaryDirectory() as folder:
        path = _written(network, images, Path(folder))
        return onnx_session(path, images.device.type)


def _onnxruntime_int8(network: nn.Module, images: Tensor) -> Network:
    """Calibrated on noise: what the ranges are does not matter for the time."""
    require_int8(OPSET)
    noise = torch.randn(FEWEST, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "int8.onnx"
        float32, given = _written(network, images, Path(folder)), CalibrationImages(noise)
        quantise(float32, small, given, lambda _, batches: batches, methods=("minmax",))
        return onnx_session(small, images.device.type)


def _written(network: nn.Module, images: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    write_onnx(path, with_replaced(network).cpu(), images[:1].expand(2, -1, -1, -1).cpu())
    return path


ENGINES: dict[Engine, Callable[[nn.Module, Tensor], Network]] = {
    "eager": lambda network, _images: network,
    "channels-last": lambda network, _images: channels_last(network),
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "onnxruntime-int8": _onnxruntime_int8,
}
