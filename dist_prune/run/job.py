"""A run before its work: everything that can be wrong is found here, and the images it will read are opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.artifacts import checkpoints, run_directory
from dist_prune.artifacts.checkpoints import Snapshot
from dist_prune.artifacts.environment import environment
from dist_prune.artifacts.lock import Lock
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.correction.correct import require_deterministic
from dist_prune.data import timm_images
from dist_prune.data.dataset import Dataset, Split, check_files, list_unlabelled, open_dataset, write_digits
from dist_prune.data.loader import Batch, Stream, evaluation_stream
from dist_prune.data.mnist import has_idx, unpack
from dist_prune.distributed.preemption import Flag, restarts
from dist_prune.distributed.world import World, digest
from dist_prune.factorization import layers
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.planner import Planner, planner, timed_planner
from dist_prune.factorization.project import rebuild, unfold
from dist_prune.network import models
from dist_prune.network.memory_format import lay_out
from dist_prune.network.sites import Survey, survey
from dist_prune.reporting.report import Report
from dist_prune.run.checkpointing import CheckpointManager
from dist_prune.training import sensitivity
from dist_prune.training.evaluate import Metrics, Predictions, predict, time_sites
from dist_prune.training.trainer import require_possible
from dist_prune.utils import files
from dist_prune.utils.files import CheckpointError

STAGES = ("dense", "projected", "corrected", "distilled", "tuned")


@dataclass
class Job:
    """A run under way: what was decided before the work, and what the stages done so far have found."""

    config: Run
    world: World
    report: Report
    folder: Path
    dataset: Dataset
    dense: nn.Module
    everything: Survey  # all sites of the network
    survey: Survey  # those that --sites chooses
    planner: Planner
    checkpoints: CheckpointManager
    unlabelled: Split | None = None  # --calibrate-data
    done: list[str] = field(default_factory=list)  # names of stages
    metrics: dict[str, Metrics] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)  # by stage, which validation images
    plan: Plan | None = None
    target: Plan | None = None  # where the rounds of an iterative run end; else the plan itself
    network: nn.Module | None = None  # the compressed one, as soon as there is one
    unfolded: bool = False  # whether its pairs are, for the moment, multiplied back to dense layers

    @property
    def chosen(self) -> Plan:
        """The plan, in stages that come after it was made."""
        assert self.plan is not None
        return self.plan

    @property
    def compressed(self) -> nn.Module:
        """The compressed network, in stages that come after it was made."""
        assert self.network is not None
        return self.network

    @cached_property
    def reference(self) -> Predictions:
        """What the dense network says of the validation images; computed when first asked for."""
        return predict(self.dense, watched_validation(self))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a run is about: another one cannot go on with its checkpoints."""
        return {
            "training images": self.dataset.train.digest(),
            "validation images": self.dataset.val.digest(),
            "network": digest(self.dense),
            "calibration images": self.unlabelled.digest() if self.unlabelled else "",
        }

    @property
    def shares(self) -> dict[str, int]:
        """How the images are shared out: what a pass over them can only go on with."""
        config = self.config
        return {
            "ranks": self.world.size,
            "batch_size": config.tuning.batch_size,
            "distill": config.distillation.distill_batch_size,
            "pretrain": config.pretrain.batch_size,
        }

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds besides the stage under way; the same on all ranks but for `points`."""
        return {
            "identity": self.identity,
            "shares": self.shares,
            "done": self.done,
            "metrics": {stage: asdict(m) for stage, m in self.metrics.items()},
            "right": self.right,
            "seconds": self.report.elapsed(),
            "warnings": self.report.warnings,
            "points": self.report.written(),
            "plan": self.plan and self.plan.to_json(),
            "target": self.target and self.target.to_json(),
            "unfolded": self.unfolded,
            "model": self.network and self.network.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where the run was when it had that state."""
        self.done, self.report.seconds = state["done"], state["seconds"]
        # What was said while it was taken up comes after.
        self.report.warnings = [*state.get("warnings", []), *self.report.warnings]
        self.metrics = {stage: Metrics(**m) for stage, m in state["metrics"].items()}
        self.right = state.get("right", {})
        self.report.rewind(state["points"])
        if state["plan"] is not None:
            self.plan = Plan.from_json(state["plan"])
            self.target, self.unfolded = Plan.from_json(state["target"]), state["unfolded"]
            self.network = rebuild(self.dense, self.plan)
            if self.unfolded:
                self.network = unfold(self.network, self.plan.ranks)
            self.network.load_state_dict(state["model"])
            self.redraw()

    def redraw(self) -> None:
        """The pictures that are made but once, in TensorBoard, which forgot them."""
        if not self.world.is_first:
            return
        try:
            self.report.layers(layers.load(self.folder / layers.LAYERS), self.chosen)
            if "measure sites" in self.done:
                self.report.predictions(**sensitivity.load(self.folder / sensitivity.SITES))
        except CheckpointError as error:
            self.report.warn(f"{error}: TensorBoard goes without")


