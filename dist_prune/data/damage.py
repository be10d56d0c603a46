"""Damaged images: looked for before a run, as a pipeline of DALI cannot skip one, and named after it failed."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from dist_prune.data.extents import Extent
from dist_prune.data.listing import DataError, brief

if TYPE_CHECKING:
    from dist_prune.data.dataset import Split
    from dist_prune.distributed.world import World

SIGNATURES = {  # how the files begin that DALI decodes
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"BM": "BMP",
    b"RIFF": "WebP",
    **dict.fromkeys((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), "TIFF"),
    **dict.fromkeys((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), "PNM"),
    **dict.fromkeys((b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51"), "JPEG 2000"),
}
PNG_END, SCAN_START, IMAGE_END = b"IEND", b"\xff\xda", b"\xff\xd9"
PIECE = 64  # images that a thread looks at in one go
SIZED = 8  # images of a split whose size is looked at before work


def check_files(split: Split, world: World, threads: int = 16) -> None:
    """Look at the ends of every file, a share on each rank: its size, signature and JPEG end marker.

    Raises DataError on all ranks, naming up to ten damaged files and how many there are. Decodes nothing.
    """
    _require_none(split, world, file_fault, threads)


def check_decoding(split: Split, world: World, threads: int = 16) -> None:
    """Decode every image, a share on each rank; raises as `check_files`."""
    _require_none(split, world, decode_fault, threads)


def _require_none(split: Split, world: World, check: Callable[[Extent], str | None], threads: int) -> None:
    mine = list(find_faults(split, range(world.rank, len(split), world.size), check, threads))
    faults = [fault for part in world.gather(mine) for fault in part]
    if faults:
        raise damaged(split, sorted(faults))


def damaged(split: Split, faults: list[str]) -> DataError:
    return DataError(f"{len(faults)} damaged in {split.root}: {brief(faults)}; replace or remove them")


def find_faults(
    split: Split,
    positions: Sequence[int],
    check: Callable[[Extent], str | None],
    threads: int = 16,
    deadline: float = math.inf,
) -> Iterator[str]:
    """Yield `name (reason)` for the images in which `check` finds a reason, until `deadline`, a monotonic time."""

    def faults_of(some: Sequence[int]) -> list[str]:
        looked = ((place, check(split.extent(place))) for place in some)
        return [f"{split.files[place]} ({reason})" for place, reason in looked if reason]

    pool = ThreadPoolExecutor(threads)
    pieces = [positions[start : start + PIECE] for start in range(0, len(positions), PIECE)]
    left = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
    try:
        with images_of_any_size(), suppress(TimeoutError):
            for faults in pool.map(faults_of, pieces, timeout=left):
                yield from faults
    finally:
        pool.shutdown(wait=math.isinf(deadline), cancel_futures=True)  # a file system may never answer


def file_fault(image: Extent) -> str | None:
    """What is wrong with an image by its first and last bytes; None where nothing is."""
    try:
        head, tail = image.ends()
        if not head:
            return "empty"
        kind = next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), "")
        if not kind or (kind == "WebP" and head[8:12] != b"WEBP"):
            return _foreign(head)
        # bytes may follow the picture, more than were read
        if kind in ENDS and not (ENDS[kind](tail) or ENDS[kind](image.read())):
            return f"truncated {kind}"  # DALI may crash on one
        return None
    except OSError as error:
        return f"unreadable, {error.strerror}"


def _foreign(head: bytes) -> str:
    """What a file is instead, as far as people give such names to them."""
    if head.startswith(b"GIF8"):
        return "a GIF, which DALI does not decode"
    if head[4:8] == b"ftyp":
        return f"{head[8:12].decode('ascii', 'replace').strip().upper()}, which DALI does not decode"
    if head.startswith(b"version https://"):
        return "a pointer of Git LFS: git lfs pull fetches the image"
    return f"not an image, starts with {head[:4]!r}"


def _jpeg_ends(data: bytes) -> bool:
    # an embedded thumbnail has an end marker too, but the picture's scan starts after it
    return data.rfind(IMAGE_END) > data.rfind(SCAN_START)


ENDS: Mapping[str, Callable[[bytes], bool]] = {"JPEG": _jpeg_ends, "PNG": lambda data: PNG_END in data}


def decode_fault(image: Extent) -> str | None:
    """Whether Pillow cannot decode an image."""
    try:
        with _opened(image) as opened:
            opened.load()
    except Exception as error:  # Pillow raises many kinds, struct.error and SyntaxError among them
        return f"cannot be decoded, {error}"
    return None


def size_fault(image: Extent, smallest: int) -> str | None:
    """Whether a side is shorter than `smallest` pixels, by the header; None also where that cannot be read."""
    with suppress(Exception), _opened(image) as opened:
        width, height = opened.size
        return None if min(opened.size) >= smallest else f"{width}×{height} pixels, need {smallest}"
    return None


def _opened(image: Extent) -> Image.Image:
    return Image.open(image.path if image.size < 0 else io.BytesIO(image.read()))


@contextmanager
def images_of_any_size() -> Iterator[None]:
    """While open, Pillow takes large images and long comments, as DALI does; its limits are against attackers."""
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = None, 2**30, 2**30
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


def require_size(split: Split, smallest: int) -> None:
    """Look at the headers of a few images, spread over the split: where one is too small, the crop is too large.

    Raises:
        DataError: names the flag.
    """
    some = range(0, len(split), max(1, len(split) // SIZED))
    if small := list(find_faults(split, some, partial(size_fault, smallest=smallest))):
        raise too_small(split, small)


def too_small(split: Split, small: list[str]) -> DataError:
    """The error of images that a crop does not fit into."""
    advice = "lower --crop, or enlarge images by --resize"
    return DataError(f"images of {split.root} are smaller than --crop: {brief(small, 3)}; {advice}")
