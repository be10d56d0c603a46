"""What is known of a network at hand, from batches at hand: all that a choice of ranks begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dist_prune.config.arguments import naming_arguments
from dist_prune.config.compression import CompressionConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.correction.calibration import Calibration
from dist_prune.correction.channels import channels_of
from dist_prune.correction.correct import require_deterministic
from dist_prune.data.batches import BatchesError, Kept
from dist_prune.data.loader import Batch
from dist_prune.data.views import in_views, views_of, views_of_statistics
from dist_prune.distributed.fingerprint import fingerprint
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import Basis, solve
from dist_prune.factorization.nested import Nested
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.planner import Planner, follower, timed_planner
from dist_prune.factorization.project import opened_for
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.attention import opened, opened_as
from dist_prune.network.channels import KeptChannels
from dist_prune.network.inputs import taking
from dist_prune.network.outputs import Outputs, answering
from dist_prune.network.padding import own_paddings, with_paddings
from dist_prune.network.replacing import with_replaced
from dist_prune.network.sites import Survey, survey
from dist_prune.statistics import collect as statistics
from dist_prune.statistics.collect import Passes, Statistics
from dist_prune.statistics.moments import StatisticsError, Sums
from dist_prune.utils.caller import bar, warn
from dist_prune.width.choose import Channels, removable_groups, require_reachable_widths
from dist_prune.width.groups import Groups

T = TypeVar("T")
Measure = Literal["kl", "mse"]
Directions = tuple[dict[str, dict[str, Nested]], Spectra | None]


@dataclass(frozen=True)
class Collected:
    """Everything that does not depend on the ranks.

    Attributes:
        run: settings.
        given_model: the network as it was given.
        model: the network whose layers are factored; it returns what counts of what the given one does.
        everything: all its sites.
        found: those that are chosen.
        sums: its statistics.
        bases: the sites' directions.
        given: the batches.
        images: those to correct from.
        image: (1, …), of rank 0.
        progress: whether there is a bar.
        patches: whether the statistics tell of patches.
        channels: what can be removed; None if that was not asked for.
        measured: what `directions` found for earlier choices of ranks, by the forms that they allowed.
        padding: names of the convolutions that padded by themselves.
        versions: of the given network's tensors, as PyTorch counts their changes.
        attention: whose heads stay, name → why.
        possible: channels that could be removed, and which stay and why.
        narrow: for the last choice of channels, the network they are removed from, and the same of what is left.
    """

    run: Run
    given_model: nn.Module
    model: nn.Module
    everything: Survey
    found: Survey
    sums: Statistics
    bases: Mapping[str, Basis]
    given: Kept
    images: Calibration
    image: Tensor
    progress: bool | None
    patches: bool = False
    padding: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    attention: Mapping[str, str] = field(default_factory=dict)
    possible: Groups = field(default_factory=Groups)
    channels: Channels | None = None
    measured: dict[frozenset[str], Directions] = field(default_factory=dict, compare=False)
    narrow: dict[tuple[KeptChannels, ...], tuple[nn.Module, Collected]] = field(
        default_factory=dict, compare=False
    )

    @property
    def measure(self) -> Measure:
        """What the outputs' changes are measured by."""
        return "mse" if self.run.compression.basis.loss == "mse" else "kl"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.image.device

    def opened(self, images: int = 0) -> Iterator[Batch]:
        """This rank's part of the first so many images that the statistics are of, in all their views; 0: all."""
        return in_views(self.given.open(images), views_of_statistics(self.run))

    def require_unchanged(self, world: World) -> None:
        """Refuse to go on with a network that was trained, or loaded, since the statistics were collected.

        Raises:
            ConfigError: on every rank.
        """
        known = zip_longest(self.versions, versions_of(self.given_model))
        changed = sum(before != now for before, now in known)
        if world.gather(changed) != [0] * world.size:
            raise ConfigError(
                f"the network has changed since its statistics were collected ({changed} of {len(self.versions)} "
                f"tensors): call fit or compress again"
            )

    def planner(self, ranks: str | Plan, world: World) -> Planner:
        """For a rule as `--ranks` has it, or for a plan that there is already."""
        if isinstance(ranks, Plan):
            return follower(ranks, self.run, self.found, world)
        asked = replace(self.run.compression, ranks=ranks)
        return timed_planner(replace(self.run, compression=asked), self.model, self.found, world, self.image)


