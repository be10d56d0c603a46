"""A run before its work: everything that can be wrong is found here, and the images it will read are opened."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from dist_prune import checkpoint, models
from dist_prune.config import Run
from dist_prune.correction import require_deterministic
from dist_prune.data import Stream, evaluation_stream
from dist_prune.evaluate import Metrics, time_sites
from dist_prune.finetune import require_possible
from dist_prune.flags import ConfigError
from dist_prune.images import Dataset, Split, check_files, open_dataset, write_digits
from dist_prune.mnist import has_idx, unpack
from dist_prune.planning import Planner, planner, timed_planner
from dist_prune.report import Report, environment
from dist_prune.sites import Survey, survey
from dist_prune.world import World

STAGES = ("dense", "projected", "corrected", "distilled", "tuned")


@dataclass
class Job:
    """A run under way: what was decided before the work, and the figures found so far."""

    config: Run
    world: World
    report: Report
    folder: Path
    dataset: Dataset
    dense: nn.Module
    everything: Survey  # all sites of the network
    survey: Survey  # those that --sites chooses
    planner: Planner
    metrics: dict[str, Metrics] = field(default_factory=dict)


def prepare(config: Run, world: World, report: Report, folder: Path) -> Job:
    """Check the data, the network and the plan, then open the run's directory. Changes nothing on disk before."""
    dataset = world.from_first(lambda: open_images(config))
    require_classes(config, dataset)
    check_files(dataset.train, world)
    check_files(dataset.val, world)
    for settings in (config.tuning, config.pretrain):
        require_possible(settings, world.device)
    dense, everything = load_network(config, world)
    found = everything.select(config.compression.sites)
    ranks = timed_planner(config, dense, found, world, probe(config, world, 1))
    ranks.check()
    if config.correction.correct != "none":
        require_deterministic(dense, probe(config, world, 2), world)
    job = Job(config, world, report, folder, dataset, dense, everything, found, ranks)
    validation(job), calibration(job, 0)  # both refuse to share fewer images than ranks
    world.from_first(lambda: checkpoint.claim(folder, config, environment()))
    if world.is_first:
        report.open(folder)
    report.say(f"run directory {folder}, {world.size} rank(s) on {world.device.type}")
    return job


def open_images(config: Run) -> Dataset:
    """The data set that `--data` names."""
    if config.images.data == "digits":
        return open_dataset(write_digits(checkpoint.cache_folder() / "digits"))
    folder = Path(config.images.data)
    if has_idx(folder):
        folder = unpack(folder, checkpoint.cache_folder())
    return open_dataset(folder, config.images.class_list)


def require_classes(config: Run, dataset: Dataset) -> None:
    """The network's outputs and the data's classes must be one and the same list.

    Raises:
        ConfigError: they are not as many.
    """
    found, expected = len(dataset.train.classes), config.network.classes
    if found != expected:
        raise ConfigError(
            f"--data {config.images.data} has {found} classes, the network {expected} outputs: give --classes "
            f"{found} with weights for them, or --class-list FILE naming all {expected} folders in label order"
        )


def load_network(config: Run, world: World) -> tuple[nn.Module, Survey]:
    """The dense network on this rank's device, and all its sites."""
    torch.manual_seed(config.seed)
    network = config.network
    dense = models.build(network.arch, network.classes).eval()
    # One rank reads, or downloads, the weights; the others get them from it.
    world.from_first(lambda: models.fill(dense, network.arch, network.classes, network.weights))
    dense = dense.to(world.device)
    world.broadcast_(*dense.state_dict().values())
    image = probe(config, world, 1)
    try:
        found = survey(dense, image)
    except RuntimeError as error:
        size = " × ".join(map(str, image.shape[1:]))
        raise ConfigError(f"--arch {network.arch} does not take images of {size}, see --crop ({error})") from error
    if found.classes != network.classes:
        raise ConfigError(f"--arch {network.arch} has {found.classes} outputs, --classes is {network.classes}")
    return dense, found


def probe(config: Run, world: World, images: int) -> torch.Tensor:
    """Noise in the shape of images."""
    crop = config.images.image.crop
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(images, 3, crop, crop, generator=generator).to(world.device)


def show_plan(config: Run, world: World, report: Report) -> None:
    """The dry run: the plan's table from the network alone; weights are not even read."""
    unread = replace(config, network=replace(config.network, weights="none"))
    dense, everything = load_network(unread, world)
    found = everything.select(config.compression.sites)
    known = planner(config, found, world)
    plan, note = known.foreseen()
    report.say(known.told(plan, time_sites(dense, found.sites, probe(config, world, 4))))
    if note:
        report.say(note)


def validation(job: Job) -> Stream:
    """Every validation image once over all ranks."""
    images = job.config.images
    return evaluation_stream(job.dataset.val, images.image, job.world, images.eval_batch_size, images.threads)


def calibration(job: Job, count: int) -> Stream:
    """The statistics' images, at most `count` of them (0: all), as validation sees images."""
    images, split = job.config.images, statistics_split(job, count)
    return evaluation_stream(split, images.image, job.world, images.eval_batch_size, images.threads)


def statistics_split(job: Job, count: int) -> Split:
    """A seeded subset of the training images, never of the validation images."""
    split = limited(job.dataset.train, job.config.compression.basis.statistics_images, job.config.seed)
    return limited(split, count, job.config.seed)


def limited(split: Split, count: int, seed: int) -> Split:
    """A seeded choice of `count` images; all of them if there are no more, or `count` is 0."""
    return split.subset(count, seed) if 0 < count < len(split) else split
