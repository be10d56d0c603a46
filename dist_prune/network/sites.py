"""A layer as a matrix: which convolutions and linear layers can be factored, and what each costs.

A *site* is one `Conv2d` or `Linear` seen as `y = W x + b` with `W` of shape (C, D); a *row* is one output
position of one image. A convolution with g groups is g independent matrices, so every tensor of a site has
a leading group dimension: weights (g, c, d) with C = g·c and d = in/g·kh·kw. Ordinary layers have g = 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.network.errors import ModelError
from dist_prune.network.layers import UNKNOWN, require_layers, why_dense
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.outputs import concern_about
from dist_prune.network.trial import StandInTrial, answer_of, stand_ins, tolerance_of, unlike_batches
from dist_prune.network.windows import padded, patches


class SiteError(ValueError):
    """A site that cannot be what was asked of it; the message names it."""


@dataclass(frozen=True)
class Site:
    """One factorable layer.

    Attributes:
        name: of its module.
        kind: `conv` or `linear`.
        groups: independent matrices.
        outputs: C, all groups together.
        inputs: d, of one group: in/g·kh·kw.
        rows: output positions per image, summed over the calls of one forward pass.
        kernel: height and width, as `stride`.
        stride: of the kernel.
        bias: whether it has one.
        maps: positions per image of the input, of the input strided by rows alone, and of it strided by columns
            alone: what a layer works on that has one axis of the kernel, or none.
    """

    name: str
    kind: str
    groups: int
    outputs: int
    inputs: int
    rows: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    bias: bool = False
    maps: tuple[int, int, int] = (0, 0, 0)

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.inputs // (self.kernel[0] * self.kernel[1])

    @property
    def width(self) -> int:
        """Output channels of one group (c)."""
        return self.outputs // self.groups

    @property
    def max_rank(self) -> int:
        """All directions of the larger side, all groups together: more are impossible."""
        return self.groups * max(self.width, self.inputs)

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer, without bias."""
        return self.outputs * self.inputs

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer for one image."""
        return self.rows * self.dense_weights

    @property
    def shape(self) -> str:
        """For tables: `128×64·3×3/2` is 64 → 128 channels, 3×3, stride 2."""
        text = f"{self.outputs}×{self.inputs // (self.kernel[0] * self.kernel[1])}"
        if self.kind == "conv":
            text += f"·{self.kernel[0]}×{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}"
        return text + (f" g{self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True)
class Skipped:
    """A layer with weights that stays dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What a network consists of, from one forward pass of one image."""

    sites: tuple[Site, ...]  # in execution order
    skipped: tuple[Skipped, ...]
    macs: int  # of the whole network for one image, everything counted
    params: int
    classes: int
    positions: int = 1  # of an image that have classes, as the pixels of a segmentation
    concern: str = ""  # what is odd about its outputs

    def require_classes(self) -> None:
        """Refuse outputs over which no softmax says anything.

        Raises:
            ModelError: there is one only.
        """
        if self.classes < 2:
            raise ModelError(
                "the network has one output: a softmax over it is always 1, so nothing would count as lost. If it "
                "is a logit z, return two: torch.cat([torch.zeros_like(z), z], 1)"
            )

    def select(self, patterns: str) -> Survey:
        """Keep the sites that `patterns` chooses (see `matches`); the others become skipped.

        Raises:
            SiteError: nothing is chosen.
        """
        chosen = tuple(site for site in self.sites if matches(site, patterns))
        if not chosen:
            names, dense = [s.name for s in self.sites], [f"{s.name} ({s.reason})" for s in self.skipped]
            there = f" ({_named(names, 8)})" if names else ""
            left = f"; layers that can only stay dense: {_named(dense, 5)}" if dense else ""
            raise SiteError(f"--sites {patterns!r} chooses none of {len(names)} sites{there}{left}")
        others = tuple(Skipped(s.name, f"not in --sites {patterns}") for s in self.sites if s not in chosen)
        return replace(self, sites=chosen, skipped=self.skipped + others)


def _named(names: Sequence[str], most: int) -> str:
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])


def matches(site: Site, patterns: str) -> bool:
    """Whether comma-separated `patterns` choose the site.

    A pattern is a glob over names (`layer3.*`), or a kind: `@conv`, `@linear`, `@stride1` (convolutions
    of stride 1), `@spatial` (kernels larger than 1×1). A leading `!` takes away what it matches.
    """
    words = [word.strip() for word in patterns.split(",") if word.strip()]
    taken = [word for word in words if not word.startswith("!")] or ["*"]
    barred = [word[1:] for word in words if word.startswith("!")]
    return any(_matches(site, word) for word in taken) and not any(_matches(site, word) for word in barred)


_KINDS: dict[str, Callable[[Site], bool]] = {
    "@conv": lambda site: site.kind == "conv",
    "@linear": lambda site: site.kind == "linear",
    "@stride1": lambda site: site.kind == "conv" and site.stride == (1, 1),
    "@spatial": lambda site: site.kernel != (1, 1),
}


def _matches(site: Site, word: str) -> bool:
    if not word.startswith("@"):
        return fnmatchcase(site.name, word)
    if word not in _KINDS:
        raise SiteError(f"--sites: unknown kind {word!r}; known: {', '.join(_KINDS)}, or a glob over names")
    return _KINDS[word](site)


def survey(model: nn.Module, image: Tensor) -> Survey:
    """Find every site by running one image through the network, and once more with a stand-in for each.

    Args:
        model: a classification network; left as it was.
        image: (1, 3, H, W) on the network's device; its values do not matter.

    Raises:
        ModelError: no parameters, TorchScript, lazy layers without a shape yet, or outputs that are no logits.
    """
    require_layers(model)
    modules: dict[str, nn.Conv2d | nn.Linear] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    others = {n: m for n, m in model.named_modules() if isinstance(m, UNKNOWN) and n not in modules}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    reasons = {n: why_dense(m, owners) for n, m in modules.items()}  # before hooks of ours are there
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with _watched(modules, calls), evaluating(model), MultiplyAdds() as counter:
        answer = answer_of(model, image)
    reasons |= {n: "its forward never runs" for n, reason in reasons.items() if not reason and n not in calls}
    found = [describe(n, modules[n], *_positions(modules[n], calls[n])) for n in calls if not reasons[n]]
    tried = StandInTrial(
        model, image, answer, tolerance_of([answer, *(y for each in calls.values() for _, y in each)])
    )
    with evaluating(model):
        outputs = {site.name: [y for _, y in calls[site.name]] for site in found}
        reasons |= unlike_batches(model, image, {name: modules[name] for name in outputs}, outputs)
        left = {site.name: modules[site.name] for site in found if not reasons[site.name]}
        reasons |= tried.altering(stand_ins(left))
    reasons |= {n: f"{type(m).__name__} is not factored: only Conv2d and Linear are" for n, m in others.items()}
    return Survey(
        sites=tuple(site for site in found if not reasons[site.name]),
        skipped=tuple(Skipped(n, reason) for n, reason in reasons.items() if reason),
        macs=counter.total,
        params=sum(p.numel() for p in model.parameters()),
        classes=answer.shape[1],
        positions=answer.shape[2:].numel(),
        concern=concern_about(answer),
    )


@contextmanager
def _watched(modules: Mapping[str, nn.Module], calls: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Note, in order of execution, what each module is given and gives: tensors without data."""

    def watch(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> None:
            x = given_to(args, kwargs)
            calls.setdefault(name, []).append((x.to("meta"), y.to("meta")))

        return note

    hooks = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _positions(module: nn.Module, calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, tuple[int, int, int]]:
    """Of one image over all calls: `Site.rows` and `Site.maps`."""
    rows = sum(y.numel() for _, y in calls) // module.get_parameter("weight").shape[0]
    if not isinstance(module, nn.Conv2d):
        return rows, (rows, rows, rows)
    whole = sum(x.numel() for x, _ in calls) // module.in_channels
    by_rows = sum(y.numel() // y.shape[-1] * x.shape[-1] for x, y in calls) // module.out_channels
    by_columns = sum(y.numel() // y.shape[-2] * x.shape[-2] for x, y in calls) // module.out_channels
    return rows, (whole, by_rows, by_columns)


def describe(name: str, module: nn.Module, rows: int = 0, maps: tuple[int, int, int] = (0, 0, 0)) -> Site:
    """The site that a Conv2d or Linear is; `rows` and `maps` as in `Site`, where they matter."""
    if isinstance(module, nn.Conv2d):
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        inputs = module.in_channels // module.groups * kernel[0] * kernel[1]
        bias = module.bias is not None
        return Site(name, "conv", module.groups, module.out_channels, inputs, rows, kernel, stride, bias, maps)
    assert isinstance(module, nn.Linear)
    has_bias = module.bias is not None
    return Site(name, "linear", 1, module.out_features, module.in_features, rows, bias=has_bias, maps=maps)


def weight_of(module: nn.Module, site: Site) -> Tensor:
    """The weight of the site's layer, or of one of its factors, as a matrix (g, outputs/g, inputs), to read."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(site.groups, weight.shape[0] // site.groups, -1)


def bias_of(module: nn.Module, site: Site) -> Tensor:
    """The site's bias, (g, c); zeros where it has none."""
    bias = module.bias
    if isinstance(bias, Tensor):
        return bias.detach().reshape(site.groups, site.width)
    return weight_of(module, site).new_zeros(site.groups, site.width)


def output_rows(site: Site, y: Tensor) -> Tensor:
    """The layer's output as columns, (g·c, images, positions): a view, channels first.

    Args:
        site: the layer.
        y: what its module returned, (N, C, H, W) or (N, …, C); or what it was given, whose channels lie alike.
    """
    if site.kind == "linear":
        return y.reshape(y.shape[0], -1, y.shape[-1]).permute(2, 0, 1)
    return y.flatten(2).transpose(0, 1)


def input_rows(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    """The layer's input patches (im2col) as columns, (g·d, images, positions).

    Args:
        site: the layer.
        module: the dense layer itself: it knows padding and dilation.
        x: what its module was given: (N, in, H, W) or (N, …, in).
    """
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, site.inputs).permute(2, 0, 1)
    assert isinstance(module, nn.Conv2d)
    return patches(module, padded(module, x)).transpose(0, 1)


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a call gave a layer, `layer(x)` or `layer(input=x)`."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def call_of(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> tuple[Tensor, Tensor]:
    """What a call gave the layer and got from it, both with a batch dimension, however the call was written."""
    x = given_to(args, kwargs)
    alone = y.dim() == (3 if site.kind == "conv" else 1)
    return (x[None], y[None]) if alone else (x, y)


@dataclass(frozen=True)
class View:
    """One side of a site: `output` rows are y (k = c), `input` rows are patches x (k = d).

    Patches take k·positions numbers per image, so they are made for as many images at a time as `chunk_bytes`
    allow (at least one).
    """

    site: Site
    side: str = "output"
    chunk_bytes: int = 1 << 27

    @property
    def width(self) -> int:
        """Dimensions of a row, of one group."""
        return self.site.width if self.side == "output" else self.site.inputs

    @property
    def full_rank(self) -> int:
        """Directions of all groups together."""
        return self.site.groups * self.width

    def source(self, x: Tensor, y: Tensor) -> Tensor:
        """The tensor the rows are made of: the layer's input or its output."""
        return y if self.side == "output" else x

    def rows(self, module: nn.Module, source: Tensor) -> Tensor:
        """Rows as columns, (g·k, images, positions)."""
        return output_rows(self.site, source) if self.side == "output" else input_rows(self.site, module, source)

    def chunks(self, y: Tensor, images: int) -> Iterator[slice]:
        """Slices of the first dimension, whole images each, small enough for their patches.

        Args:
            y: the layer's output for a batch.
            images: in the batch; layers on windows or patches have several entries an image.
        """
        entries = len(y) // images
        bytes_each = 4 * self.site.groups * self.width * y.numel() // (images * self.site.outputs)
        some = images if self.side == "output" else max(1, self.chunk_bytes // bytes_each)
        return (slice(start, start + some * entries) for start in range(0, len(y), some * entries))


def _pair(values: Iterable[int | str]) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second
