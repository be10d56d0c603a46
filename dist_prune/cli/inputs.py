"""What a run would be given: images, weights, and whether they go together with its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from dist_prune.artifacts import run_directory
from dist_prune.cli.findings import Finding
from dist_prune.config.run import Run
from dist_prune.data.damage import check_decoding
from dist_prune.data.dataset import Dataset, Split
from dist_prune.data.loader import evaluation_stream
from dist_prune.distributed.preemption import Flag
from dist_prune.distributed.world import World
from dist_prune.network import models
from dist_prune.network.sites import Survey
from dist_prune.reporting.report import Report
from dist_prune.run.images import check_images, notes_on, open_images, open_unlabelled, require_classes
from dist_prune.run.network import load_network
from dist_prune.run.prepare import Given, begin

DECODED = 64  # images of each split that are decoded


@dataclass(frozen=True)
class Inputs:
    """Each is opened once, by the look that needs it first."""

    config: Run
    world: World

    @cached_property
    def dataset(self) -> Dataset:
        """Of `--data`."""
        return self.world.from_first(lambda: open_images(self.config))

    @cached_property
    def unlabelled(self) -> Split | None:
        """Of `--calibrate-data`."""
        return self.world.from_first(lambda: open_unlabelled(self.config))

    @cached_property
    def network(self) -> tuple[nn.Module, Survey, str]:
        """With its sites, and what was taken of a file of weights; without weights where they are not here."""
        taken: list[str] = []
        dense, everything = load_network(self.config, self.world, taken.append, read=not self.missing)
        return dense, everything, "; ".join(taken)

    @property
    def missing(self) -> str:
        """The address of weights that would be downloaded."""
        return models.missing_weights(self.config.network.arch, self.config.network.weights)

    def images(self) -> Iterator[Finding]:
        """Both ends of every file, the classes, and some images decoded."""
        if not self.config.images.data:
            yield Finding("images", "warn", "not looked at", "give --data DIR as the run will have it")
            return
        splits = {"train": self.dataset.train, "val": self.dataset.val, "calibration": self.unlabelled}
        some = {name: split for name, split in splits.items() if split is not None and split.files}
        for name, split in some.items():
            check_images(self.config, split, self.world, again=True)
            where = f"{len(split.archive.shards):,} shards of {split.root}" if split.archive else str(split.root)
            yield Finding(name, "ok", f"{len(split):,} images in {where}, both ends of each sound")
        if notes := notes_on(self.dataset, self.unlabelled):
            yield Finding("notes", "warn", "; ".join(notes), "see that this is meant")
        require_classes(self.config, self.dataset)
        yield Finding("classes", "ok", f"{len(self.dataset.train.classes):,}, as many as the network has outputs")
        read = sum(map(self._decoded, some.values()))
        yield Finding("read", "ok", f"{read} images by this rank, as --resize and --crop want them")

    def _decoded(self, split: Split) -> int:
        config, world = self.config, self.world
        some = split.subset(min(len(split), DECODED * world.size), config.seed)
        # By Pillow first: some damage inside a file ends DALI's process without a word.
        check_decoding(some, world)
        stream = evaluation_stream(some, config.images.image, world, DECODED, config.images.threads)
        return sum(len(batch.images) for batch in stream.raw())

    def weights(self) -> Iterator[Finding]:
        """Whether the weights are at hand, and the network they go into."""
        network, epochs = self.config.network, self.config.pretrain.epochs
        if network.weights == "none":
            trained = f"none: the network is trained first, {epochs} epochs"
            text = trained if epochs else "none, and no --pretrain.epochs"
            yield Finding(
                "weights", "ok" if epochs else "fail", text, "give --weights FILE, or --pretrain.epochs N"
            )
        elif self.missing:
            advice = f"where compute nodes have no network, fetch {self.missing} and give --weights FILE"
            yield Finding("weights", "warn", f"{network.weights} will be downloaded", advice)
        _, everything, taken = self.network
        if network.weights != "none" and not self.missing:
            fits = f"{network.weights} fits {network.arch}"
            yield Finding("weights", "ok", "; ".join(filter(None, (fits, taken))))
        chosen = len(everything.select(self.config.compression.sites).sites)
        text = f"{network.arch}: {everything.params / 1e6:.2f} M parameters, {everything.macs / 1e6:.1f} M MACs, "
        yield Finding("network", "ok", f"{text}{chosen} of {len(everything.sites)} layers chosen by --sites")

    def plan(self) -> Iterator[Finding]:
        """What the stages would need of images, network, `--statistics` and the cache, tried as a run does."""
        opened = {"dataset", "network"} <= vars(self).keys()  # else the looks before have said why
        if not opened or self.missing:
            advice = "it takes images and weights that are here and sound: see above"
            yield Finding("plan", "warn", "not looked at", advice)
            return
        config, (dense, everything, _) = self.config, self.network
        folder = run_directory.run_directory(config)
        given = Given(self.dataset, self.unlabelled, dense, everything)
        begin(config, self.world, Report(speaks=False), folder, Flag(), given)
        if everything.concern:
            yield Finding("outputs", "warn", everything.concern, "see that this is meant")
        if file := config.compression.basis.statistics:
            yield Finding("statistics", "ok", f"{file}: of these images and this network")
        text = f"--ranks {config.compression.ranks} can be reached; what correction and training need is there"
        yield Finding("plan", "ok", text)