Stage = tuple[str, Callable[[Job], None]]  # a part of a run that is done once, and its name


def prepare(config: Run, world: World, report: Report, folder: Path, flag: Flag) -> Job:
    """Check the data, the network and the plan. Changes nothing on disk."""
    dataset = world.from_first(lambda: open_images(config))
    require_classes(config, dataset)
    unlabelled = world.from_first(lambda: open_unlabelled(config))
    if not (
        config.resume and world.from_first(lambda: run_directory.is_known(folder))
    ):  # they were sound when it began
        for split in (dataset.train, dataset.val, unlabelled):
            if split is not None:
                check_files(split, world)
    for settings in (config.tuning, config.pretrain):
        require_possible(settings, world.device)
    dense, everything = load_network(config, world)
    found = everything.select(config.compression.sites)
    ranks = timed_planner(config, dense, found, world, probe(config, world, 1))
    ranks.check()
    if config.correction.correct != "none":
        require_deterministic(dense, probe(config, world, 2), world)
    manager = CheckpointManager(
        world, folder / "checkpoints", flag, report.say, 60 * config.save_minutes, config.keep_checkpoints
    )
    job = Job(config, world, report, folder, dataset, dense, everything, found, ranks, manager, unlabelled)
    manager.describe = job.state
    # The streams refuse to share fewer images than ranks.
    job.identity, validation(job), calibration(job, 0), unlabelled_stream(job)
    return job


@contextmanager
def opened(job: Job) -> Iterator[None]:
    """Have the run's directory to oneself, and stand where an earlier start of the run was left, if there is one.

    Raises:
        CheckpointError: another process works there, or it cannot be written.
        ConfigError: what was left is of other images, another network, or another number of ranks.
        NoProgressError: see `run_directory.require_progress`.
    """
    lock: list[Lock] = []
    job.world.from_first(lambda: lock.append(run_directory.claim(job.folder, job.config, environment())))
    try:
        if job.world.is_first:
            job.report.open(job.folder)
        job.report.say(f"run directory {job.folder}, {job.world.size} rank(s) on {job.world.device.type}")
        if note := timm_images.adopted(job.config):
            job.report.say(note)
        if job.config.resume:
            take_up(job)
        yield
    finally:
        job.report.close()
        for held in lock:
            held.release()


def take_up(job: Job) -> None:
    """Stand where the newest checkpoint that can be used was left."""
    found = newest_checkpoint(job)
    if found is not None:
        require_identity(job, found.common["identity"])
        if found.common["shares"] != job.shares:
            found = resharded(job, found)
    place = "the beginning" if found is None else place_of(found.common)
    job.world.from_first(lambda: run_directory.require_progress(job.folder, place, restarts(os.environ)))
    job.report.say(
        "no checkpoint yet: starting from the beginning" if found is None else f"resuming after {place}"
    )
    if found is None:
        job.report.rewind(0)
    else:
        job.restore(found.common)
        job.checkpoints.take_up(found)


def newest_checkpoint(job: Job, whole: bool = False) -> Snapshot | None:
    """The newest intact checkpoint; damaged ones are text."""
    found, problems = checkpoints.newest(job.checkpoints.folder, job.world, whole)
    for problem in problems:
        job.report.warn(f"{problem}; renamed to ….damaged, using the checkpoint before")
    return found


