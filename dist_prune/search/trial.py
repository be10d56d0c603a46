"""What one plan's network loses: projected, corrected from few images, measured on others, all on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.correction.calibration import HELD, Calibration, holdout_logits
from dist_prune.correction.correct import correct, metrics_of
from dist_prune.distributed.alone import Alone
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis
from dist_prune.factorization.nested import Nested
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.project import project
from dist_prune.network.channels import KeptChannels
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import Survey, evaluating
from dist_prune.statistics.probes import LOSSES

SOLVED = 2  # of `HELD` images, how many a trial solves from; one is left for the correction, the others measure
MOST_SOLVED, MOST_MEASURED = 128, 2048  # images; KL differs much from image to image


@dataclass(frozen=True)
class TrialImages:
    """On every rank the same images of all ranks: those that trials solve from, and those that they measure."""

    solved: Calibration
    measured: Calibration


def gather_images(images: Calibration, world: World) -> TrialImages:
    """Give all ranks the images of trials: none that the correction holds out, and none for two purposes.

    Args:
        images: this rank's calibration images.
        world: the ranks.
    """
    total = int(max(world.gather(int(images.indices.max()) if len(images.indices) else -1))) + 1
    places = torch.arange(total)
    turn = places % HELD
    solved = _evenly(places[(turn > 0) & (turn <= SOLVED)], MOST_SOLVED)
    measured = _evenly(places[turn > SOLVED], MOST_MEASURED)
    batch = max(world.gather(images.batch_size))
    pixels, everywhere = _gathered(images, solved, world), _gathered(images, measured, world)
    numbers = torch.arange(total, device=world.device)
    together = replace(images, batch_size=batch)
    return TrialImages(
        replace(together, pixels=pixels, indices=numbers[: len(pixels)]),
        replace(together, pixels=everywhere, indices=HELD * numbers[: len(everywhere)]),  # all of them held out
    )


def _evenly(places: Tensor, most: int) -> Tensor:
    return places if len(places) <= most else places[torch.arange(most) * len(places) // most]


def _gathered(images: Calibration, places: Tensor, world: World) -> Tensor:
    """The images at these places of the list, in its order."""
    own = torch.isin(images.indices, places.to(images.indices.device))
    parts = world.gather((images.indices[own].cpu(), images.pixels[own].cpu()))
    indices, pixels = (torch.cat(some) for some in zip(*parts, strict=True))
    return pixels[indices.argsort()].to(images.pixels.device)


@dataclass(frozen=True)
class Ground:
    """What all trials have in common, besides images and settings.

    Attributes:
        dense: the network to match.
        source: the network whose layers are factored: the dense one, without the channels that were removed.
        survey: of the source, all its sites.
        bases: of the sites that are factored.
        nested: of them, by form.
        side: of the bases.
        kept: the channels of the groups that lost some.
        loss: of the outputs, `kl` or `mse`, see `probes.LOSSES`.
    """

    dense: nn.Module
    source: nn.Module
    survey: Survey
    bases: Mapping[str, Basis]
    nested: Mapping[str, Mapping[str, Nested]]
    side: str = "output"
    kept: Sequence[KeptChannels] = ()
    loss: str = "kl"


def trial_on(
    ground: Ground, images: TrialImages, settings: CorrectionConfig, seed: int
) -> Callable[[Plan], Tensor]:
    """A function that tries a plan: what its network loses of each image that measures, (n,), nats.

    It needs no other rank, and gives the same on each. The metric and the dense network's outputs are computed
    once, here.

    Args:
        ground: the networks.
        images: of the trials.
        settings: of the correction; of several dampings the first is taken.
        seed: of drawn labels and positions.
    """
    solved, measured = images.solved, images.measured
    alone = Alone(solved.pixels.device)
    few = replace(
        settings, metric_damping=settings.metric_damping[:1], calibrate_images=max(8, len(solved.pixels))
    )
    with evaluating(ground.dense):
        logits = holdout_logits(ground.dense, measured)
    metrics, sites = dict[str, Tensor](), ground.survey.sites
    if few.correct != "none":
        metrics, _ = metrics_of(ground.source, sites, solved, few, seed, alone, ground.loss)

    def lost(wanted: Tensor, given: Tensor) -> Tensor:
        return LOSSES[ground.loss](wanted.double(), given).double().cpu()

    def losses_of(plan: Plan) -> Tensor:
        network = project(ground.source, sites, ground.bases, plan, ground.side, ground.nested).eval()
        if few.correct != "none":
            correct(
                ground.dense,
                network,
                ground.survey,
                solved,
                few,
                seed,
                alone,
                source=ground.source,
                kept=ground.kept,
                loss=ground.loss,
                metrics=metrics,
            )
        with evaluating(network):
            return torch.cat([lost(wanted, logits_of(network(measured.prepare(x)))) for x, wanted in logits])

    return losses_of
