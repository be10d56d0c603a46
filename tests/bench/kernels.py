"""How many kernels a batch of the statistics launches on a GPU, and how many bytes these read and write: counted.

    uv run python -m tests.bench.kernels [--archs NAME …] [--images N] [--before COMMIT=FILE …]

No GPU is needed. Passes run on tensors without data, and every operator of ATen that would compute or copy on a
GPU counts as one kernel: a lower bound, as libraries may launch several for one. What the network itself does,
forward and, where the pass needs it, backward, is counted by itself and taken off. Tensors are PyTorch's meta
tensors, cut into pieces as on a GPU: fake tensors on `cuda` have no backward pass where there is no GPU.

`--before` takes results of this program at earlier commits, to stand beside.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_prune.data.loader import Batch
from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.watchdog import Whereabouts
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.losses import terms_of
from dist_prune.factorization.nested import FIRST_AXIS, Nested
from dist_prune.network.attention import opened
from dist_prune.network.channels import Consumer
from dist_prune.network.sites import Site, View, evaluating, survey
from dist_prune.statistics import patches, symmetric
from dist_prune.statistics.curvature import STEPS, Objective, collect_curvature
from dist_prune.statistics.moments import collect_moments
from dist_prune.statistics.patches import accumulating_patches
from dist_prune.statistics.second_order import collect_losses
from dist_prune.width.groups import find_groups
from dist_prune.width.moments import collect_channel_moments
from tests.bench.timing import command_line, heading, write_json

RESULT = Path(__file__).parent / "results" / "kernels.json"
ARCHS = ("resnet18", "resnet50", "vit_b_16")
META = torch.device("meta")
BATCHES = 16  # counted, after one that makes the shifts: float32 products are flushed once in so many
T = TypeVar("T")
Pass = Callable[["Network", Iterator[Batch]], object]


# ── counting ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Count:
    """Kernels, and bytes that they read and write."""

    kernels: float = 0
    bytes: float = 0

    def minus(self, other: Count, scale: float = 1) -> Count:
        return Count((self.kernels - other.kernels) / scale, (self.bytes - other.bytes) / scale)


class Launches(TorchDispatchMode):
    """While open, counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    @property
    def count(self) -> Count:
        return Count(self.kernels, self.bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        written = _tensors(found)
        if any(t.is_meta for t in written) and not _is_free(func):
            self.kernels += 1
            self.bytes += sum(map(_extent, [*written, *_read(func, args, kwargs)]))
        return found


def _is_free(func: Any) -> bool:
    """Views, and memory that nothing is written to."""
    arguments, returns = func._schema.arguments, func._schema.returns
    writes = any(a.alias_info and a.alias_info.is_write for a in arguments)
    is_view = not writes and any(r.alias_info for r in returns)
    name = func._schema.name.removeprefix("aten::")
    return is_view or name.removeprefix("new_").startswith("empty") or name in ("_unsafe_view", "detach")


def _read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that a kernel reads: not those that it only overwrites."""
    overwrites = func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_")
    given = [*args[int(overwrites) :], *(value for name, value in kwargs.items() if name != "out")]
    return [t for t in _tensors(given) if t.is_meta]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, tuple | list) else []


def _extent(tensor: Tensor) -> int:
    """Bytes; what was expanded lies there once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


class _Enough(Exception):
    """The batches that count have been seen; what a pass does at its end needs numbers."""


def counted(passing: Callable[[Iterator[T]], object], batch: T) -> Count:
    """What a pass does with one more batch, the mean of `BATCHES`."""
    launches, before = Launches(), [Count()]

    def batches() -> Iterator[T]:
        yield batch
        before[0] = launches.count
        yield from [batch] * BATCHES
        raise _Enough

    with suppress(_Enough), launches:
        passing(batches())
    return launches.count.minus(before[0], BATCHES)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While open, pieces have the sizes of a GPU's, and autocast, which meta tensors do not know, is off."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(symmetric, "CPU_TILES", symmetric.GPU_TILES))
        stack.enter_context(patch.object(patches, "CHUNK", patches.GPU_CHUNK))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        yield


# ── the passes ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Network:
    """A network without data, what a batch of it is, and which of its layers are looked at."""

    model: nn.Module
    sites: Sequence[Site] = ()
    consumers: Sequence[Consumer] = ()
    world: World = field(
        default_factory=lambda: World(LaunchEnv(0, 1, 0, "", "present"), META, Whereabouts(), timeout_s=math.inf)
    )

    def views(self) -> list[View]:
        return [View(site) for site in self.sites]

    def bare(self) -> Network:
        """With no layer looked at."""
        return Network(self.model, world=self.world)


def rows(network: Network, batches: Iterator[Batch]) -> None:
    collect_moments(network.model, network.views(), (b.images for b in batches), network.world)


def gradients(network: Network, batches: Iterator[Batch], kind: str) -> None:
    views, means = network.views(), {s.name: _blank(s.groups, s.width) for s in network.sites}
    collect_curvature(network.model, views, batches, network.world, STEPS[kind], Objective("kl"), means)


def windows(network: Network, batches: Iterator[Batch]) -> None:
    with accumulating_patches(network.model, network.sites, META), evaluating(network.model):
        for batch in batches:
            network.model(batch.images)


def losses(network: Network, batches: Iterator[Batch]) -> None:
    """Of all forms."""
    model, means = network.model, {s.name: _blank(s.groups, s.width) for s in network.sites}
    families = {s: terms_of(model, s, _basis(s), _chains(s)) for s in network.sites}
    collect_losses(model, families, means, batches, network.world, draws=1)


def channels(network: Network, batches: Iterator[Batch]) -> None:
    collect_channel_moments(network.model, network.consumers, (b.images for b in batches), network.world)


PASSES: dict[str, tuple[Pass, torch.dtype]] = {
    "moments": (rows, torch.bfloat16),
    "fisher": (partial(gradients, kind="fisher"), torch.bfloat16),
    "gradient": (partial(gradients, kind="gradient"), torch.bfloat16),
    "hessian-local": (partial(gradients, kind="hessian-local"), torch.bfloat16),
    "patches": (windows, torch.bfloat16),
    "second order": (losses, torch.float32),
    "widths": (channels, torch.float32),
}


def _blank(*size: int) -> Tensor:
    return torch.empty(*size, dtype=torch.float64, device=META)


def _basis(site: Site) -> Basis:
    groups, width = site.groups, site.width
    square = _blank(groups, width, width)
    return Basis(square, square.clone(), _blank(groups, width), _blank(groups, width))


def _chains(site: Site) -> dict[str, Nested]:
    """Of all forms that the site can take."""
    found = {}
    for name, axis in FIRST_AXIS.items():
        if not FORMS[name].why_not(site):
            size, most = site.kernel, FORMS[name].full_ranks(site)[0] // site.groups
            own = [n if axis == place else 1 for place, n in ((3, size[0]), (4, size[1]))]
            rest = [1 if axis == place else n for place, n in ((3, size[0]), (4, size[1]))]
            first, second = (site.groups, most, site.channels, *own), (site.groups, site.width, most, *rest)
            mean = _blank(site.groups, site.inputs)
            found[name] = Nested(_blank(*first), _blank(*second), mean, _blank(site.groups, most))
    return found


# ── all of it ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """One pass of one network: what it costs beyond the network itself.

    Attributes:
        network: by torchvision's name.
        kind: of the pass.
        layers: that it looks at.
        kernels: of a batch.
        megabytes: of an image.
        network_kernels: of the network itself, forward and, where the pass needs it, backward.
        network_megabytes: the same.
        before: kernels and megabytes of earlier commits.
    """

    network: str
    kind: str
    layers: int
    kernels: float
    megabytes: float
    network_kernels: float
    network_megabytes: float
    before: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure(arch: str, images: int, size: int) -> Iterator[Row]:
    """All passes of one network."""
    torch.manual_seed(0)
    noise = torch.randn(2, 3, size, size)
    model = opened(torchvision.models.get_model(arch).eval(), noise[:1]).network
    sites = survey(model, noise[:1]).sites
    consumers = [consumer for group in find_groups(model, noise).groups for consumer in group.consumers]
    looked_at = {"widths": len(consumers), "patches": sum(site.kernel != (1, 1) for site in sites)}
    for kind, (passing, dtype) in PASSES.items():
        empty = copy.deepcopy(model).to(META, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        empty.get_submodule(sites[0].name).register_forward_hook(begin_graph)
        network, batch = Network(empty, sites, consumers), batch_of(images, size, dtype)
        with as_on_a_gpu():
            alone = counted(partial(passing, network.bare()), batch)
            own = counted(partial(passing, network), batch).minus(alone)
        each = 1e6 * images
        layers = looked_at.get(kind, len(sites))
        yield Row(arch, kind, layers, own.kernels, own.bytes / each, alone.kernels, alone.bytes / each)


def begin_graph(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Gradients start at the first layer, also where none is looked at."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def batch_of(images: int, size: int, dtype: torch.dtype) -> Batch:
    pixels = torch.empty(images, 3, size, size, dtype=dtype, device=META)
    index = torch.empty(images, dtype=torch.int64, device=META)
    return Batch(pixels.contiguous(memory_format=torch.channels_last), index, index)


def beside(row: Row, earlier: Mapping[str, Path]) -> Row:
    """The row with what the same pass took at earlier commits, where it was there."""
    before = {
        commit: (found["kernels"], found["megabytes"])
        for commit, path in earlier.items()
        for found in json.loads(path.read_text())["rows"]
        if (found["network"], found["kind"]) == (row.network, row.kind)
    }
    return replace(row, before=before)


def shown(rows: Sequence[Row]) -> str:
    """A table in Markdown: kernels of a layer and batch, megabytes of an image, at earlier commits and now."""
    commits = [*dict.fromkeys(commit for row in rows for commit in row.before)]
    titles = [
        "",
        "layers",
        *(f"{commit}: kernels, MB" for commit in commits),
        "now: kernels, MB",
        "network: kernels, MB",
    ]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        taken = [row.before.get(commit) for commit in commits] + [(row.kernels, row.megabytes)]
        cells = [f"{each[0] / row.layers:.1f}, {each[1]:.0f}" if each and row.layers else "–" for each in taken]
        network = f"{row.network_kernels:.0f}, {row.network_megabytes:.0f}"
        lines.append([f"{row.network}, {row.kind}", str(row.layers), *cells, network])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _commit(word: str) -> tuple[str, Path]:
    commit, _, path = word.partition("=")
    return commit, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="of torchvision")
    parser.add_argument("--images", type=int, default=64, help="of a batch")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--before", nargs="*", type=_commit, default=[], metavar="COMMIT=FILE")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [row for arch in options.archs for row in measure(arch, options.images, options.size)]
    rows = [beside(row, dict(options.before)) for row in rows]
    print(shown(rows))
    write_json(options.output, heading(command_line("tests.bench.kernels")) | {"rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
