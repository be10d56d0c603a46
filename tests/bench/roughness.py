"""Part of the GPU benchmark: what a rougher forward pass costs in the accuracy of the bases.

A small network is trained here on the handwritten digits, so that its spectra are those of a trained network.
Then statistics are collected in float32 and in each rougher precision, products in float32 with TF32 off every
time, and half the directions of every site are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis, solve
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import project
from dist_prune.network.models import build
from dist_prune.network.sites import Site, survey
from dist_prune.statistics.collect import Statistics, collect
from dist_prune.training.evaluate import predict, score
from dist_prune.training.trainer import Trainer, steps_of
from tests.bench.ceilings import Precision, precisions, tensor_cores
from tests.bench.figures import Figure, missing
from tests.bench.phases import ALL_PRECISIONS, NO_TF32, Bench

ARCH, BATCH = "resnet20", 64
METHODS = (MethodConfig("pca"), MethodConfig("fisher", draws=0))


def bases_of_rough_passes(bench: Bench) -> Iterator[Figure]:
    """Directions and networks from each precision against those from float32, at half the ranks."""
    dense, seen, unseen = trained(bench)
    found = Found(dense, seen, unseen, bench.world)
    reference = score(predict(dense, unseen), len(unseen[0].labels), bench.world)
    yield Figure(f"{ARCH} on digits: top-1", reference.top1, "%", detail="what the rest is measured on")
    exact = {method: found.gathered(method, "float32") for method in METHODS}
    bases = {method: found.bases(method, sums) for method, sums in exact.items()}
    before = {method: found.divergence(directions) for method, directions in bases.items()}
    covariances = {name: moments.covariance for name, moments in exact[METHODS[0]].moments.items()}
    for precision in ALL_PRECISIONS[1:]:
        if precision not in precisions(bench.device):
            yield missing(f"{precision} forward", NO_TF32)
            continue
        for method in METHODS:
            name = f"{precision} forward, {method.method}"
            rough = found.bases(method, found.gathered(method, precision))
            if method.method == "pca":
                yield from turned(name, rough, bases[method], covariances)
            after = found.divergence(rough)
            detail = f"{after:.6g} nats against {before[method]:.6g}"
            change = 100 * (after / before[method] - 1)
            yield Figure(f"{name}: KL to dense at half the ranks, change", change, "%", detail=detail)


@dataclass(frozen=True)
class Found:
    """A trained network, and images it was and was not trained on."""

    dense: nn.Module
    seen: list[Batch]
    unseen: list[Batch]
    world: World

    @property
    def sites(self) -> tuple[Site, ...]:
        """All convolutions: the last layer has ten outputs, of which none can be left out."""
        return survey(self.dense, self.seen[0].images[:1]).select("@conv").sites

    def gathered(self, method: MethodConfig, precision: Precision) -> Statistics:
        """From the images seen."""
        rough = precision == "bf16"
        method = replace(method, statistics_bf16=rough, statistics_float32=not rough)
        with tensor_cores(precision):
            return collect(self.dense, self.sites, lambda _: self.seen, self.world, method, 0)

    def bases(self, method: MethodConfig, gathered: Statistics) -> dict[str, Basis]:
        """Of all sites."""
        return solve(self.dense, self.sites, gathered, method, 0, self.world)

    def divergence(self, bases: Mapping[str, Basis]) -> float:
        """KL to the dense network, on images unseen, when all sites keep half their directions."""
        plan = Plan(tuple(Choice(site.name, site.outputs // 2) for site in self.sites))
        compressed = project(self.dense, self.sites, bases, plan, "output")
        dense, count = predict(self.dense, self.unseen), sum(len(batch.labels) for batch in self.unseen)
        found = score(predict(compressed, self.unseen), count, self.world, dense).kl
        assert found is not None
        return found


def turned(
    name: str, rough: Mapping[str, Basis], exact: Mapping[str, Basis], covariances: Mapping[str, Tensor]
) -> Iterator[Figure]:
    """Of the worst site: energy that its directions fail to keep, and how far they turned."""
    lost = {n: 1 - kept_energy(rough[n], c) / kept_energy(exact[n], c) for n, c in covariances.items()}
    turns = {n: distance(rough[n], exact[n]) for n in covariances}
    for what, values in (("energy lost", lost), ("subspace distance", turns)):
        worst = max(values, key=lambda name: values[name])
        middle = sorted(values.values())[len(values) // 2]
        detail = f"worst of {len(values)} sites, {worst}; median {middle:.3g}"
        yield Figure(f"{name}: {what} at half the ranks", values[worst], detail=detail)


def kept_energy(basis: Basis, covariance: Tensor) -> float:
    """What of tr(Σ) the first half of orthonormal directions keeps."""
    kept, _ = basis.kept(basis.mean.numel() // 2)
    return float((kept @ covariance @ kept.mT).diagonal(dim1=-2, dim2=-1).sum())


def distance(one: Basis, other: Basis) -> float:
    """Of the spans of the first halves of orthonormal directions: ‖P − P′‖/√2r, 0 if equal, 1 if orthogonal."""
    (a, _), (b, _) = (basis.kept(basis.mean.numel() // 2) for basis in (one, other))
    return float((1 - (a @ b.mT).square().sum() / (a.shape[0] * a.shape[1])).clamp(min=0).sqrt())


def trained(bench: Bench) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """A network trained here, the digits it saw, in batches, and those it did not, in one."""
    images, labels = digits(bench.scale.digits, bench.device)
    index = torch.arange(len(labels), device=bench.device)
    edge = len(labels) * 4 // 5
    whole = Batch(images[:edge], labels[:edge], index[:edge])
    unseen = Batch(images[edge:], labels[edge:], index[edge:])
    seen = [
        Batch(*(part[i : i + BATCH] for part in (whole.images, whole.labels, whole.indices)))
        for i in range(0, edge, BATCH)
    ]
    torch.manual_seed(0)
    model = build(ARCH, 10).to(bench.device)
    settings = TrainingConfig(epochs=bench.scale.epochs, batch_size=BATCH, lr=0.2)
    trainer = Trainer(model, settings, settings.epochs * steps_of(settings, len(seen)), bench.world)
    for epoch in range(settings.epochs):
        list(trainer.epoch(shuffled(whole, epoch)))
    return model.eval(), seen, [unseen]


def shuffled(whole: Batch, seed: int) -> Iterator[Batch]:
    """The images in a random order, in batches."""
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(seed)).to(
        whole.labels.device
    )
    for chosen in order.split(BATCH):
        yield Batch(whole.images[chosen], whole.labels[chosen], whole.indices[chosen])


def digits(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first digits that ship with scikit-learn, (n, 3, 32, 32), and their labels."""
    found = load_digits()
    pixels = torch.tensor(found.images[:count], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    grow = partial(F.interpolate, size=32, mode="bilinear", align_corners=False)
    return grow(pixels / 8 - 1).to(device), torch.tensor(found.target[:count]).to(device)
