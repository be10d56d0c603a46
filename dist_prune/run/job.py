"""One run: what was decided before its work, which no stage changes, and the state, which they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dist_prune.config.run import Run
from dist_prune.correction.calibration import HELD
from dist_prune.data.dataset import Dataset, Split
from dist_prune.data.loader import Batch, Stream, evaluation_stream
from dist_prune.data.share import Share
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.factorization.planner import Planner
from dist_prune.network.memory_format import layout_of
from dist_prune.network.sites import Survey, survey
from dist_prune.reporting.report import Report
from dist_prune.run.checkpointing import CheckpointManager
from dist_prune.run.state import State
from dist_prune.training.evaluate import Predictions, predict

STAGES = ("dense", "projected", "corrected", "distilled", "tuned")


@dataclass(frozen=True)
class Job:
    """A run under way.

    Attributes:
        config: its settings.
        world: the ranks.
        report: what it shows.
        folder: its directory.
        dataset: training and validation images.
        unlabelled: of `--calibrate-data`.
        given: the network, on this rank's device.
        dense: the same, with the attention taken apart whose heads may lose dimensions; it shares its parameters.
        dense_survey: all its sites.
        dense_planner: from the spectra of those that `--sites` chooses to a plan.
        checkpoints: where it can be stopped and resumed.
        state: what its stages have found.
        notes: on weights and images, for the log.
        references: what dense networks say of the validation images, by their digest, for all runs of a family.
    """

    config: Run
    world: World
    report: Report
    folder: Path
    dataset: Dataset
    unlabelled: Split | None
    given: nn.Module
    dense: nn.Module
    dense_survey: Survey
    dense_planner: Planner
    checkpoints: CheckpointManager
    state: State
    notes: tuple[str, ...] = ()
    references: dict[str, Predictions] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Predictions:
        """What the dense network says of the validation images; computed when first asked for."""
        network = digest(self.dense)
        if network not in self.references:
            self.references[network] = predict(self.dense, watched_validation(self))
        return self.references[network]

    @property
    def everything(self) -> Survey:
        """All sites of the network whose layers are factored."""
        return self.dense_survey if self.state.narrow is None else self._narrow_survey

    @cached_property
    def _narrow_survey(self) -> Survey:
        assert self.state.narrow is not None
        return survey(self.state.narrow, probe(self.config, self.world, 1))

    @property
    def survey(self) -> Survey:
        """Those that `--sites` chooses."""
        return self.everything.select(self.config.compression.sites)

    @property
    def planner(self) -> Planner:
        """From their spectra to a plan, within what channels have left of the budget."""
        return self.dense_planner if self.state.narrow is None else self.dense_planner.within(self.survey)


Stage = tuple[str, Callable[[Job], None]]  # a part of a run that is done once, and its name


# ── its images ─────────────────────────────────────────────────────────────────────────────────────────────


def validation(job: Job) -> Stream:
    """Every validation image once over all ranks."""
    return decoded_alike(job, job.dataset.val, job.world)


def decoded_alike(job: Job, split: Split, world: Share) -> Stream:
    """Each image of a split once over the ranks, as validation sees images, laid out as the network."""
    images, layout = job.config.images, layout_of(job.given)
    return evaluation_stream(split, images.image, world, images.eval_batch_size, images.threads, layout)


def watched_validation(job: Job) -> Iterator[Batch]:
    """The same in a run that can be stopped and resumed."""
    return job.checkpoints.watched(job.report.meter.batches(validation(job)))


def calibration(job: Job, count: int) -> Stream:
    """The statistics' images, at most `count` of them (0: all), as validation sees images."""
    return decoded_alike(job, statistics_split(job, count), job.world)


def unlabelled_stream(job: Job) -> Stream:
    """The images to correct with: `--calibrate-images` of `--calibrate-data`, or of the training images."""
    count = job.config.correction.calibrate_images
    return decoded_alike(job, limited(job.unlabelled or job.dataset.train, count, job.config.seed), job.world)


def held_out_split(job: Job) -> Split:
    """Those of them that nothing is solved from or trained on."""
    split = unlabelled_stream(job).split
    return split.take(range(0, len(split), HELD))


def statistics_split(job: Job, count: int) -> Split:
    """A seeded subset of `--calibrate-data` where no labels are used, else of the training images."""
    source = job.unlabelled if job.config.unlabelled_statistics else None
    split = limited(source or job.dataset.train, job.config.compression.basis.statistics_images, job.config.seed)
    return limited(split, count, job.config.seed)


def limited(split: Split, count: int, seed: int) -> Split:
    """A seeded choice of `count` images; all of them if there are no more, or `count` is 0."""
    return split.subset(count, seed) if 0 < count < len(split) else split


def share_bits(job: Job, network: nn.Module) -> nn.Module:
    """Give all ranks rank 0's bits of a network that all computed: GPUs of several models round differently."""
    job.world.broadcast_(*network.state_dict().values())
    return network


def probe(config: Run, world: World, images: int) -> torch.Tensor:
    """Noise in the shape of images, laid out as they are."""
    crop = config.images.image.crop
    generator = torch.Generator().manual_seed(config.seed)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return (
        torch.randn(images, 3, crop, crop, generator=generator).to(world.device).contiguous(memory_format=layout)
    )
