"""Every rank of a form from one decomposition: kernels of its two layers, best first.

With the covariance of patches taken as a product, C_xx ≈ C_c ⊗ C_h ⊗ C_w (channels, height and width of the
kernel), and G the metric of the outputs, the best chain is a truncated SVD of the kernel W, unfolded as the form
says and whitened on all axes. `input`: rows are channels. `vertical`: rows are (channel, height), columns (output,
width). `horizontal` is the same, the other way round. (Jaderberg et al. 2014 unfold so, without whitening.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis, spread
from dist_prune.factorization.forms import FORMS, kernels
from dist_prune.network.sites import Site
from dist_prune.statistics.collect import Statistics
from dist_prune.statistics.patches import PatchMoments, white
from dist_prune.utils.decompositions import eigh

# The axis of the kernel (g, C, c, kh, kw) that the first layer takes besides the channels.
FIRST_AXIS = {"input": None, "vertical": 3, "horizontal": 4}


@dataclass(frozen=True)
class Nested:
    """The chains of all ranks of one form at one site, float64: the first r of both kernels are the best r.

    Attributes:
        first: kernels of the first layer, (g, q, c, kh or 1, kw or 1).
        second: kernels of the second, (g, C, q, kh or 1, kw or 1).
        mean: of the patches, (g, d).
        spectrum: what each direction is worth, (g, q), in the unit of the site's basis.
    """

    first: Tensor
    second: Tensor
    mean: Tensor
    spectrum: Tensor

    def kept(self, rank: int) -> tuple[Tensor, Tensor]:
        """Both layers' kernels at this rank, all groups together."""
        each = rank // len(self.mean)
        return self.first[:, :each], self.second[:, :, :each]


@dataclass(frozen=True)
class Whitened:
    """A kernel (g, C, c, kh, kw) as it is and whitened on all axes; of each axis the root and its inverse."""

    plain: Tensor
    white: Tensor
    roots: Mapping[int, tuple[Tensor, Tensor]]
    mean: Tensor


def whitened(weight: Tensor, patches: PatchMoments, metric: Tensor, damping: float = 0.0) -> Whitened:
    """What the decompositions of all forms begin with.

    Args:
        weight: (g, C, c, kh, kw), float64.
        patches: of the layer's inputs.
        metric: of its outputs, (g, C, C), not negative.
        damping: of the metric, a share of its largest eigenvalue.
    """
    groups, _, _, tall, wide = weight.shape
    spatial = patches.places.reshape(groups, tall, wide, tall, wide)
    roots = {
        1: root_of(metric, damping),
        2: root_of(patches.channels),
        3: root_of(torch.einsum("ghwiw->ghi", spatial)),
        4: root_of(torch.einsum("ghwhv->gwv", spatial)),
    }
    found = weight
    for axis, (root, _) in roots.items():
        found = _along(found, root, axis)
    return Whitened(weight, found, roots, patches.mean)


def decompose(form: str, kernel: Whitened, worth: Tensor) -> Nested:
    """The chains of a form.

    Args:
        form: `input`, `vertical` or `horizontal`.
        kernel: of the layer.
        worth: all directions of the outputs together, (g,): what the spectrum sums to.
    """
    weight, roots = kernel.plain, kernel.roots
    groups, outputs, channels, tall, wide = weight.shape
    own = FIRST_AXIS[form]
    rows = [2] if own is None else [2, own]
    columns = [axis for axis in (1, 3, 4) if axis not in rows]
    order = (0, *rows, *columns)
    matrix = kernel.white.permute(order).flatten(1 + len(rows)).flatten(1, len(rows))  # g, rows, columns
    values, vectors = _left_singular(matrix)
    most = values.shape[-1]
    one = [1 if axis not in rows else size for axis, size in ((3, tall), (4, wide))]
    first = vectors.mT.reshape(groups, most, channels, *one)  # its rows in the whitened axes
    encode = first
    for axis in rows:
        first = _along(first, roots[axis][1], axis)
        encode = _along(encode, roots[axis][0], axis)
    rest = [size if axis not in rows else 1 for axis, size in ((3, tall), (4, wide))]
    plain = weight.permute(order).flatten(1 + len(rows)).flatten(1, len(rows))
    second = encode.reshape(groups, most, -1) @ plain  # g, q, C·rest
    scale = worth / values.sum(-1).clamp(min=torch.finfo(values.dtype).tiny)
    return Nested(
        first.contiguous(),
        second.reshape(groups, most, outputs, *rest).transpose(1, 2).contiguous(),
        kernel.mean,
        values * scale[:, None],
    )


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (g, q), largest first, and left vectors (g, rows, q) of (g, rows, columns).

    From a Gram matrix (q, q), q the smaller of both: that of a tall matrix's triangular factor.
    """
    tall = matrix.shape[1] > matrix.shape[2]
    before, square = torch.linalg.qr(matrix) if tall else (None, matrix)
    values, vectors = eigh(square @ square.mT)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    return values, vectors if before is None else before @ vectors


def root_of(matrix: Tensor, damping: float = 0.0, floor: float = 1e-9) -> tuple[Tensor, Tensor]:
    """The symmetric root of a covariance (g, k, k), scaled to 1, and its inverse; small eigenvalues are lifted.

    To all eigenvalues is added `damping` times the largest one.
    """
    values, vectors = eigh(matrix)
    largest = values[:, -1:]
    relative = torch.where(largest > 0, values / torch.where(largest > 0, largest, 1), 1)
    root = ((relative + damping) / (1 + damping)).clamp(min=floor).sqrt()[:, None]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _along(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis of (g, …) by a matrix (g, k, k) of each group."""
    moved = tensor.movedim(axis, -1)
    shape = moved.shape
    return (moved.reshape(shape[0], -1, shape[-1]) @ matrix.mT).reshape(shape).movedim(-1, axis)