def require_identity(job: Job, before: dict[str, str]) -> None:
    """Refuse to go on with other images or another network.

    Raises:
        ConfigError: names what is different.
    """
    differing = [name for name, value in job.identity.items() if before[name] != value]
    if differing:
        raise ConfigError(
            f"--resume: the {' and the '.join(differing)} are not what {job.folder} was begun with: "
            f"put them back, or begin again with --overwrite"
        )


def resharded(job: Job, found: Snapshot) -> Snapshot | None:
    """Another number of ranks, or batch size, goes on from where no pass over the images is in its middle.

    Raises:
        ConfigError: that was not asked for.
    """
    before, now = (shares_told(shares) for shares in (found.common["shares"], job.shares))
    if not job.config.reshard:
        raise ConfigError(
            f"--resume: the run was left by {before}, this is {now}: start it as it was, or add --reshard to go "
            f"on from the end of its last epoch"
        )
    boundary = found if found.whole else newest_checkpoint(job, whole=True)
    again = "nothing" if found.whole else f"what was done between it and {place_of(found.common)}"
    job.report.say(f"resharding: {before} → {now}, from the last boundary; {again} is done again")
    return boundary and replace(boundary, own={})


def place_of(state: dict[str, Any]) -> str:
    """Where a checkpoint stands, in words."""
    standing, done = state["standing"], state["done"]
    return f"{standing['stage']}, {standing['at']}" if standing else done[-1] if done else "the beginning"


def shares_told(shares: dict[str, int]) -> str:
    """How images are shared out, in words."""
    return f"{shares['ranks']} ranks with batches of {shares['batch_size']}"


def open_images(config: Run) -> Dataset:
    """The data set that `--data` names."""
    if config.images.data == "digits":
        return open_dataset(write_digits(files.cache_folder() / "digits"))
    folder = Path(config.images.data)
    if has_idx(folder):
        folder = unpack(folder, files.cache_folder())
    return open_dataset(folder, config.images.class_list)


def open_unlabelled(config: Run) -> Split | None:
    """The images that `--calibrate-data` names."""
    folder = config.correction.calibrate_data
    return None if folder is None else list_unlabelled(folder)


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
    if config.channels_last:
        lay_out(dense, torch.channels_last)
    image = probe(config, world, 1)
    try:
        found = survey(dense, image)
    except RuntimeError as error:
        size = " × ".join(map(str, image.shape[1:]))
        see = "--crop and --channels-last" if config.channels_last else "--crop"
        raise ConfigError(f"--arch {network.arch} does not take images of {size}, see {see} ({error})") from error
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
    report.say(known.format_table(plan, time_sites(dense, found.sites, probe(config, world, 4))))
    for more in filter(None, (note, known.way(plan, config.iteration), timm_images.adopted(config))):
        report.say(more)


def validation(job: Job) -> Stream:
    """Every validation image once over all ranks."""
    images = job.config.images
    return evaluation_stream(job.dataset.val, images.image, job.world, images.eval_batch_size, images.threads)


def watched_validation(job: Job) -> Iterator[Batch]:
    """The same in a run that can be left in its middle."""
    return job.checkpoints.watched(job.report.meter.batches(validation(job)))


def calibration(job: Job, count: int) -> Stream:
    """The statistics' images, at most `count` of them (0: all), as validation sees images."""
    images, split = job.config.images, statistics_split(job, count)
    return evaluation_stream(split, images.image, job.world, images.eval_batch_size, images.threads)


def unlabelled_stream(job: Job) -> Stream:
    """The images to correct with: `--calibrate-images` of `--calibrate-data`, or of the training images."""
    images, count = job.config.images, job.config.correction.calibrate_images
    split = limited(job.unlabelled or job.dataset.train, count, job.config.seed)
    return evaluation_stream(split, images.image, job.world, images.eval_batch_size, images.threads)


def statistics_split(job: Job, count: int) -> Split:
    """A seeded subset of the training images, never of the validation images."""
    split = limited(job.dataset.train, job.config.compression.basis.statistics_images, job.config.seed)
    return limited(split, count, job.config.seed)


def limited(split: Split, count: int, seed: int) -> Split:
    """A seeded choice of `count` images; all of them if there are no more, or `count` is 0."""
    return split.subset(count, seed) if 0 < count < len(split) else split