def collect(
    run: Run,
    given_model: nn.Module,
    outputs: Outputs | None,
    given: Kept,
    ranks: str | Plan | None,
    world: World,
    progress: bool | None,
) -> Collected:
    """One pass over the batches, and one more for channels.

    Args:
        run: the settings, with the rule that decides what the statistics are for.
        given_model: as it was given.
        outputs: what counts of what it returns.
        given: the batches.
        ranks: what will be asked for: refused before the work if it cannot be. None: not known yet.
        world: the ranks.
        progress: whether there is a bar.

    Raises:
        ValueError: in its many kinds, see `api.compress`.
    """
    basis, settings = run.compression.basis, run.correction
    model = given_model if given.packing is None else taking(given_model, given.packing)
    model = model if outputs is None else answering(model, outputs)
    world.require_same("the networks", fingerprint(model))
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        model = with_replaced(model)  # gradients need ordinary tensors
    pair = given.batches[0].images[:2].to(given.device)
    paddings = world.from_first(lambda: _asked(lambda: own_paddings(model, pair[:1]), given))
    model, closed = _opened(with_paddings(model, paddings), run.compression, ranks, given, world)
    everything = world.from_first(lambda: _asked(lambda: survey(model, pair[:1]), given))
    if basis.loss != "mse":
        everything.require_classes()
    if everything.concern and basis.loss != "mse" and outputs is None:
        warn(naming_arguments(everything.concern))
    images = _calibration(given, settings, run.seed)
    found = everything.select(run.compression.sites)
    image = pair[:1].clone()
    world.broadcast_(image)
    collected = Collected(
        run, given_model, model, everything, found, Statistics(), {}, given, images, image, progress
    )
    possible = removable_groups(model, found.sites, pair) if run.compression.removes_channels else Groups()
    collected = replace(collected, padding=tuple(paddings), versions=versions_of(given_model))
    collected = replace(collected, attention=closed, possible=possible)
    plans = collected.planner(run.compression.ranks if ranks is None else ranks, world)
    groups = possible.groups
    if groups and ranks is not None:
        require_reachable_widths(model, groups, plans, image)
    elif ranks is not None:
        plans.check()
    if basis.method == "gradient":
        world.on_all(lambda: _require_labels(given, everything))
    if settings.correct != "none":
        require_deterministic(model, pair, world)
    collected = _with_statistics(collected, plans.needs_patches, world)
    if not groups:
        return collected
    channels = channels_of(model, groups, images, collected.sums.curvature, run.seed, world, collected.measure)
    return replace(collected, channels=channels)


def _opened(
    model: nn.Module, settings: CompressionConfig, ranks: str | Plan | None, given: Kept, world: World
) -> tuple[nn.Module, dict[str, str]]:
    """With the attention taken apart that a plan is of, or whose heads may lose some; and why others stay."""
    if isinstance(ranks, Plan):
        return opened_for(model, ranks), {}
    if not settings.removes_channels:
        return model, {}
    image = given.batches[0].images[:1].to(given.device)

    def names() -> tuple[tuple[str, ...], dict[str, str]]:
        found = opened(model, image, settings.sites)
        return found.names, dict(found.closed)

    found, closed = world.from_first(lambda: _asked(names, given))
    return opened_as(model, found), closed


def _with_statistics(collected: Collected, patches: bool, world: World) -> Collected:
    """Of the network that is there."""
    run, model, found, given = collected.run, collected.model, collected.found, collected.given
    basis, passes = run.compression.basis, _Shown(len(given.batches), collected.progress, world)
    sums = statistics.collect(model, found.sites, collected.opened, world, basis, run.seed, passes, patches)
    for text in statistics.warnings(sums, found.sites, basis, given.total):
        warn(naming_arguments(text))
    bases = solve(model, found.sites, sums, basis, run.seed, world)
    return replace(collected, sums=sums, bases=bases, patches=patches, measured={}, narrow={})


def versions_of(model: nn.Module) -> tuple[int, ...]:
    """How often each parameter and buffer was changed in place; tensors of inference mode do not say."""
    tensors = chain(model.parameters(), model.buffers())
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _asked(ask: Callable[[], T], given: Kept) -> T:
    """What is found out by giving the network some of these images."""
    try:
        return ask()
    except (RuntimeError, TypeError) as error:
        what = given.packing or f"(n, {', '.join(map(str, given.batches[0].images.shape[1:]))})"
        raise BatchesError(
            f"the network does not take batches of {what}: {error}; if it takes several inputs, give batches that "
            f"are mappings of its keyword arguments, or say by `inputs` what it is called with"
        ) from error


def _calibration(given: Kept, settings: CorrectionConfig, seed: int) -> Calibration:
    """This rank's part of the images to solve from, and of the holdout; they are numbered again."""
    pixels, places = given.evenly(settings.calibrate_images)
    wanted = "--mirrored" if settings.mirrored else "--crops"
    views = views_of(settings, seed)
    if not views.whole and given.packing:
        raise ConfigError(f"{wanted}: the network takes several inputs ({given.packing}), expected images alone")
    if not views.whole and pixels.dim() != 4:
        raise ConfigError(f"{wanted}: images are {tuple(pixels.shape[1:])}, expected (channels, height, width)")
    return Calibration(pixels, places, torch.clone, given.size, views)


def _require_labels(given: Kept, everything: Survey) -> None:
    """Labels that are used must be outputs of the network."""
    highest, classes = max(int(batch.labels.max()) for batch in given.batches), everything.classes
    if everything.positions > 1:
        raise StatisticsError(
            f"method gradient: labels are of images, and the network has outputs at {everything.positions} "
            f"positions of each; expected another method"
        )
    if highest >= classes:
        raise StatisticsError(
            f"labels in batches go up to {highest}, the network's {classes} outputs to {classes - 1}"
        )


@dataclass(frozen=True)
class _Shown(Passes):
    """Passes over the images with a bar."""

    batches: int
    progress: bool | None
    world: World

    def watch(self, batches: Iterable[T], _sums: Mapping[str, Sums]) -> Iterable[T]:
        """See `Passes`."""
        with bar(self.batches, "statistics", "batch", self.progress, self.world.is_first) as step:
            for batch in batches:
                yield batch
                step()


def collect_again(collected: Collected, network: nn.Module, world: World) -> Collected:
    """The same of a network from which channels were removed."""
    everything = world.from_first(lambda: _asked(lambda: survey(network, collected.image), collected.given))
    found = everything.select(collected.run.compression.sites)
    narrow = replace(collected, model=network, everything=everything, found=found, channels=None)
    return _with_statistics(narrow, collected.patches, world)
