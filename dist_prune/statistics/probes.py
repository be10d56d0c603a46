"""Curvature by sampling: perturb one site along a random direction and look at the loss of the network's output.

Much slower than `curvature`, one forward a site; kept because it needs no gradient (`hessian-global`), and as the
reference for what `hessian-local` computes in closed form. Each image has a direction of its own, keyed by its
index. In a grouped convolution an image probes one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import View, call_of, evaluating, output_rows, weight_of
from dist_prune.statistics.curvature import differentiating
from dist_prune.statistics.moments import StatisticsError, Tally, Watch, unwatched
from dist_prune.statistics.precision import full_float32
from dist_prune.utils import keyed_random
from dist_prune.utils.decompositions import pinv

Loss = Callable[[Tensor, Tensor], Tensor]  # dense and perturbed logits (N, classes) → (N,)


def mse(dense: Tensor, changed: Tensor) -> Tensor:
    """½‖z′ − z‖², per image; of several positions their mean."""
    return _over_positions((changed - dense).square().sum(1) / 2)


def kl(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(dense ‖ changed), nats per image, in float32 or wider: in half precision small ones drown in rounding.

    The logits are (N, classes), or (N, classes, positions), of which the mean over positions is taken.
    """
    dtype = torch.promote_types(torch.promote_types(dense.dtype, changed.dtype), torch.float32)
    p, q = dense.to(dtype).log_softmax(1), changed.to(dtype).log_softmax(1)
    return _over_positions(F.kl_div(q, p, reduction="none", log_target=True).sum(1))


def _over_positions(losses: Tensor) -> Tensor:
    """(N,), or of (N, positions) the mean."""
    return losses.mean(1) if losses.dim() > 1 else losses


