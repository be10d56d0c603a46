"""Which images were found sound before: both ends of 1.3 million files need not be looked at before every run.

A verdict is of a list of images in a place, and of when its folders last got, lost or renamed a file. What is
written into a file that stays is not seen: a stream that fails on it names it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dist_prune.utils import files

if TYPE_CHECKING:
    from dist_prune.data.dataset import Split


def is_known_sound(split: Split) -> bool:
    """Whether an earlier run looked at these images, and found nothing."""
    return _verdict(split).is_file()


def keep_sound(split: Split) -> None:
    """Remember that nothing was found; where the cache cannot be written, the next run looks again."""
    with suppress(files.CheckpointError):
        files.write_text(_verdict(split), f"{len(split):,} images in {split.root}: both ends of each were sound\n")


def _verdict(split: Split) -> Path:
    folders = sorted({name.rpartition("/")[0] for name in split.files}) if split.archive is None else [""]
    changed = [os.stat(split.root / folder).st_mtime_ns for folder in folders]  # noqa: PTH116  thousands of them
    key = [os.path.realpath(split.root), split.digest(), *map(str, changed)]
    name = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()
    return files.cache_folder() / "sound" / f"{name[:32]}.txt"
