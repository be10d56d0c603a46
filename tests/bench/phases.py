"""Parts of the GPU benchmark that pass over images: statistics, curvature, fine-tuning; against plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import fingerprint
from dist_prune.distributed.world import World
from dist_prune.network.memory_format import lay_out
from dist_prune.network.models import build
from dist_prune.network.sites import View, evaluating, survey
from dist_prune.statistics.moments import collect_moments
from dist_prune.training.trainer import Trainer
from tests.bench.ceilings import (
    Ceilings,
    Precision,
    Work,
    counted_work,
    forward_work,
    moments_work,
    precisions,
    tensor_cores,
)
from tests.bench.curvature import TARGETS, both_passes
from tests.bench.figures import Figure, missing, rate, ratio
from tests.bench.speed import Bare
from tests.bench.timing import Pair, interleaved, seconds

ALL_PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bf16")
NO_TF32 = "this device has no TF32"


@dataclass(frozen=True)
class Scale:
    """How much is measured: `batches` of `images` in each of `rounds` rounds at most."""

    archs: tuple[str, ...] = ("resnet18", "resnet50")
    side: int = 224
    images: int = 256
    batches: int = 8
    rounds: int = 5
    product: int = 8192  # of the square matrices that show the ceiling
    copied: int = 4 << 30  # bytes
    latency_batches: tuple[int, ...] = (1, 32, 256)
    digits: int = 1797  # images that a small network is trained on
    epochs: int = 12
    pictures: int = 1024  # that are decoded


@dataclass(frozen=True)
class Bench:
    """Where a part runs, and until when (`time.monotonic`) it may begin something new."""

    world: World
    scale: Scale
    ceilings: Ceilings
    until: float

    @property
    def device(self) -> torch.device:
        return self.world.device

    def compared(self, ours: Callable[[], object], plain: Callable[[], object]) -> Pair:
        """Both in turns."""
        clock = "wall" if self.device.type == "cuda" else "cpu"
        return interleaved(ours, plain, self.scale.rounds, self.device, clock, self.until)

    @property
    def count(self) -> int:
        """Images of one round."""
        return self.scale.batches * self.scale.images


def subject(bench: Bench, arch: str, channels_last: bool = False) -> tuple[nn.Module, Tensor]:
    """A network with random weights and a batch of noise."""
    torch.manual_seed(0)
    scale = bench.scale
    model = build(arch, 1000).to(bench.device)
    images = torch.randn(scale.images, 3, scale.side, scale.side, device=bench.device)
    if channels_last:
        lay_out(model, torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return model, images


# ── statistics ─────────────────────────────────────────────────────────────────────────────────────────────


def statistics_pass(bench: Bench) -> Iterator[Figure]:
    """Moments of all sites against the forward pass of the same precision and layout.

    `--statistics-bf16` leaves the layout as it is, so what `--channels-last` gains stands beside it.
    """
    layouts: list[tuple[Precision, bool]] = [*((precision, False) for precision in ALL_PRECISIONS), ("bf16", True)]
    for arch in bench.scale.archs:
        for precision, channels_last in layouts:
            name = f"{arch}, {precision}{', channels last' if channels_last else ''}"
            if precision in precisions(bench.device):
                with tensor_cores(precision):
                    yield from _statistics(bench, name, precision, *subject(bench, arch, channels_last))
            else:
                yield missing(name, NO_TF32)


def _statistics(
    bench: Bench, name: str, precision: Precision, model: nn.Module, images: Tensor
) -> Iterator[Figure]:
    views = [View(site) for site in survey(model, images[:1]).sites]
    batches, bf16 = [images] * bench.scale.batches, precision == "bf16"
    ours = partial(collect_moments, model, views, batches, bench.world, bf16=bf16)
    plain = partial(forward, model, batches, bf16)
    taken = bench.compared(ours, plain)
    yield rate(f"{name}: forward", bench.count, taken.plain)
    yield rate(f"{name}: statistics pass", bench.count, taken.ours)
    yield ratio(f"{name}: statistics pass ÷ forward", taken, 1.10)
    yield memory(f"{name}: peak memory ÷ forward's", ours, plain, bench.device, 1.3)
    passes = forward_work(model, images, precision).times(bench.scale.batches)
    sums = moments_work(views, bench.count, 2 if bf16 else 4)
    extra = median(a - b for a, b in zip(taken.ours, taken.plain, strict=True))
    yield passes.fraction(f"{name}: forward", median(taken.plain), bench.ceilings)
    yield sums.fraction(f"{name}: moments alone", extra, bench.ceilings)


def forward(model: nn.Module, batches: Sequence[Tensor], bf16: bool) -> None:
    with evaluating(model):
        for images in batches:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                model(images)


def memory(
    name: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    device: torch.device,
    target: float | None = None,
) -> Figure:
    """Peak memory above what was there before, ours ÷ plain; on a GPU, whose allocator counts it."""
    if device.type != "cuda":
        return missing(name, "the CPU's allocator does not count; tests/bench/speed.py takes a process for each")
    peaks = [_peak_bytes(function, device) for function in (ours, plain)]
    detail = f"{peaks[0] / 2**30:.3g} GiB against {peaks[1] / 2**30:.3g} GiB, network and images not counted"
    return Figure(name, peaks[0] / max(1, peaks[1]), "×", target=target, detail=detail)


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


# ── curvature ──────────────────────────────────────────────────────────────────────────────────────────────


def curvature_pass(bench: Bench) -> Iterator[Figure]:
    """Each kind of curvature, of all sites, against forward + backward."""
    for precision in (p for p in precisions(bench.device) if p != "tf32"):
        model, images = subject(bench, bench.scale.archs[0])
        index = torch.arange(len(images), device=bench.device)
        batches = [Batch(images, index, index)] * max(1, bench.scale.batches // 2)
        for kind in TARGETS:
            with tensor_cores(precision):
                yield from _curvature(bench, f"{kind}, {precision}", model, batches, kind, precision)


def _curvature(
    bench: Bench, name: str, model: nn.Module, batches: list[Batch], kind: str, precision: Precision
) -> Iterator[Figure]:
    bf16 = precision == "bf16"
    ours, plain = both_passes(bench.world, model, batches, kind, bf16)
    taken = bench.compared(ours, plain)
    count = len(batches) * bench.scale.images
    yield rate(f"{name}: forward + backward", count, taken.plain)
    yield rate(f"{name}: curvature pass", count, taken.ours)
    yield ratio(f"{name}: curvature pass ÷ forward + backward", taken, TARGETS[kind])
    yield memory(f"{name}: peak memory ÷ forward + backward's", ours, plain, bench.device)
    one, _ = both_passes(bench.world, model, batches[:1], kind, bf16)
    work = counted_work(one, precision).times(len(batches))
    yield work.fraction(f"{name}: curvature pass", median(taken.ours), bench.ceilings)


# ── fine-tuning ────────────────────────────────────────────────────────────────────────────────────────────


def fine_tuning(bench: Bench) -> Iterator[Figure]:
    """The trainer's steps against a bare DDP loop's: in bf16 and NHWC, and in neither."""
    arch = bench.scale.archs[0]
    times: dict[Precision, float] = {}
    kinds: tuple[Precision, Precision] = ("bf16", "float32")
    for precision in kinds:
        taken = _trained(bench, arch, precision)
        name = f"{arch}, {'bf16 and channels last' if precision == 'bf16' else 'neither'}"
        times[precision] = median(taken.ours)
        yield rate(f"{name}: bare loop", bench.count, taken.plain)
        yield rate(f"{name}: fine-tuning", bench.count, taken.ours)
        yield ratio(f"{name}: fine-tuning ÷ bare loop", taken, 1.03)
        steps = step_work(bench, arch, precision).times(bench.scale.batches)
        yield steps.fraction(f"{name}: fine-tuning", median(taken.ours), bench.ceilings)
    yield Figure(f"{arch}: seconds, bf16 and channels last ÷ neither", times["bf16"] / times["float32"], "×")
    model, _ = subject(bench, arch)
    proof = seconds(lambda: fingerprint(model), bench.device, "wall")
    yield Figure(f"{arch}: proof that ranks hold the same, once an epoch", proof, "s")


def step_work(bench: Bench, arch: str, precision: Precision) -> Work:
    """Three forward passes' products: each layer's output, and the gradients of its input and its weight."""
    kind: Precision = (
        "tf32" if bench.device.type == "cuda" and precision == "float32" else precision
    )  # as torch is
    flops = forward_work(*subject(bench, arch), kind).flops
    return Work({p: 3 * count for p, count in flops.items()})


def _trained(bench: Bench, arch: str, precision: Precision) -> Pair:
    """Seconds of `batches` steps, ours and bare; the proof at an epoch's end is not in them."""
    fast, scale = precision == "bf16", bench.scale
    model, images = subject(bench, arch, channels_last=fast)
    labels = torch.arange(len(images), device=bench.device)
    batches = [Batch(images, labels, labels)] * scale.batches
    settings = TrainingConfig(epochs=scale.rounds + 1, batch_size=scale.images, lr=0.01, warmup=0, bf16=fast)
    trainer = Trainer(copy.deepcopy(model), settings, settings.epochs * scale.batches, bench.world)
    bare = Bare(model, settings, trainer.steps)
    return bench.compared(lambda: next(trainer.epoch(batches, scale.batches)), partial(bare.epoch, batches))