def kl_reverse(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(changed ‖ dense), nats per image."""
    return kl(changed, dense)


LOSSES: dict[str, Loss] = {"mse": mse, "kl": kl, "kl-reverse": kl_reverse}


@dataclass(frozen=True)
class Probing:
    """`loss` of the output's change; `seed` of the directions; `rank_loss` replaces losses by their ranks."""

    loss: Loss
    seed: int = 0
    rank_loss: bool = False


def collect_global(
    model: nn.Module,
    views: Iterable[View],
    batches: Iterable[Batch],
    world: World,
    probing: Probing,
    means: Mapping[str, Tensor],
    watch: Watch = unwatched,
) -> dict[str, Tensor]:
    """The Hessian H of each site's loss l(v) ≈ vᵀHv of projecting a unit direction v out of its rows.

    Args:
        model: the dense network, on the world's device.
        views: of the sites, on either side.
        batches: of this rank; each image is one probe.
        world: the ranks to sum over.
        probing: which loss, which directions.
        means: site name → mean row, (g, k).
        watch: hands over the batches.

    Returns:
        site name → (g, k, k), float64, symmetric, equal on all ranks.

    Raises:
        StatisticsError: a loss that is NaN or infinite (site named).
    """
    views = list(views)
    trials = _Trials([view.site.name for view in views], world.device)
    with evaluating(model), full_float32():
        for batch in watch(batches, {"trials": trials}):
            if len(batch.images):
                trials.indices.append(batch.indices)
                dense = logits_of(model(batch.images))
                for view in views:
                    changed = _projected_out(model, view, batch, means[view.site.name], probing.seed)
                    trials.losses[view.site.name].append(probing.loss(dense, changed).double())
    found = trials.state_dict()
    return {v.site.name: _fit(v, found["indices"], found[f"losses/{v.site.name}"], probing, world) for v in views}


class _Trials:
    """The images tried, and what each site lost on each."""

    def __init__(self, sites: Iterable[str], device: torch.device) -> None:
        self.indices = [torch.zeros(0, dtype=torch.int64, device=device)]
        self.losses = {site: [torch.zeros(0, dtype=torch.float64, device=device)] for site in sites}

    def state_dict(self) -> dict[str, Tensor]:
        losses = {f"losses/{site}": torch.cat(parts) for site, parts in self.losses.items()}
        return {"indices": torch.cat(self.indices), **losses}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        device = self.indices[0].device
        self.indices = [state["indices"].to(device)]
        self.losses = {site: [state[f"losses/{site}"].to(device)] for site in self.losses}


def _projected_out(model: nn.Module, view: View, batch: Batch, mean: Tensor, seed: int) -> Tensor:
    """Logits with each image's own direction projected out of the site's rows."""
    module = model.get_submodule(view.site.name)
    direction = probe_directions(view, batch.indices, seed).to(module.get_parameter("weight").dtype)
    with perturbed(module, view, mean, read=direction, write=direction):
        return logits_of(model(batch.images))


def probe_directions(view: View, indices: Tensor, seed: int) -> Tensor:
    """Unit directions (N, g, k), float64: each image's in one group, zero in the others."""
    name, groups = view.site.name, view.site.groups
    direction = keyed_random.directions(seed, f"probe {name}", indices, view.width)
    group = (keyed_random.uniform(seed, f"group {name}", indices, 1) * groups).long()
    return F.one_hot(group[:, 0], groups)[..., None] * direction[:, None]


@contextmanager
def perturbed(module: nn.Module, view: View, mean: Tensor, read: Tensor, write: Tensor) -> Iterator[None]:
    """While open, the site's rows are a_p − write·readᵀ(a_p − mean), image by image.

    Args:
        module: the dense layer.
        view: of its site. On the input side the change is carried through the layer: y_p − W·write·readᵀ(…).
        mean: (g, k).
        read: (N, g, k), of the images that come next.
        write: (N, g, k).
    """
    site = view.site

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        x, y = call_of(site, args, kwargs, output)
        rows = view.rows(module, view.source(x, y))
        images = len(read)
        centred = rows.reshape(site.groups, view.width, images, -1) - mean.to(rows.dtype)[..., None, None]
        amount = torch.einsum("ngk,gknp->gnp", read, centred)
        out = write.transpose(0, 1)  # (g, N, k)
        if view.side == "input":
            out = out @ weight_of(module, site).to(out.dtype).mT
        change = torch.einsum("gnc,gnp->gcnp", out, amount)
        return y - _like_output(view, change.flatten(0, 1), y)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _like_output(view: View, rows: Tensor, y: Tensor) -> Tensor:
    """Rows (C, images, positions) in the shape of the layer's output; the inverse of `output_rows`."""
    shape = output_rows(view.site, y).shape
    rows = rows.reshape(shape)
    if view.site.kind == "linear":
        return rows.permute(1, 2, 0).reshape(y.shape)
    return rows.transpose(0, 1).reshape(y.shape)


def _fit(view: View, indices: Tensor, losses: Tensor, probing: Probing, world: World) -> Tensor:
    """H in closed form: for v uniform on the sphere, E[l vvᵀ] = (2H + tr(H)I)/(k(k+2)) and E[l] = tr(H)/k."""
    if not torch.isfinite(losses).all():
        raise StatisticsError(f"{view.site.name}: the loss of a probe is NaN or infinite; check the weights")
    if probing.rank_loss:
        losses = _ranks(losses, indices, world)
    direction = probe_directions(view, indices, probing.seed)
    product = torch.einsum("n,ngk,ngl->gkl", losses, direction, direction)
    total = torch.einsum("n,ng->g", losses, direction.square().sum(2))
    count = direction.square().sum(2).sum(0)
    world.sum_(product, total, count)
    product = (product + product.mT) / 2
    width, count = view.width, count.clamp(min=1)[:, None, None]
    identity = torch.eye(width, dtype=torch.float64, device=product.device)
    return (width * (width + 2) * product / count - width * total[:, None, None] / count * identity) / 2


def _ranks(losses: Tensor, indices: Tensor, world: World) -> Tensor:
    """Each loss's rank, 0 to 1, among those of all processes; equal losses stand in the order of their images."""
    everywhere = world.gather((losses.cpu(), indices.cpu()))
    every_loss, every_index = (torch.cat(column) for column in zip(*everywhere, strict=True))
    order = every_index.argsort()
    order = order[every_loss[order].argsort(stable=True)]
    place = torch.empty(len(order), dtype=torch.float64)
    place[order] = torch.arange(len(order), dtype=torch.float64) / max(1, len(order) - 1)
    start = sum(len(part[0]) for part in everywhere[: world.rank])
    return place[start : start + len(losses)].to(losses.device)


def collect_sampled(
    model: nn.Module,
    views: Iterable[View],
    batches: Iterable[Batch],
    world: World,
    probing: Probing,
    means: Mapping[str, Tensor],
    watch: Watch = unwatched,
) -> dict[str, Tensor]:
    """The reference for `hessian-local`: solve M v ≈ H_v v in the least-squares sense over sampled directions v.

    H_v is the Hessian at w = 0 of an image's loss of a_p → a_p − v·wᵀ(a_p − mean); H_v v comes from a double
    backward, one site at a time. M = (Σ H_v v vᵀ)(Σ v vᵀ)⁻¹, symmetrised. Arguments as in `collect_global`.
    """
    views = list(views)
    sums = {v: torch.zeros(2, v.site.groups, v.width, v.width, dtype=torch.float64) for v in views}
    with differentiating(model), full_float32():
        for batch in watch(batches, {"products": Tally({view.site.name: sums[view] for view in views})}):
            if len(batch.images):
                dense = logits_of(model(batch.images)).detach()
                for view in views:
                    sums[view] += _products(model, view, batch, dense, probing, means[view.site.name]).cpu()
    world.sum_(*sums.values())
    return {view.site.name: _least_squares(*both).to(world.device) for view, both in sums.items()}


def _products(model: nn.Module, view: View, batch: Batch, dense: Tensor, probing: Probing, mean: Tensor) -> Tensor:
    """Σ H_v v vᵀ and Σ v vᵀ over the batch's images, (2, g, k, k)."""
    direction = probe_directions(view, batch.indices, probing.seed)
    v = direction.to(dense.dtype)
    w = torch.zeros_like(v, requires_grad=True)
    with perturbed(model.get_submodule(view.site.name), view, mean, read=w, write=v):
        loss = probing.loss(dense, logits_of(model(batch.images))).sum()
    (slope,) = torch.autograd.grad(loss, w, create_graph=True)
    (curved,) = torch.autograd.grad((slope * v).sum(), w)
    products = torch.einsum("sngk,ngl->sgkl", torch.stack([curved.double(), direction]), direction)
    return torch.Tensor.detach(products)


def _least_squares(responses: Tensor, directions: Tensor) -> Tensor:
    """M with M·Σvvᵀ = ΣHvvᵀ; with fewer directions than dimensions, the solution of least norm."""
    solution = responses @ pinv(directions)
    symmetric: Tensor = (solution + solution.mT) / 2
    return symmetric
