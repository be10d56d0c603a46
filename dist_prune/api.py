"""Compression of a network at hand, from batches at hand: one process, no data folder, no run directory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_prune.config.flags import ConfigError
from dist_prune.config.run import CompressionConfig, CorrectionConfig, Method, MethodConfig, Run, Side
from dist_prune.correction import correct as correction
from dist_prune.correction.correct import Calibration, divergence, holdout_logits, require_deterministic
from dist_prune.data.loader import Batch
from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.world import World, joined
from dist_prune.factorization.bases import solve
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Cost, Plan, cost
from dist_prune.factorization.planner import timed_planner
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import spectra_of, unit_of
from dist_prune.network.sites import Survey, evaluating, survey
from dist_prune.statistics import collect as statistics

FEWEST = 8  # images, of which one is the holdout


class BatchesError(ValueError):
    """Batches that cannot be used."""


@dataclass(frozen=True)
class Compression:
    """A compressed network and what it came to; printed, a table of all layers with the totals.

    `predicted` is the loss that the plan expects, in `unit`, of all sites together; None where the method does not
    predict. `kl_projected` and `kl` are KL(dense ‖ compressed) of the softmax on the images held out, every eighth
    one: nats per image, before and after correction.
    """

    model: nn.Module
    plan: Plan
    dense: Cost
    compressed: Cost
    predicted: float | None
    unit: str
    kl_projected: float
    kl: float
    table: str

    def __str__(self) -> str:
        known = self.unit == "KL" and self.predicted is not None
        steps = [f"{self.predicted:.4g} predicted"] if known else []
        steps += [f"{self.kl_projected:.4g} projected", f"{self.kl:.4g} in the end"]
        return f"{self.table}\nheld-out KL to the dense network: {', '.join(steps)}"


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: str = "budget:macs=0.5",
    *,
    method: Method = "fisher",
    side: Side = "output",
    sites: str = "*",
    forms: str = "auto",
    correct: Literal["none", "refit", "regression"] = "regression",
    calibrate_images: int = 1024,
    seed: int = 0,
    round_to: int = 0,
) -> Compression:
    """Replace layers of a classification network by low-rank pairs; the given network stays as it is.

    Args:
        model: returns logits (n, classes). Works where its parameters are, CPU or CUDA.
        batches: of what the network takes: tensors (n, …), or tuples or lists of such a tensor and labels (n,)
            int64. Gone through once and kept in memory, where they are.
        ranks: as `--ranks`: `uniform:0.5`, `energy:0.95`, `budget:macs|params|latency=0.5`, `sites:NAME=RANK,…`,
            or a plan's file.
        method: as `--method`: where the directions to keep come from; `gradient` needs labels.
        side: of a layer, whose directions are kept.
        sites: as `--sites`: which layers.
        forms: as `--forms`: what a layer can become where ranks come from a budget.
        correct: as `--correct`: whether the layers are solved again against the given network.
        calibrate_images: how many images to solve from, spread over all; an eighth of them is held out.
        seed: of random draws.
        round_to: ranks are multiples of this; 0: as `--round-to`.

    Raises:
        BatchesError: no batches, fewer than 8 images, or not what the network takes.
        ConfigError, PlanError, SiteError: an invalid option, or one that does not fit this network.
        CorrectionError: the network answers the same images differently each time.
        StatisticsError: NaN or infinity, or labels missing.

    Layers with fewer rows than dimensions are warned of. See launch/README.md for the methods.
    """
    if method == "random-init":
        raise ConfigError("method random-init keeps nothing of the network; it is for comparison, in runs")
    run = Run(
        compression=CompressionConfig(
            MethodConfig(method=method, side=side), ranks, forms=forms, sites=sites, round_to=round_to
        ),
        correction=CorrectionConfig(correct, calibrate_images),
        seed=seed,
    )
    given = list(gathered(batches))
    device = next(model.parameters()).device
    alone = LaunchEnv(0, 1, device.index or 0, "", "single")
    with joined(device.type, place=alone) as world:
        return _compress(run, model, Kept(tuple(given), device), world)


@dataclass(frozen=True)
class Kept:
    """Batches where they were given, handed out on the network's device."""

    batches: tuple[Batch, ...]
    device: torch.device

    @property
    def count(self) -> int:
        """Of all images."""
        return sum(len(b.images) for b in self.batches)

    def open(self, images: int = 0) -> Iterator[Batch]:
        """The first so many images; 0: all."""
        left = images or self.count
        for b in self.batches:
            some, left = slice(0, left), max(0, left - len(b.images))
            if len(b.images[some]):
                parts = (part[some].to(self.device) for part in (b.images, b.labels, b.indices))
                yield Batch(*parts)

    def calibration(self, count: int) -> Calibration:
        """As many images, spread evenly; they are numbered again."""
        pixels = torch.cat([b.images for b in self.batches])
        chosen = torch.arange(min(count, len(pixels))) * len(pixels) // min(count, len(pixels))
        size = max(len(b.images) for b in self.batches)
        own = pixels[chosen].to(self.device)
        return Calibration(own, torch.arange(len(own), device=self.device), torch.clone, size, mirrored=False)


