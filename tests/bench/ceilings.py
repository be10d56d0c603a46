"""What a device can do at best, measured: products and copies; and how near to that work comes.

The floor of some work is the least time it could take here: its multiply-adds at the rates measured for products
of their precision, or its bytes (each input read once, each output written once) at the rate of a copy, whichever
takes longer. A phase's fraction is its floor ÷ the time it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_prune.factorization.latency import sample_calls
from dist_prune.network.sites import View, evaluating
from tests.bench.figures import Figure, missing

Precision = Literal["float32", "tf32", "bf16"]


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """While open, float32 convolutions and products may be TF32 if that is the precision, and are not else."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Those that the device computes in."""
    return ("float32", "tf32", "bf16") if device.type == "cuda" else ("float32", "bf16")


# ── what a device can do ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ceilings:
    """FLOP a second of large products, two for a multiply-add; bytes a second of a copy, read and written."""

    flops: Mapping[Precision, float]
    bytes: float

    def figures(self) -> Iterator[Figure]:
        """For the table."""
        for precision, rate in self.flops.items():
            yield Figure(f"matrix product, {precision}", rate / 1e12, "TFLOP/s")
        yield Figure("copy, read and written", self.bytes / 1e9, "GB/s")


def measure_ceilings(device: torch.device, side: int, copied: int) -> Ceilings:
    """The best of several samples: square products of random numbers, a copy of `copied` bytes."""
    flops: dict[Precision, float] = {}
    for precision in precisions(device):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tensor_cores(precision):
            flops[precision] = 2 * side**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _best(call: Callable[[], object], device: torch.device) -> float:
    return min(sample_calls([call], device)[0])


# ── what work needs ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """FLOP by the precision of their products, and bytes that must move."""

    flops: Mapping[Precision, float]
    bytes: float = 0

    def times(self, count: int) -> Work:
        """So often."""
        return Work({p: count * flops for p, flops in self.flops.items()}, count * self.bytes)

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Least seconds, and what bounds them."""
        products = sum(flops / ceilings.flops[p] for p, flops in self.flops.items())
        copies = self.bytes / ceilings.bytes
        return max(products, copies), "products" if products >= copies else "bytes"

    def fraction(self, name: str, seconds: float, ceilings: Ceilings) -> Figure:
        """Of the ceiling that bounds the work, taking so many seconds."""
        least, bound = self.floor(ceilings)
        name = f"{name}, of its ceiling"
        flops, moved = sum(self.flops.values()) / 1e9, self.bytes / 1e9
        detail = (
            f"{flops:.4g} GFLOP, {moved:.3g} GB, bounded by {bound}: {least:.3g} s at least, took {seconds:.3g} s"
        )
        return Figure(name, least / seconds, detail=detail) if seconds > 0 else missing(name, "lost in the noise")


def forward_work(model: nn.Module, images: Tensor, precision: Precision) -> Work:
    """Of one eager pass: every leaf module reads its input and its weights and writes its output."""
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    with evaluating(model), _moving(model) as moved, autocast:
        counted = counted_work(lambda: model(images), precision)
    return Work({precision: sum(counted.flops.values())}, sum(moved))


def counted_work(function: Callable[[], object], precision: Precision) -> Work:
    """FLOP of one call as torch counts them: convolutions in `precision`, other products in float32."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts().get("Global", {})
    convolutions = sum(flops for operator, flops in counts.items() if "convolution" in str(operator))
    found: dict[Precision, float] = {precision: convolutions}
    found["float32"] = found.get("float32", 0) + counter.get_total_flops() - convolutions
    return Work(found)


@contextmanager
def _moving(model: nn.Module) -> Iterator[list[int]]:
    """Notes the bytes that each leaf module's call moves."""
    moved: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        weights = (weight.nbytes for weight in module.parameters())
        moved.append(sum(x.nbytes for x in inputs) + y.nbytes + sum(weights))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        yield moved
    finally:
        for hook in hooks:
            hook.remove()


def moments_work(views: Sequence[View], images: int, itemsize: int) -> Work:
    """Second moments of all views: half of each symmetric product in float32; every row read once."""
    rows = [(view.site.rows * images * view.site.groups, view.width) for view in views]
    flops = sum(2 * count * width * (width + 1) // 2 for count, width in rows)
    return Work({"float32": flops}, sum(count * width * itemsize for count, width in rows))
