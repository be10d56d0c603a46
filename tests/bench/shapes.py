"""Parts of the GPU benchmark that time whole networks: compressed against dense, and what rounding ranks does.

In eager mode a small batch waits for Python to launch its kernels; in a CUDA graph the device alone is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import parse_rule
from dist_prune.factorization.bases import solve
from dist_prune.factorization.latency import sample_calls
from dist_prune.factorization.plan import Plan, cost, make_plan
from dist_prune.factorization.project import rebuild
from dist_prune.factorization.spectra import Spectra, spectra_of
from dist_prune.network.sites import Survey, evaluating, survey
from dist_prune.statistics.collect import Statistics
from tests.bench.ceilings import Precision, tensor_cores
from tests.bench.figures import Figure, missing
from tests.bench.phases import Bench, subject

T = TypeVar("T", nn.Module, Tensor)
Engine = Callable[[nn.Module, Tensor], Callable[[], object]]  # a network and its images → one pass

RULE, BUDGET = "uniform:0.5", "budget:macs=0.5"
ROUNDINGS = (1, 4, 8, 16, 32)
LEAST = 5  # samples


def whole_networks(bench: Bench) -> Iterator[Figure]:
    """Compressed against dense, eager."""
    yield from _compared(bench, partial)


def graphed_networks(bench: Bench) -> Iterator[Figure]:
    """The same in CUDA graphs."""
    if bench.device.type == "cuda":
        yield from _compared(bench, captured)
    else:
        yield missing("all networks", "no GPU")


def captured(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """A pass as a CUDA graph, after some to warm up on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on
        network(images)
    replay: Callable[[], object] = graph.replay
    return replay


def _compared(bench: Bench, engine: Engine) -> Iterator[Figure]:
    """Time of the compressed network ÷ the dense one's, and how much of the saved MACs is saved in time."""
    cuda = bench.device.type == "cuda"
    kinds: tuple[Precision, ...] = ("tf32" if cuda else "float32", "bf16")
    for arch in bench.scale.archs:
        dense, images = subject(bench, arch)
        found = survey(dense, images[:1])
        plan = make_plan(parse_rule(RULE), found, 8 if cuda else 1)
        compressed, macs = rebuild(dense, plan), cost(found, plan).macs / found.macs
        for precision in kinds:
            with tensor_cores(precision):
                name = f"{arch}, {RULE}, {precision}"
                pair = for_inference(dense, precision), for_inference(compressed, precision)
                for count in bench.scale.latency_batches:
                    batch = for_inference(images[:1].repeat(count, 1, 1, 1), precision)
                    yield from _timed(f"{name}, batch {count}", pair, batch, engine, macs)


def _timed(
    name: str, pair: tuple[nn.Module, nn.Module], images: Tensor, engine: Engine, macs: float
) -> Iterator[Figure]:
    dense, compressed = pair
    with evaluating(dense), evaluating(compressed):
        calls = [engine(network, images) for network in pair]
        plain, ours = sample_calls(calls, images.device, LEAST)
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    times = f"{1e3 * median(ours):.4g} against {1e3 * median(plain):.4g} ms; MACs ratio {macs:.3f}"
    yield Figure(f"{name}: time ratio", median(ratios), "×", ratios[0], ratios[-1], detail=times)
    saving = (1 - median(ratios)) / (1 - macs)
    yield Figure(f"{name}: part of the MACs' saving", saving, target=0.8, at_least=True)


def rounded_ranks(bench: Bench) -> Iterator[Figure]:
    """One budget of MACs with ranks in multiples of more and more: all timed in turns with the dense network."""
    arch = bench.scale.archs[-1]
    dense, images = subject(bench, arch)
    found = survey(dense, images[:1])
    spectra = worth(bench, dense, found)
    plans = [make_plan(parse_rule(BUDGET), found, step, spectra=spectra) for step in ROUNDINGS]
    networks = [for_inference(rebuild(dense, plan), "bf16").eval() for plan in plans]
    networks.insert(0, for_inference(dense, "bf16").eval())
    batch = for_inference(images[: max(bench.scale.latency_batches)], "bf16")
    with torch.no_grad():
        plain, *others = sample_calls([lambda n=network: n(batch) for network in networks], batch.device, LEAST)
    for step, plan, samples in zip(ROUNDINGS, plans, others, strict=True):
        ratios = sorted(a / b for a, b in zip(samples, plain, strict=True))
        name = f"{arch}, {BUDGET}, bf16, batch {len(batch)}, multiples of {step}: time ratio"
        yield Figure(name, median(ratios), "×", ratios[0], ratios[-1], detail=described(plan, found))


def for_inference(given: T, precision: Precision) -> T:
    """As one would run it: bfloat16 weights and images, NHWC, a network in place; or as it is."""
    return given.to(dtype=torch.bfloat16, memory_format=torch.channels_last) if precision == "bf16" else given


def described(plan: Plan, found: Survey) -> str:
    """MACs and predicted loss of a plan."""
    assert plan.loss is not None
    macs = cost(found, plan).macs / found.macs
    return f"MACs ratio {macs:.3f}, {len(plan.ranks)} layers factored, predicted relative loss {plan.loss:.4g}"


def worth(bench: Bench, model: nn.Module, found: Survey) -> Spectra:
    """By the weights alone: random ones, as ranks are all that matters here."""
    method = MethodConfig("weight-svd")
    spectra = spectra_of(solve(model, found.sites, Statistics(), method, 0, bench.world), method)
    assert spectra is not None
    return spectra