def gathered(batches: Iterable[Any]) -> Iterator[Batch]:
    """Batches as the statistics want them: labels −1 where there are none, images numbered.

    Raises:
        BatchesError: none, too few images, not tensors, of several shapes, or some with labels and some without.
    """
    seen, shape, labelled = 0, None, None
    for item in batches:
        parts = item if isinstance(item, tuple | list) and len(item) in (1, 2) else (item,)
        images, labels = (*parts, None)[:2]
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
            found = (
                f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            )
            raise BatchesError(
                f"a batch is {found}; expected a floating-point tensor (n, …), or it and labels (n,)"
            )
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise BatchesError(f"images of {tuple(shape)} and {tuple(images.shape[1:])}; expected one size")
        if labelled not in (None, labels is not None):
            raise BatchesError("some batches have labels and some have none; expected all alike")
        labelled = labels is not None
        if labels is None:
            labels = torch.full((len(images),), -1)
        if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise BatchesError(f"labels of {len(images)} images are {labels!r:.80}; expected whole numbers (n,)")
        yield Batch(images.detach(), labels.long(), torch.arange(seen, seen + len(images)))
        seen += len(images)
    if not seen:
        raise BatchesError(
            "there are no batches: an iterator that was gone through before gives none; make a new one"
        )
    if seen < FEWEST:
        raise BatchesError(
            f"{seen} images: expected at least {FEWEST}, better hundreds, as statistics come from them"
        )


def surveyed(model: nn.Module, image: Tensor) -> Survey:
    """All sites of the network.

    Raises:
        BatchesError: it does not take such images.
    """
    try:
        return survey(model, image)
    except RuntimeError as error:
        raise BatchesError(
            f"the network does not take batches of (n, {', '.join(map(str, image.shape[1:]))}): {error}"
        ) from error


def _compress(run: Run, model: nn.Module, given: Kept, world: World) -> Compression:
    basis, probe = run.compression.basis, next(given.open(2)).images
    everything = surveyed(model, probe[:1])
    found = everything.select(run.compression.sites)
    plans = timed_planner(run, model, found, world, probe[:1])
    plans.check()
    if run.correction.correct != "none":
        require_deterministic(model, probe, world)
    patches = plans.needs_patches
    sums = statistics.collect(model, found.sites, given.open, world, basis, run.seed, None, patches)
    for text in statistics.warnings(sums, found.sites, basis, given.count):
        warnings.warn(text, stacklevel=3)
    bases = solve(model, found.sites, sums, basis, run.seed, world)
    nested = nested_of(model, found.sites, plans.projected_forms, bases, sums, basis.damping, world)
    spectra = with_exact_losses(
        spectra_of(bases, basis, nested),
        model,
        found.sites,
        bases,
        nested,
        sums,
        given.open,
        world,
        basis,
        run.seed,
    )
    plan = plans.plan(spectra)
    network = project(model, found.sites, bases, plan, basis.side, nested).eval()
    before, after = corrected(run, model, network, everything, given, world)
    unit = unit_of(basis)
    dense, table = Cost(found.macs, found.params), plans.format_table(plan, {}, unit)
    return Compression(network, plan, dense, cost(found, plan), plan.loss, unit, before, after, table)


def corrected(
    run: Run, model: nn.Module, network: nn.Module, everything: Survey, given: Kept, world: World
) -> tuple[float, float]:
    """Correct the compressed network in place, if that is wanted; the held-out KL before and after."""
    images = given.calibration(run.correction.calibrate_images)
    if run.correction.correct == "none":
        with evaluating(model), evaluating(network):
            before = divergence(network, holdout_logits(model, images), images.prepare, world)
        return before, before
    result = correction.correct(model, network, everything, images, run.correction, run.seed, world)
    for text in result.notes:
        warnings.warn(text, stacklevel=4)
    return result.before, result.kept.kl if result.kept else result.before
