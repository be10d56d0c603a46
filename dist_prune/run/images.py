"""The images of a run: opened, and what is wrong with them found before work."""

from __future__ import annotations

from pathlib import Path

from dist_prune.config.flags import ConfigError
from dist_prune.config.run import Run
from dist_prune.correction.correct import FEWEST
from dist_prune.data.damage import check_files, require_size
from dist_prune.data.dataset import Dataset, Split, list_unlabelled, open_dataset, write_digits
from dist_prune.data.mnist import has_idx, unpack
from dist_prune.data.verdicts import is_known_sound, keep_sound
from dist_prune.distributed.world import World
from dist_prune.utils import files


def open_images(config: Run) -> Dataset:
    """The data set that `--data` names."""
    if config.images.data == "digits":
        with files.caching() as cache:
            return open_dataset(write_digits(cache / "digits"))
    folder = Path(config.images.data)
    if has_idx(folder):
        with files.caching() as cache:
            folder = unpack(folder, cache)
    needs_train = config.needs_labels or config.correction.calibrate_data is None
    return open_dataset(folder, config.images.class_list, config.network.classes, config.needs_labels, needs_train)


def open_unlabelled(config: Run) -> Split | None:
    """The images that `--calibrate-data` names."""
    folder = config.correction.calibrate_data
    return None if folder is None else list_unlabelled(folder)


def check_images(config: Run, split: Split, world: World, again: bool = False) -> None:
    """Look at both ends of every file, and at the size of some.

    Unless `again`, not at what was found sound before: by an earlier run, or when images were packed.

    Raises:
        DataError: on all ranks; see `check_files` and `require_size`.
    """
    trusted = not again and (config.skip_check or split.archive is not None)
    if not trusted and (again or not world.from_first(lambda: is_known_sound(split))):
        check_files(split, world)
        world.from_first(lambda: keep_sound(split))
    if not config.images.image.resize:
        world.from_first(lambda: require_size(split, config.images.image.crop))


def notes_on(dataset: Dataset, unlabelled: Split | None) -> list[str]:
    """What is not as one might think of the images."""
    return [*dataset.notes, *([unlabelled.left_out] if unlabelled and unlabelled.left_out else [])]


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


def require_calibration(config: Run, split: Split) -> None:
    """Some of the images to correct from are held out, the others are solved from: there must be both.

    Raises:
        ConfigError: there are too few.
    """
    used = config.keeps_to_dense and (config.correction.correct != "none" or config.correction.reestimate_bn)
    if used and len(split) < FEWEST:
        where = "--calibrate-data" if config.correction.calibrate_data else "--data"
        raise ConfigError(
            f"{where}: {len(split)} images in {split.root} to correct from, expected at least {FEWEST}, better "
            f"hundreds: every eighth is held out; or use --correct none"
        )
