"""What every way of compressing is measured on, and the same short fine-tuning for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dist_prune.config.recipes import RECIPES
from dist_prune.config.training import TuningConfig
from dist_prune.data.dataset import Dataset, Split, open_dataset
from dist_prune.data.loader import Stream, evaluation_stream, training_stream
from dist_prune.distributed.world import World
from dist_prune.factorization.project import balance
from dist_prune.network import models
from dist_prune.network.memory_format import lay_out
from dist_prune.network.sites import survey
from dist_prune.run.job import limited
from dist_prune.training.distillation_loss import distillation_loss
from dist_prune.training.evaluate import Metrics, Predictions, predict, score
from dist_prune.training.trainer import Loss, Trainer, steps_of

RECIPE = RECIPES["cifar10"]
SPEC, CLASSES = RECIPE.images.image, RECIPE.network.classes
PER_STEP = 128  # images, by one process: as two ranks of the recipe


@dataclass(frozen=True)
class Ground:
    """The dense network and its images, read by one process."""

    dataset: Dataset
    dense: nn.Module
    world: World

    def stream(self, split: Split, batch: int = 250) -> Stream:
        """Images as validation sees them."""
        return evaluation_stream(split, SPEC, self.world, batch, RECIPE.images.threads)

    def training(self, count: int, seed: int) -> Split:
        """A seeded choice of training images, `count` at most; 0: all."""
        return limited(self.dataset.train, count, seed)

    @cached_property
    def reference(self) -> Predictions:
        """What the dense network says of the validation images."""
        return predict(self.dense, self.stream(self.dataset.val))

    def measure(self, network: nn.Module) -> Metrics:
        """Of the whole validation set, against the dense network."""
        found = predict(network, self.stream(self.dataset.val))
        return score(found, len(self.dataset.val), self.world, self.reference)

    def tune(self, network: nn.Module, seed: int, distill: str, epochs: int, images: int = 0) -> Metrics:
        """Train `network`, in place, as the recipe does, and measure it; `images` 0: all.

        In bfloat16 and channels last: on processors with tensor tiles twice as fast, for all networks alike.
        """
        how = replace(RECIPE.tuning, epochs=epochs, batch_size=PER_STEP, distill=distill, bf16=True)
        balance(network)
        lay_out(network, torch.channels_last)
        split, shape = self.training(images, seed), RECIPE.images
        stream = training_stream(split, SPEC, self.world, PER_STEP, shape.threads, seed, shape.augment)
        trainer = Trainer(network, how, epochs * steps_of(how, len(stream)), self.world, self._loss(how))
        for _ in range(epochs):
            for _ in trainer.epoch(stream):
                pass
        trainer.finish()
        return self.measure(network)

    def _loss(self, how: TuningConfig) -> Loss | None:
        return distillation_loss(self.dense, how.distillation, how) if how.distillation else None


def macs_of(network: nn.Module) -> int:
    """Multiply-adds of one image."""
    return survey(network, torch.zeros(1, 3, SPEC.crop, SPEC.crop)).macs


def ground(data: Path, weights: Path, arch: str, world: World) -> Ground:
    """Open the images and the dense network."""
    torch.manual_seed(0)
    dense = models.build(arch, CLASSES)
    models.fill(dense, arch, CLASSES, str(weights))
    return Ground(open_dataset(data), dense.eval(), world)
