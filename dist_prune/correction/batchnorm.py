"""Batch norm's statistics re-estimated in the compressed network, layer by layer, and kept only where it helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_prune.correction.calibration import Calibration, divergence, holdout_logits
from dist_prune.correction.correct import agreed_route, improves
from dist_prune.distributed.world import World
from dist_prune.network.replacing import with_replaced
from dist_prune.network.replay import AnyPass
from dist_prune.network.sites import evaluating


@dataclass(frozen=True)
class Reestimation:
    """How many layers took new statistics, and the held-out KL to the dense network, nats per image."""

    layers: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it helped."""
        return improves(self.after, self.before)


def reestimate(
    dense: nn.Module, compressed: nn.Module, images: Calibration, memory: int, world: World
) -> Reestimation:
    """Give every batch norm of the compressed network the mean and variance of what reaches it, in place.

    In execution order, each layer after those before it, so that in the end all hold at once, which running
    statistics of training mode do not. Left as they were where the held-out KL did not go down.

    Args:
        dense: the network to match.
        compressed: its compressed copy.
        images: this rank's calibration images.
        memory: bytes of activations kept; beyond, they are computed again for every layer.
        world: the ranks, which all end with the same network.
    """
    candidate = with_replaced(compressed)
    names = [name for name, module in candidate.named_modules() if _has_statistics(module)]
    with evaluating(dense), evaluating(candidate):
        holdout = holdout_logits(dense, images)
        before = divergence(compressed, holdout, images.prepare, world)
        route = agreed_route(candidate, names, images, world)
        passes = [route.begin(candidate, pixels, images.prepare) for pixels, _ in images.batches(held=False)]
        for name, place in route.stops.items():
            norm = candidate.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            _set(norm, _inputs(passes, name, place, memory), world)
        result = Reestimation(len(route.stops), before, divergence(candidate, holdout, images.prepare, world))
    if result.kept:
        compressed.load_state_dict(candidate.state_dict())
    return result


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _inputs(passes: Sequence[AnyPass], name: str, place: int, memory: int) -> Iterable[Tensor]:
    """What each pass brings to the layer."""
    for each in passes:
        each.advance(place)
        yield each.input_of(name)
        if sum(one.bytes for one in passes) > memory:
            each.restart()


@torch.no_grad()
def _set(norm: _BatchNorm, inputs: Iterable[Tensor], world: World) -> None:
    """Mean and unbiased variance over all images and positions of all ranks, as in training mode.

    Summed about the old mean in float64: it is near enough to the new one that nothing cancels.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    shift = mean.double()[:, None]
    sums = shift.new_zeros(3, len(shift))
    for x in inputs:
        rows = x.double().transpose(0, 1).flatten(1) - shift
        sums += torch.stack([torch.full_like(shift[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
    world.sum_(sums)
    count, total, squares = sums
    if count[0] > 1:
        mean.copy_(shift[:, 0] + total / count)
        variance.copy_((squares - total.square() / count) / (count - 1))


def format_summary(result: Reestimation) -> str:
    """One line."""
    verdict = "kept" if result.kept else "rejected: the statistics stay as they were"
    return (
        f"batch norm re-estimated in {result.layers} layers: held-out KL {result.before:.4f} before, "
        f"{result.after:.4f} after; {verdict}"
    )
