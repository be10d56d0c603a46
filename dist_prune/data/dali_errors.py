"""What a pipeline of DALI failed of: memory, the device, the file system, or an image, which it may not name."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import torch

from dist_prune.config.images import ImageSpec
from dist_prune.data.damage import damaged, decode_fault, file_fault, find_faults, size_fault, too_small
from dist_prune.data.dataset import Split
from dist_prune.data.listing import DataError

SCAN_S = 60.0  # for which a damaged image is looked for, while all other ranks wait
# The words of DALI's and CUDA's own messages where no image is to blame.
MEMORY = re.compile(r"out of memory|bad_alloc|\balloc|MemoryAllocation", re.IGNORECASE)
DEVICE = re.compile(r"\bcuda|\bcufile|\bnvml|\bdriver\b", re.IGNORECASE)
READING = re.compile(
    r"failed to read|read(at)? operation failed|i/o (error|operation)|input/output|stale file|permission denied"
    r"|too many open files|no such file|(could not|cannot|failed to) open",
    re.IGNORECASE,
)
READER = re.compile(r"operator `[\w.]*\breaders\.")


@dataclass(frozen=True)
class Cause:
    """What of: an image, unless the message says something else; and DALI's text without its surroundings."""

    kind: Literal["memory", "device", "reading", "image"]
    text: str


def cause_of(error: RuntimeError) -> Cause:
    """What DALI's message is about."""
    whole = str(error)
    text = whole.rpartition("encountered:")[2]
    text = re.split(r"\n(?:C\+\+ context|Stacktrace|Current pipeline object)", text)[0].strip()
    if MEMORY.search(text):
        return Cause("memory", text)
    if READER.search(whole) or READING.search(text):
        return Cause("reading", text)
    return Cause("device" if DEVICE.search(text) else "image", text)


def explain(error: RuntimeError, split: Split, spec: ImageSpec, positions: Sequence[int]) -> Exception:
    """The error to raise instead of DALI's; only where an image is to blame it is looked for, for a limited time.

    Args:
        error: of a pipeline.
        split: that it read.
        spec: of the images.
        positions: in the split, of images that may have been read, the most likely first.
    """
    cause = cause_of(error)
    if cause.kind == "memory":
        return torch.OutOfMemoryError(f"DALI: {cause.text}")
    if cause.kind == "device":
        return RuntimeError(f"DALI: {cause.text}")
    if cause.kind == "reading":
        return OSError(f"{split.root}: DALI could not read there, see the file system: {cause.text}")
    return find_damage(split, spec, positions) or DataError(
        f"DALI failed on an image of {split.root}, and Pillow, in up to {SCAN_S:g} s, on none: {cause.text}"
    )


def find_damage(split: Split, spec: ImageSpec, positions: Sequence[int]) -> DataError | None:
    """The damaged files among these: by their ends all, by their size or by decoding the first."""
    deadline = time.monotonic() + SCAN_S
    if faults := list(find_faults(split, positions, file_fault, deadline=deadline)):
        return damaged(split, faults)
    if not spec.resize:
        fits = partial(size_fault, smallest=spec.crop)
        if small := list(islice(find_faults(split, positions, fits, deadline=deadline), 1)):
            return too_small(split, small)
    undecoded = list(islice(find_faults(split, positions, decode_fault, deadline=deadline), 1))
    return damaged(split, undecoded) if undecoded else None
