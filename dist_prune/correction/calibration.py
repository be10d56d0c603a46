"""The images that a network is solved again from, and those held out, which say how near it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch, Stream, normalise
from dist_prune.data.views import WHOLE, Views
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from dist_prune.statistics.probes import LOSSES

HELD = 8  # every eighth image is the holdout


@dataclass(frozen=True)
class Calibration:
    """This rank's images as they are kept, (n, …), their positions (n,) in the list of images.

    `prepare` makes of kept images what the network takes: of decoded uint8 (n, 3, H, W), normalised ones.
    """

    pixels: Tensor
    indices: Tensor
    prepare: Callable[[Tensor], Tensor]
    batch_size: int
    views: Views = WHOLE

    def batches(self, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and positions of the holdout, or of all views of the images to solve from; whatever the ranks."""
        chosen = torch.nonzero((self.indices % HELD == 0) == held)[:, 0]
        for start in range(0, len(chosen), self.batch_size):  # none where this rank has no such image
            some = chosen[start : start + self.batch_size]
            indices = self.indices[some]
            for pixels in (WHOLE if held else self.views).of(self.pixels[some], indices):
                yield pixels, indices

    def prepared(self) -> Iterator[Batch]:
        """The images to solve from, as the network takes them, without labels."""
        for pixels, indices in self.batches(held=False):
            yield Batch(self.prepare(pixels), torch.full_like(indices, -1), indices)


def decode(stream: Stream, views: Views = WHOLE) -> Calibration:
    """Read this rank's images once and keep their bytes."""
    batches = list(stream.raw())
    pixels, indices = (torch.cat(parts) for parts in zip(*((b.images, b.indices) for b in batches), strict=True))
    return Calibration(pixels, indices, partial(normalise, spec=stream.spec), stream.batch_size, views)


def holdout_logits(dense: nn.Module, images: Calibration) -> list[tuple[Tensor, Tensor]]:
    """This rank's held-out images as they are kept, and what the dense network says to them."""
    return [(pixels, logits_of(dense(images.prepare(pixels)))) for pixels, _ in images.batches(held=True)]


def divergence(
    model: nn.Module,
    holdout: Sequence[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor],
    world: World,
    loss: str = "kl",
) -> float:
    """KL to the dense network, nats per image, or another loss, over the held-out images of all ranks."""
    return mean_loss(divergences(model, holdout, prepare, loss), world)


def mean_loss(losses: Tensor, world: World) -> float:
    """Over the images of all ranks, of this rank's losses, (images,)."""
    sums = torch.tensor([losses.sum(), len(losses)], dtype=torch.float64, device=world.device)
    world.sum_(sums)
    total, count = sums.tolist()
    return max(float(total / max(1.0, count)), 0.0)  # below zero only by rounding; NaN stays


def divergences(
    model: nn.Module,
    holdout: Sequence[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor], Tensor],
    loss: str = "kl",
) -> Tensor:
    """The same for each of this rank's images: (images,) float64."""
    found = [LOSSES[loss](logits.double(), logits_of(model(prepare(pixels)))) for pixels, logits in holdout]
    return torch.cat(found).double() if found else torch.zeros(0, dtype=torch.float64)