def nested_of(
    model: nn.Module,
    sites: Iterable[Site],
    forms: Collection[str],
    bases: Mapping[str, Basis],
    statistics: Statistics,
    damping: float,
    world: World,
) -> dict[str, dict[str, Nested]]:
    """The chains of all forms that are wanted, of the sites that can take them; each site solved on one rank.

    Args:
        model: the dense network.
        sites: of it.
        forms: names; `tucker` begins with what `input` gives.
        bases: of the sites' outputs, whose spectra say what the sites are worth.
        statistics: with patch moments; the metric of outputs, where there is one. Without patch moments all inputs
            count alike.
        damping: of the metric, a share of its largest eigenvalue, as for the bases.
        world: the ranks, which all get the same.

    Returns:
        site → form → chains.
    """
    wanted = {*forms, *(["input"] if "tucker" in forms else [])} & FIRST_AXIS.keys()
    possible = {site: [n for n in FIRST_AXIS if n in wanted and not FORMS[n].why_not(site)] for site in sites}
    tasks = {site: names for site, names in possible.items() if names}
    owners = spread([sum(_work(site, name) for name in names) for site, names in tasks.items()], world.size)
    found: dict[str, dict[str, Nested]] = {}
    for (site, names), owner in zip(tasks.items(), owners, strict=True):
        if owner != world.rank:
            found[site.name] = {name: _blank(site, name, world.device) for name in names}
            continue
        worth = bases[site.name].spectrum.clamp(min=0).sum(-1)
        patches = statistics.patches.get(site.name) or white(site, world.device)
        weight = kernels(model.get_submodule(site.name), site.groups)
        kernel = whitened(weight, patches, _metric(site, statistics, world.device), damping)
        found[site.name] = {name: decompose(name, kernel, worth) for name in names}
    for rank in sorted(set(owners)):
        theirs = [site for site, owner in zip(tasks, owners, strict=True) if owner == rank]
        own = [nested for site in theirs for nested in found[site.name].values()]
        world.broadcast_(*(t for n in own for t in (n.first, n.second, n.mean, n.spectrum)), source=rank)
    return found


def _metric(site: Site, statistics: Statistics, device: torch.device) -> Tensor:
    metric = statistics.curvature.get(site.name)
    if metric is None or metric.shape[-1] != site.width:
        return torch.eye(site.width, dtype=torch.float64, device=device).expand(site.groups, -1, -1)
    return metric


def _work(site: Site, name: str) -> float:
    axis = FIRST_AXIS[name]
    return float(site.groups * (site.channels * (1 if axis is None else site.kernel[axis - 3])) ** 3)


def _blank(site: Site, name: str, device: torch.device) -> Nested:
    """Room for chains solved elsewhere."""
    own, (tall, wide) = FIRST_AXIS[name], site.kernel
    most = FORMS[name].full_ranks(site)[0] // site.groups
    one, rest = (
        [tall if own == 3 else 1, wide if own == 4 else 1],
        [1 if own == 3 else tall, 1 if own == 4 else wide],
    )
    first = torch.empty(site.groups, most, site.channels, *one, dtype=torch.float64, device=device)
    second = first.new_empty(site.groups, site.width, most, *rest)
    return Nested(first, second, first.new_empty(site.groups, site.inputs), first.new_empty(site.groups, most))
