"""Evaluation: accuracy, KL to the dense network, and the time of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.latency import now
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import Site, evaluating
from dist_prune.statistics.probes import kl


class EvaluationError(RuntimeError):
    """An evaluation that did not see what it should have."""


@dataclass(frozen=True)
class Predictions:
    """What a network says of this rank's images, in the stream's order.

    `logits` (n, classes), `labels` and `indices` (n).
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Metrics:
    """Over all images of all ranks. `top1` and `top5` per cent, `loss` and `kl` nats per image.

    `kl` is KL(dense ‖ this network), None for the dense network itself, as are the numbers of images that this
    network alone gets right (`gained`) and that the dense one alone does (`lost`).
    """

    top1: float
    top5: float
    loss: float
    images: int
    kl: float | None = None
    gained: int | None = None
    lost: int | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        """What is drawn as curves."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "kl": self.kl}


def predict(model: nn.Module, batches: Iterable[Batch]) -> Predictions:
    """Run the network, in evaluation mode, over this rank's batches (which may be empty)."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            if len(batch.images):
                parts.append((logits_of(model(batch.images)).float(), batch.labels, batch.indices))
    if not parts:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Predictions(torch.zeros(0, 1), nothing, nothing)
    logits, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    return Predictions(logits, labels, indices)


def score(found: Predictions, images: int, world: World, dense: Predictions | None = None) -> Metrics:
    """Metrics over all ranks, one reduction.

    Args:
        found: this rank's predictions.
        images: how many images there are, to prove that each was seen once.
        world: the ranks.
        dense: the dense network's predictions of the same images, for `kl`.

    Raises:
        EvaluationError: the ranks together saw more or fewer images.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=world.device)
    if len(found.labels):
        compared = [_divergence(found, dense), *_changed(found, dense)]
        sums = torch.stack([*_correct(found), _loss(found), *compared, _count(found)])
    world.sum_(sums)
    top1, top5, loss, diverged, gained, lost, count = sums.tolist()
    if count != images:
        raise EvaluationError(f"the ranks together saw {count:.0f} images, expected each of {images} once")
    share = 100 / images
    figures = top1 * share, top5 * share, loss / images, images
    return Metrics(*figures) if dense is None else Metrics(*figures, diverged / images, int(gained), int(lost))


def _correct(found: Predictions) -> tuple[Tensor, Tensor]:
    best = found.logits.topk(min(5, found.logits.shape[1]), dim=1).indices == found.labels[:, None]
    return best[:, 0].sum(dtype=torch.float64), best.sum(dtype=torch.float64)


def _loss(found: Predictions) -> Tensor:
    return F.cross_entropy(found.logits.double(), found.labels, reduction="sum")


def _divergence(found: Predictions, dense: Predictions | None) -> Tensor:
    if dense is None:
        return found.logits.new_zeros((), dtype=torch.float64)
    if not torch.equal(dense.indices, found.indices):
        raise EvaluationError("the dense network's predictions are of other images; evaluate both on one stream")
    return kl(dense.logits.double(), found.logits.double()).sum()


def _changed(found: Predictions, dense: Predictions | None) -> tuple[Tensor, Tensor]:
    """How many images only this network gets right, and how many only the dense one."""
    now = found.logits.argmax(1) == found.labels
    before = now if dense is None else dense.logits.argmax(1) == dense.labels
    return (now & ~before).sum(dtype=torch.float64), (before & ~now).sum(dtype=torch.float64)


def _count(found: Predictions) -> Tensor:
    return torch.tensor(len(found.labels), dtype=torch.float64, device=found.labels.device)


def time_sites(model: nn.Module, sites: Sequence[Site], images: Tensor, repeats: int = 3) -> dict[str, float]:
    """Share of a forward pass spent in each site, per cent: the median of `repeats` passes after one to warm up.

    On CUDA every site waits for the device, so launch gaps are counted out of the shares.
    """
    rounds = [_time_once(model, sites, images) for _ in range(repeats + 1)][1:]
    return {site.name: sorted(r[site.name] for r in rounds)[repeats // 2] for site in sites}


def _time_once(model: nn.Module, sites: Sequence[Site], images: Tensor) -> dict[str, float]:
    spent = {site.name: 0.0 for site in sites}

    def start(name: str) -> Callable[..., None]:
        return lambda *_: spent.update({name: spent[name] - now(images.device)})

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: spent.update({name: spent[name] + now(images.device)})

    modules = [(site.name, model.get_submodule(site.name)) for site in sites]
    hooks = [m.register_forward_pre_hook(start(name)) for name, m in modules]
    hooks += [m.register_forward_hook(stop(name)) for name, m in modules]
    try:
        with evaluating(model):
            begin = now(images.device)
            model(images)
            whole = now(images.device) - begin
    finally:
        for hook in hooks:
            hook.remove()
    return {name: 100 * seconds / whole for name, seconds in spent.items()}
