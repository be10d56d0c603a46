"""Exact second-order losses: what a site loses with its first r terms, for every r, from one backward pass.

A site's error e_p at position p changes the output of an image by KL(dense ‖ compressed) ≈ ½ E_l (Σ_p g_pᵀe_p)²,
with g = ∂l/∂y at the site's output and l a random function of the logits z whose gradients have the Fisher
information as their second moment. The sum over positions is inside the square: errors of neighbouring positions
add up, as they do in the network. The Fisher metric Σ_p g_p g_pᵀ ignores that and predicts a third to a hundredth.

As l we take Σ_y ε_y √p_y log p_y with random signs ε and p = softmax(z): its gradient is Bᵀε, BᵀB = diag(p) − ppᵀ.
A label drawn from p has the same second moment, but of a confident network nearly all of it comes from labels that
are hardly ever drawn; with signs every image counts in every draw. (For `mse`, ½‖z′ − z‖², l = Σ_y ε_y z_y.)

A replacement of rank r is the sum of the first r of a family of terms, W = Σᵢ Wᵢ. Term i gives image n
s_{n,i} = Σ_p g_pᵀWᵢ(x_p − x̄), see `terms`, and all together Σ_p g_pᵀ(y_p − ȳ). So one pass has, for every r,
loss(r) = ½ mean_n E (Σ_{i>r} s_{n,i})².
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import Site, call_of, given_to, output_rows
from dist_prune.statistics.curvature import differentiating
from dist_prune.statistics.moments import StatisticsError
from dist_prune.statistics.precision import full_float32
from dist_prune.statistics.terms import Call, Terms
from dist_prune.utils import keyed_random

TOGETHER = ("input", "output")  # families that one option leaves out of both: `tucker`


@dataclass(frozen=True)
class Curve:
    """Loss of keeping 0, 1, …, r terms of each group, (r + 1,) float64, nats per image, and its standard error."""

    loss: Tensor
    error: Tensor


@dataclass(frozen=True)
class Family:
    """Which family of which site."""

    site: str
    name: str


@dataclass(frozen=True)
class Sample:
    """All rows of a site that has few of them, float64, image after image.

    `images` (n,) numbers each row's image; `rows` (n, g, c) are outputs, `gradients` (draws, n, g, c) those of l.
    """

    images: Tensor
    rows: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class SecondOrder:
    """What one pass found: the curve of each family, and the samples of the sites that they were wanted of.

    Sites that the loss does not depend on have no sample.

    `crosses` has, of each site with two families that are used together, the mean product of what is left out of
    the first and of the second, (r₁ + 1, r₂ + 1): with both left out, ½E(s₁ + s₂)² = loss₁ + loss₂ + cross.
    """

    curves: Mapping[Family, Curve]
    samples: Mapping[str, Sample]
    crosses: Mapping[str, Tensor]


class _Site:
    """One site, and the calls of the batch at hand."""

    def __init__(self, site: Site, module: nn.Module, draws: int) -> None:
        self.site, self.module, self.draws = site, module, draws
        self.images = self.calls = 0
        self.alone: dict[int, Call] = {}  # calls of single images, by number
        self.needs_back = False  # gradients of the inputs, too

    def begin(self, indices: Tensor) -> None:
        """A new batch of images with these indices, (images,)."""
        self.images, self.calls, self.alone = len(indices), 0, {}

    def finish(self) -> None:
        """The batch has been differentiated."""
        if self.alone:
            call = Call.joined([self.alone[number] for number in sorted(self.alone)])
            if len(call.y) % self.images:
                raise StatisticsError(
                    f"{self.site.name}: its calls are not of whole batches, {len(call.y)} entries for "
                    f"{self.images} images; leave the layer out with --sites"
                )
            self.add(call)

    def add(self, call: Call) -> None:
        """One call with the gradients of all draws."""
        raise NotImplementedError

    def before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call of the layer begins: its input becomes a tensor of its own, with a gradient of its own."""
        x = given_to(args, kwargs)
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return ((own, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): own})

    def forward(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """A call of the layer: its inputs are kept until the gradients of all draws are there."""
        output = output if output.requires_grad else output.requires_grad_() + 0  # the graph begins here
        given, (x, y) = given_to(args, kwargs), (t.detach() for t in call_of(self.site, args, kwargs, output))
        number, version, gradients, back = self.calls, x._version, list[Tensor](), list[Tensor]()
        self.calls += 1

        def at_output(gradient: Tensor) -> None:
            if x._version != version:
                raise StatisticsError(
                    f"{self.site.name}: its input is changed in place before the backward pass; "
                    f"write the network's in-place operation out of place, or leave the layer out with --sites"
                )
            gradients.append(gradient.view(y.shape))
            if not self.needs_back:
                add_complete()

        def at_input(gradient: Tensor) -> None:
            back.append(gradient.view(x.shape))
            add_complete()

        def add_complete() -> None:
            if len(gradients) == self.draws:
                behind = torch.stack(back) if back else x.new_empty(self.draws, 0)
                call = Call(x, y, torch.stack(gradients), behind)
                if len(y) % self.images:
                    self.alone[number] = call
                else:
                    self.add(call)
                gradients.clear()
                back.clear()

        output.register_hook(at_output)  # type: ignore[no-untyped-call]
        if self.needs_back:
            given.register_hook(at_input)  # type: ignore[no-untyped-call]
        return output


class _Families(_Site):
    """A site whose families are summed over images, one beside the other: 0, 1, …, r terms of each.

    Attributes:
        squares: Σ of each image's loss, (Σ(r + 1),).
        fourths: Σ of its square.
        cross: see `SecondOrder`; None but for two families that are used together.
    """

    def __init__(
        self, site: Site, module: nn.Module, draws: int, mean: Tensor, families: Mapping[str, Terms]
    ) -> None:
        super().__init__(site, module, draws)
        self.mean, self.families = mean, families
        self.needs_back = any(terms.needs_back for terms in families.values())
        offsets = {name: F.pad(terms.offset, (1, 0)) for name, terms in families.items()}  # of no terms, too
        self.offset, self.sizes = torch.cat([*offsets.values()], 1), [o.shape[1] for o in offsets.values()]
        self.squares, self.fourths = mean.new_zeros(2, sum(self.sizes))
        self.totals = self.given = mean.new_zeros(0)  # of the batch at hand: (draws, images), and each term's
        both = [offsets[name].shape[1] for name in TOGETHER if name in offsets]
        self.cross = mean.new_zeros(both) if len(both) == 2 else None

    def by_family(self, values: Tensor) -> dict[str, Tensor]:
        """Cut along the last dimension."""
        return dict(zip(self.families, torch.split(values, self.sizes, -1), strict=True))

    def begin(self, indices: Tensor) -> None:
        """See `_Site`."""
        super().begin(indices)
        self.totals = self.mean.new_zeros(self.draws, len(indices))
        self.given = self.mean.new_zeros(self.draws, len(indices), sum(self.sizes))

    def finish(self) -> None:
        """See `_Site`."""
        super().finish()
        kept = torch.cat([terms.cumsum(-1) for terms in self.by_family(self.given).values()], -1)
        tails = self.totals[..., None] - kept
        losses = tails.square().mean(0) / 2  # of each image
        self.squares += losses.sum(0)
        self.fourths += losses.square().sum(0)
        if self.cross is not None:
            first, second = (self.by_family(tails)[name].flatten(0, 1) for name in TOGETHER)
            self.cross += first.mT @ second / self.draws

    @torch.no_grad()
    def add(self, call: Call) -> None:
        """See `_Site`."""
        images, call = self.totals.shape[1], call.to(torch.promote_types(call.y.dtype, torch.float32))
        rows = output_rows(self.site, call.y) - self.mean[:, None, None].to(call.y.dtype)
        g = torch.stack([output_rows(self.site, one) for one in call.gradients])  # draws, C, entries, positions
        entries = rows.shape[1] // images
        self.totals += _by_image((g * rows).sum((1, 3)).double(), images)
        none = g.new_zeros(self.draws, rows.shape[1], 1)
        given = torch.cat([t for each in self.families.values() for t in (none, each.given(self.site, call))], -1)
        given = given.double() - g.sum(-1).mT.double() @ self.offset
        self.given += given.reshape(self.draws, images, entries, -1).sum(2)


class _Sampled(_Site):
    """A site whose rows are kept."""

    def __init__(self, site: Site, module: nn.Module, draws: int) -> None:
        super().__init__(site, module, draws)
        self.indices, self.parts = torch.zeros(0), list[Sample]()

    def begin(self, indices: Tensor) -> None:
        """See `_Site`."""
        super().begin(indices)
        self.indices = indices

    @torch.no_grad()
    def add(self, call: Call) -> None:
        """See `_Site`."""
        rows, g = self._rows(call.y), torch.stack([self._rows(one) for one in call.gradients])
        self.parts.append(Sample(self.indices.cpu().repeat_interleave(len(rows) // len(self.indices)), rows, g))

    def _rows(self, y: Tensor) -> Tensor:
        """(entries·positions, g, c), on the CPU."""
        rows = output_rows(self.site, y).permute(1, 2, 0).double().cpu()
        return rows.reshape(-1, self.site.groups, self.site.width)

    def sample(self, world: World) -> Sample | None:
        """The rows of all ranks, in the images' order; None if the loss of none depends on the site."""
        parts = [part for each in world.gather(self.parts) for part in each]
        if not parts:
            return None
        images = torch.cat([part.images for part in parts])
        order = images.argsort(stable=True)
        rows, g = torch.cat([p.rows for p in parts]), torch.cat([p.gradients for p in parts], 1)
        return Sample(images[order], rows[order], g[:, order])


def _by_image(values: Tensor, images: int) -> Tensor:
    """(draws, entries) → (draws, images): layers on windows or patches have several entries an image."""
    return values.reshape(len(values), images, -1).sum(2)


def collect_losses(
    model: nn.Module,
    families: Mapping[Site, Mapping[str, Terms]],
    means: Mapping[str, Tensor],
    batches: Iterable[Batch],
    world: World,
    loss: str = "kl",
    draws: int = 2,
    seed: int = 0,
    sampled: Sequence[Site] = (),
) -> SecondOrder:
    """The loss of every rank of every family of all sites: one forward and `draws` backward passes.

    Args:
        model: the dense network, on the world's device.
        families: of each site, by name; they may stop at any rank, beyond which nothing is asked.
        means: site name → mean output row (g, c), which every replacement keeps.
        batches: of this rank; may be empty and may differ in number between ranks.
        world: the ranks to sum over.
        loss: `kl` or `mse`.
        draws: of random signs for each image.
        seed: of the signs, which are keyed by image.
        sampled: sites whose rows are wanted instead.

    Raises:
        StatisticsError: NaN or infinity (site named), or no images at all.
    """
    summed = [
        _Families(site, model.get_submodule(site.name), draws, means[site.name].flatten().double(), own)
        for site, own in families.items()
        if own
    ]
    kept = [_Sampled(site, model.get_submodule(site.name), draws) for site in sampled]
    images = torch.zeros((), dtype=torch.float64, device=world.device)
    with differentiating(model), full_float32(), ExitStack() as stack:
        sites: list[_Site] = [*summed, *kept]
        for each in sites:
            if each.needs_back:
                stack.callback(each.module.register_forward_pre_hook(each.before, with_kwargs=True).remove)
            stack.callback(each.module.register_forward_hook(each.forward, with_kwargs=True).remove)
        for batch in batches:
            if len(batch.images):
                _differentiate(model, sites, batch, loss, draws, seed)
            images += len(batch.images)
    crosses = {each.site.name: each.cross for each in summed if each.cross is not None}
    world.sum_(images, *crosses.values(), *(t for each in summed for t in (each.squares, each.fourths)))
    if not images:
        raise StatisticsError("no images for the exact losses; is the statistics split empty?")
    samples = {each.site.name: sample for each in kept if (sample := each.sample(world)) is not None}
    curves = {Family(each.site.name, n): c for each in summed for n, c in _curves(each, images).items()}
    sums = {key.site: curve.loss.sum() for key, curve in curves.items()}
    sums |= {name: sample.rows.sum() + sample.gradients.sum() for name, sample in samples.items()}
    for site, total in sums.items():
        if not torch.isfinite(total):
            raise StatisticsError(f"{site}: its gradients hold NaN or infinity; check the weights and the images")
    return SecondOrder(curves, samples, {name: cross / images for name, cross in crosses.items()})


def _curves(site: _Families, images: Tensor) -> dict[str, Curve]:
    loss = site.squares / images
    errors = site.by_family(((site.fourths / images - loss.square()).clamp(min=0) / images).sqrt())
    return {name: Curve(each, errors[name]) for name, each in site.by_family(loss).items()}


def _differentiate(
    model: nn.Module, sites: Sequence[_Site], batch: Batch, loss: str, draws: int, seed: int
) -> None:
    for each in sites:
        each.begin(batch.indices)
    logits = logits_of(model(batch.images))
    for draw in range(draws):
        scalar = signed(logits, batch.indices, loss, seed, f"signs {draw}")
        torch.autograd.backward(scalar, retain_graph=draw < draws - 1)
    for each in sites:
        each.finish()


def signed(logits: Tensor, indices: Tensor, loss: str, seed: int, purpose: str) -> Tensor:
    """Σ_n Σ_y ε_y √p_y log p_y, or Σ_n Σ_y ε_y z_y for `mse`, with random signs ε; see the module.

    Args:
        logits: (N, classes), or (N, classes, positions), whose losses are averaged over positions.
        indices: (N,) of the images, which the signs are keyed by.
        loss: `kl` or `mse`.
        seed: of the signs.
        purpose: other purposes get other signs.
    """
    drawn: Tensor = (
        (keyed_random.uniform(seed, purpose, indices, logits.shape[1:].numel()) - 0.5).sign().to(logits.dtype)
    )
    signs: Tensor = drawn.reshape(logits.shape) * float(logits.shape[2:].numel()) ** -0.5
    if loss == "mse":
        return (signs * logits).sum()
    return (signs * logits.detach().softmax(1).sqrt() * logits.log_softmax(1)).sum()
