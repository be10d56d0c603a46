"""What channels lose, solved from the images that correction solves from, and measured on its holdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_prune.correction.calibration import Calibration, divergence, holdout_logits
from dist_prune.distributed.world import World
from dist_prune.network.channels import Group
from dist_prune.network.sites import evaluating
from dist_prune.statistics.curvature import Objective
from dist_prune.width.choose import Channels, weigh_channels


def channels_of(
    dense: nn.Module,
    groups: Sequence[Group],
    images: Calibration,
    metrics: Mapping[str, Tensor],
    seed: int,
    world: World,
    loss: str = "kl",
) -> Channels:
    """In which order the channels of these groups go, and what is lost at every width.

    Args:
        dense: the network.
        groups: of it.
        images: this rank's.
        metrics: Fisher metrics of layers' outputs, as far as they are known.
        seed: of labels drawn, for the others.
        world: the ranks, which all get the same.
        loss: of the outputs, `kl` or `mse`.

    Raises:
        StatisticsError: NaN or infinity, or no images.
    """
    with evaluating(dense):
        holdout = holdout_logits(dense, images)

        def holdout_kl(network: nn.Module) -> float:
            return divergence(network, holdout, images.prepare, world, loss)

        return weigh_channels(dense, groups, images.prepared, holdout_kl, metrics, Objective(loss, 1, seed), world)
