"""What the loss says about a site: sums over images of products of activations and gradients, in one backward.

Every kind is a sum over images of one (g, k, k) matrix, a function of the image's rows a (centred) and gradients
g = ∂l/∂a, both (k, positions):

- `gradient`: T = Σ_p a_p g_pᵀ, of the task loss;
- `fisher`: G = Σ_p g_p g_pᵀ;
- `hessian-local`: S(tr(S)I + S + Sᵀ)/(k+2) with S = Σ_p a_p g_pᵀ. It is the exact mean over unit directions v of
  k·(H_v v)vᵀ, where H_v is the Hessian at w = 0 of the loss of the change a_p → a_p − v·wᵀa_p: there the Hessian
  is that of Gauss and Newton, E[(S v)(S v)ᵀ], and E[v vᵀ ⊗ v vᵀ] on the sphere is known.

For the last two, l is not the task loss but one whose gradients g have E[g gᵀ] = the Hessian of the output's
change, at no change: for KL, the log-likelihood of a label drawn from the model itself (Fisher); for ½‖z′ − z‖²,
u·z with u normal. Gradients start at the first site: no weight's gradient is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import View, call_of, evaluating, output_rows, weight_of
from dist_prune.statistics.moments import StatisticsError, Sums, Tally, Watch, unwatched
from dist_prune.statistics.precision import products
from dist_prune.statistics.symmetric import SymmetricSum
from dist_prune.utils import keyed_random

Rows = Callable[[], Tensor]  # made when they are asked for
Step = Callable[[SymmetricSum, Rows, Tensor], None]  # adds a sum over images of a and g, (G, k, N, P) each


def gradient_step(total: SymmetricSum, rows: Rows, g: Tensor) -> None:
    """Σ_n Σ_p a_p g_pᵀ."""
    total.add_product(rows().flatten(2), g.flatten(2))


def fisher_step(total: SymmetricSum, _rows: Rows, g: Tensor) -> None:
    """Σ_n Σ_p g_p g_pᵀ."""
    total.add_square(g.flatten(2))


def hessian_step(total: SymmetricSum, rows: Rows, g: Tensor) -> None:
    """Σ_n S(tr(S)I + S + Sᵀ)/(k+2), never forming S where the image has fewer positions than dimensions."""
    a, g = rows().transpose(1, 2), g.transpose(1, 2)  # (G, N, k, P)
    width, positions = a.shape[2:]
    trace = (a * g).sum((-1, -2), keepdim=True)
    if positions < width:
        # S Rᵀ with R = tI + S + Sᵀ is a(Rᵍ)ᵀ with Rᵍ = t·g + g(aᵀg) + a(gᵀg): all of rank P.
        left, right = a, trace * g + g @ (a.mT @ g) + a @ (g.mT @ g)
    else:
        left = a @ g.mT
        right = left + left.mT + trace * torch.eye(width, dtype=a.dtype, device=a.device)
    left, right = (each.transpose(1, 2).flatten(2) for each in (left, right))
    total.add_product(left, right, 1 / (width + 2))


STEPS: dict[str, Step] = {
    "gradient": gradient_step,
    "fisher": fisher_step,
    "hessian-local": hessian_step,
}


@dataclass(frozen=True)
class Objective:
    """What is differentiated, summed over images, never averaged: an image's share must not depend on its batch.

    `loss` is `task` (cross-entropy to the images' labels), `kl` or `mse` (see the module). `draws` random
    gradients per image are taken; 0 takes the expectation exactly, with one backward for each class.
    """

    loss: str
    draws: int = 1
    seed: int = 0

    def __call__(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """One scalar for each backward."""
        positions = logits.shape[2:].numel()
        if self.loss == "task":
            yield F.cross_entropy(logits, batch.labels, reduction="sum")
        elif self.draws:
            scale = positions**-0.5  # losses are averaged over positions, and these are drawn independently
            yield from (scale * self._drawn(logits, batch, f"draw {i}") for i in range(self.draws))
        elif positions > 1:
            raise StatisticsError(
                f"--draws 0 goes through all {logits.shape[1]} classes at each of {positions} positions; "
                f"expected 1 or more random draws"
            )
        else:
            shares = torch.ones_like(logits) if self.loss == "mse" else logits.detach().softmax(1).sqrt()
            outputs = logits if self.loss == "mse" else logits.log_softmax(1)
            yield from (shares * outputs).sum(0)

    def require_labels(self, batch: Batch) -> None:
        """Refuse images that the loss cannot be computed for; this synchronises with the device.

        Raises:
            StatisticsError: the task loss of images without labels.
        """
        if self.loss == "task" and not (batch.labels >= 0).all():
            raise StatisticsError(
                "the task loss needs labels and these images have none; use --method fisher, hessian-local or pca"
            )

    def _drawn(self, logits: Tensor, batch: Batch, purpose: str) -> Tensor:
        if self.loss == "kl":
            label = keyed_random.labels(self.seed, purpose, batch.indices, logits)
            return F.cross_entropy(logits, label, reduction="sum")
        direction = keyed_random.normal(self.seed, purpose, batch.indices, logits.shape[1:].numel())
        return (logits * direction.to(logits.dtype).reshape(logits.shape)).sum()


class NoGradientError(StatisticsError):
    """Gradients of a layer that the network computes without any."""


class _Sum:
    """One site's sum, and the calls of the batch at hand."""

    def __init__(
        self, module: nn.Module, view: View, step: Step, mean: Tensor | None, device: torch.device
    ) -> None:
        self.module, self.view, self.step, self.mean = module, view, step, mean
        self.total = SymmetricSum(view.site.groups, view.width, device)
        self.images = self.calls = 0
        self.reachable = False
        self.pending: list[tuple[Tensor, Tensor]] = []

    def begin(self, images: int) -> None:
        """A new batch."""
        self.images, self.calls = images, 0

    def forward(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """A call of the layer: wait for its gradient."""
        if not torch.is_grad_enabled():  # the network switched them off; checkpoints call again with gradients
            return output
        output = output if output.requires_grad else output.requires_grad_() + 0  # the graph begins here
        self.reachable = True
        x, y = call_of(self.view.site, args, kwargs, output)
        source, shape = self.view.source(x, y).detach(), y.shape  # a hook that held y would keep it, and be kept
        version = source._version
        self.calls += 1

        def backward(gradient: Tensor) -> None:
            if source._version != version:
                raise StatisticsError(
                    f"{self.view.site.name}: its {self.view.side} is changed in place before the backward pass; "
                    f"write the network's in-place operation out of place, or leave the layer out with --sites"
                )
            self.pending.append((source, gradient.view(shape)))
            if len(self.pending) == self.calls:
                self.add()

        output.register_hook(backward)  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def add(self) -> None:
        """All calls of the layer that the loss depends on have their gradients: add the batch, in chunks."""
        if not self.pending:
            return
        if len(self.pending[0][1]) % self.images:  # called for each image by itself
            self.pending = [self._together()]
        for chunk in self.view.chunks(self.pending[0][1], self.images):
            gradients = _joined([self._gradients(g[chunk]) for _, g in self.pending])
            self.step(self.total, partial(self._rows, chunk), gradients)
        self.pending = []

    def state_dict(self) -> dict[str, Tensor]:
        """See `moments.Sums`."""
        return self.total.state_dict("total")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `moments.Sums`."""
        self.total.load_state_dict("total", state)

    def _together(self) -> tuple[Tensor, Tensor]:
        """The calls as one over all images."""
        sources, gradients = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        if len(gradients) % self.images:
            raise StatisticsError(
                f"{self.view.site.name}: its calls are not of whole batches, {len(gradients)} entries for "
                f"{self.images} images; leave the layer out with --sites"
            )
        return sources, gradients

    def _rows(self, chunk: slice) -> Tensor:
        rows = _joined([self._by_image(self.view.rows(self.module, source[chunk])) for source, _ in self.pending])
        return rows if self.mean is None else rows - self.mean.to(rows.dtype)[..., None, None]

    def _gradients(self, gradient: Tensor) -> Tensor:
        """∂l/∂a: of the outputs, or of the patches, which is Wᵀ ∂l/∂y."""
        site = self.view.site
        rows = self._by_image(output_rows(site, gradient))
        if self.view.side == "output":
            return rows
        weight = weight_of(self.module, site).to(rows.dtype)
        return (weight.mT @ rows.flatten(2)).reshape(site.groups, self.view.width, *rows.shape[2:])

    def _by_image(self, rows: Tensor) -> Tensor:
        """(g·k, entries, positions) → (g, k, images, all positions of the image), float32 or wider."""
        entries = len(self.pending[0][1]) // self.images
        rows = _wide(rows)
        return rows.reshape(self.view.site.groups, -1, rows.shape[1] // entries, entries * rows.shape[2])


def _wide(rows: Tensor) -> Tensor:
    """In float32 or wider, (k, entries, positions); where that copies, laid out for the product to come."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    flattens = rows.stride(1) == rows.shape[2] * rows.stride(2)
    return rows.to(dtype, memory_format=torch.preserve_format if flattens else torch.contiguous_format)


def _joined(calls: Sequence[Tensor]) -> Tensor:
    """The positions of all calls of a layer; of a single one nothing is copied."""
    return calls[0] if len(calls) == 1 else torch.cat(list(calls), -1)


def collect_curvature(
    model: nn.Module,
    views: Iterable[View],
    batches: Iterable[Batch],
    world: World,
    step: Step,
    objective: Objective,
    means: Mapping[str, Tensor] | None = None,
    watch: Watch = unwatched,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Mean over all images and draws of `step`, for all sites, from one forward and `draws` backwards a batch.

    Args:
        model: the dense network, on the world's device.
        views: of the sites, on either side.
        batches: of this rank; may be empty and may differ in number between ranks.
        world: the ranks to sum over.
        step: one of `STEPS`.
        objective: what is differentiated.
        means: site name → mean row (g, k); without it rows are not centred (`fisher` does not use them).
        watch: hands over the batches.
        bf16: run the network in bfloat16 autocast, forward and backward; `step` is given float32, its
            products on a GPU in TF32.

    Returns:
        site name → (g, k, k), float64, symmetrised, equal on all ranks.

    Raises:
        StatisticsError: a gradient that is NaN or infinite (site and batch named), or no images at all.
        NoGradientError: the network computes a site without gradients.
    """
    modules = {view: model.get_submodule(view.site.name) for view in views}
    mean_of = {view: None if means is None else means[view.site.name] for view in modules}
    sums = [_Sum(module, view, step, mean_of[view], world.device) for view, module in modules.items()]
    images, number = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    kept: dict[str, Sums] = {f"curvature/{each.view.site.name}": each for each in sums}
    first_nonfinite_batch = torch.full((len(sums),), -1, device=world.device)
    kept["seen"] = Tally({"images": images, "batches": number, "first_nonfinite_batch": first_nonfinite_batch})
    with differentiating(model), products(tf32=bf16), ExitStack() as stack:
        for each in sums:
            stack.callback(each.module.register_forward_hook(each.forward, with_kwargs=True).remove)
        for batch in watch(batches, kept):
            if not number:  # all batches have labels, or none has
                objective.require_labels(batch)
            if len(batch.images):
                for each in sums:
                    each.begin(len(batch.images))
                with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
                    logits = logits_of(model(batch.images))
                _backward(sums, logits, list(objective(logits.float() if bf16 else logits, batch)))
                _note_nonfinite(sums, first_nonfinite_batch, int(number))
                for each in sums:
                    each.total.close_batch()
            images += len(batch.images)
            number += 1
    _require_sound(sums, first_nonfinite_batch, world)
    _require_reachable(sums, world)
    totals = {each.view.site.name: each.total.matrix() for each in sums}
    world.sum_(images)
    world.sum_symmetric_(*totals.values())
    if not images:
        raise StatisticsError("no images for the gradients; is the statistics split empty?")
    scale = images.to(world.device) * max(1, objective.draws)
    return {name: total / scale for name, total in totals.items()}


def _backward(sums: Sequence[_Sum], logits: Tensor, losses: Sequence[Tensor]) -> None:
    if not logits.requires_grad:  # they are cut off from every site
        for each in sums:
            each.reachable = False
        return
    for loss in losses:
        torch.autograd.backward(loss, retain_graph=loss is not losses[-1])
        for each in sums:
            each.add()  # where the loss does not depend on every call


def _require_reachable(sums: list[_Sum], world: World) -> None:
    """Every site was computed with gradients, by the ranks that have images."""
    reached = torch.tensor([each.reachable or not each.images for each in sums])
    unreached = [each.view.site.name for each, found in zip(sums, reached.tolist(), strict=True) if not found]
    if world.any(bool(unreached)):
        raise NoGradientError(
            f"{', '.join(unreached[:5])}{', …' if len(unreached) > 5 else ''}: the network computes them under "
            f"torch.no_grad or inference_mode, so that no gradient reaches them; use --method pca, or leave these "
            f"layers out with --sites"
        )


def _note_nonfinite(sums: Sequence[_Sum], first: Tensor, batch: int) -> None:
    """Note in `first` (sites,) the batch where a product is not finite, once; nothing waits for the device."""
    if sums:
        largest = torch.stack(torch._foreach_norm([each.total.unflushed for each in sums], torch.inf))
        first.masked_fill_((first < 0) & ~torch.isfinite(largest), batch)


def _require_sound(sums: Sequence[_Sum], first_nonfinite_batch: Tensor, world: World) -> None:
    for each, batch in zip(sums, first_nonfinite_batch.tolist(), strict=True):
        if batch >= 0:
            raise StatisticsError(
                f"{each.view.site.name}: its gradients hold NaN or infinity, first in batch {batch} of rank "
                f"{world.rank}; check the weights and the images of that batch"
            )


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients of activations only, and no module working in place; all put back after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    in_place: list[Any] = [m for m in model.modules() if getattr(m, "inplace", False)]
    with evaluating(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for module in in_place:
                module.inplace = False
            with torch.enable_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_()
            for module in in_place:
                module.inplace = True
