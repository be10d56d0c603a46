"""Images as files: what a data set on disk is, whether its files are sound, and scikit-learn's digits.

The layout is ImageNet's: `train/<class>/*.jpg` and `val/<class>/*.jpg`. A flat folder of images without classes
is a split too, with every label −1.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from dist_prune.distributed.world import World

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"P3", b"P6", b"P2", b"P5")
PNG, PNG_END = SIGNATURES[1], b"IEND"
JPEG, SCAN_START, IMAGE_END = SIGNATURES[0], b"\xff\xda", b"\xff\xd9"
UNLABELLED = -1
DIGITS = 1797


class DataError(ValueError):
    """The images on disk, or what was asked of them, cannot be used as they are."""


@dataclass(frozen=True)
class Split:
    """One folder of images; `files` are relative to `root`, `labels` index `classes` (−1 without classes)."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """Identify the list (classes, file names, labels; neither the root nor the pixels) by a SHA-256."""
        listing = repr((self.classes, self.files, self.labels))
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def subset(self, count: int, seed: int) -> Split:
        """Choose `count` images without replacement, spread evenly over the classes, in a shuffled order."""
        if not 1 <= count <= len(self):
            raise DataError(f"asked for {count} of {len(self)} images in {self.root}: lower the number")
        rng = np.random.default_rng(seed)
        edges = np.arange(count + 1) * len(self) // count  # one image from each of `count` equal stretches
        chosen = rng.permutation(rng.integers(edges[:-1], edges[1:])).tolist()
        files, labels = tuple(self.files[i] for i in chosen), tuple(self.labels[i] for i in chosen)
        return replace(self, files=files, labels=labels)


@dataclass(frozen=True)
class Dataset:
    """The two splits of a data set, with the same classes."""

    train: Split
    val: Split


def list_images(root: Path, classes: Sequence[str] | None = None) -> Split:
    """List the images below `root`: in class folders, or directly in it, without labels.

    Labels follow the sorted folder names, or `classes` where given (the folders may then be a subset of it).
    Raises DataError for a folder that is absent, empty, mixed, or not in `classes`.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one of images, or of class folders with images")
    loose = _images_in(root)
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if loose and folders:
        raise DataError(f"{root} has images ({loose[0]}) and folders ({folders[0]}): keep one kind")
    if loose:
        return Split(root, (), tuple(loose), (UNLABELLED,) * len(loose))
    return _list_classes(root, folders, tuple(folders if classes is None else classes))


def list_unlabelled(root: Path) -> Split:
    """List the images below `root`, at any depth, without labels; hidden files and folders are skipped.

    Raises DataError for a folder that is absent or has no images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one with images, at any depth")
    below = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    files = sorted(str(path) for path in below if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise DataError(f"no images in {root}, at any depth: expected names ending in {_brief(sorted(ENDINGS))}")
    return Split(root, (), tuple(files), (UNLABELLED,) * len(files))


def open_dataset(folder: Path, class_list: Path | None = None) -> Dataset:
    """List `folder`/train and `folder`/val, which must have the same class folders.

    `class_list` is a text file with one class folder per line, in the order of the labels. Raises DataError.
    """
    for part in (folder, folder / "train", folder / "val"):
        if not part.is_dir():
            layout = f"{folder}/{{train,val}}/<class>/*.jpg"
            raise DataError(f"{part} is not a folder: expected {layout}, or MNIST's idx files in {folder}")
    classes = None if class_list is None else _read_classes(class_list)
    train, val = (list_images(folder / part, classes) for part in ("train", "val"))
    for split in (train, val):
        if not split.classes:
            raise DataError(f"{split.root} has images but no class folders: expected {split.root}/<class>/")
    _require_same_classes(train, val)
    return Dataset(train, val)


def _images_in(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    return sorted(name for name in names if not name.startswith("."))


def _list_classes(root: Path, folders: list[str], classes: tuple[str, ...]) -> Split:
    if unknown := sorted(set(folders) - set(classes)):
        raise DataError(f"{root} has folders that are not in the class list: {_brief(unknown)}; remove them")
    found = {name: _images_in(root / name) for name in sorted(folders, key=classes.index)}
    if empty := [name for name, images in found.items() if not images]:
        raise DataError(f"{root} has class folders without images: {_brief(empty)}; fill or remove them")
    if not found:
        raise DataError(f"no images in {root}: expected <class>/*, ending in {_brief(sorted(ENDINGS))}")
    files = tuple(f"{name}/{image}" for name, images in found.items() for image in images)
    labels = tuple(label for label, name in enumerate(classes) for _ in found.get(name, ()))
    return Split(root, classes, files, labels)


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"class list {path} is not a file: expected text with one class folder per line")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"class list {path} has lines twice: {_brief(twice)}; a line number is a label")
    return tuple(names)


def _require_same_classes(train: Split, val: Split) -> None:
    left, right = ({file.partition("/")[0] for file in split.files} for split in (train, val))
    if left != right:
        where = f"only in train: {_brief(sorted(left - right))}; only in val: {_brief(sorted(right - left))}"
        raise DataError(f"class folders below {train.root.parent} differ: {where}; expected the same in both")


def _brief(names: Sequence[str], limit: int = 10) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest


# Damaged files. A pipeline cannot skip one, so they are looked for before, and named after it failed.


def check_files(split: Split, world: World, threads: int = 16) -> None:
    """Look at the ends of every file, a share on each rank: its size, signature and JPEG end marker.

    Raises DataError on all ranks, naming up to ten damaged files and how many there are. Decodes nothing.
    """
    mine = list(find_faults(split, range(world.rank, len(split), world.size), file_fault, threads))
    faults = [fault for part in world.gather(mine) for fault in part]
    if faults:
        raise damaged(split, sorted(faults))


def damaged(split: Split, faults: list[str]) -> DataError:
    return DataError(f"{len(faults)} damaged in {split.root}: {_brief(faults)}; replace or remove them")


def find_faults(
    split: Split, positions: range, check: Callable[[Path], str | None], threads: int = 16
) -> Iterator[str]:
    """Yield `name (reason)` for the files in which `check` finds a reason."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(positions), 4096):  # in pieces: a million pending futures are a gigabyte
            files = [split.files[i] for i in positions[start : start + 4096]]
            reasons = pool.map(check, [split.root / file for file in files])
            yield from (f"{file} ({reason})" for file, reason in zip(files, reasons, strict=True) if reason)


def file_fault(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(max(0, path.stat().st_size - 4096))
            if not head:
                return "empty"
            if not head.startswith(SIGNATURES):
                return f"not an image, starts with {head[:4]!r}"
            tail = file.read()
            if head.startswith(JPEG) and not (_jpeg_ends(tail) or _jpeg_ends(path.read_bytes())):
                return "truncated JPEG"
            if head.startswith(PNG) and PNG_END not in tail:  # DALI may crash on one
                return "truncated PNG"
            return None
    except OSError as error:
        return f"unreadable, {error.strerror}"


def _jpeg_ends(data: bytes) -> bool:
    # an embedded thumbnail has an end marker too, but the picture's scan starts after it
    return data.rfind(IMAGE_END) > data.rfind(SCAN_START)


def decode_fault(path: Path, smallest: int) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
            return None if min(image.size) >= smallest else f"{width}×{height} pixels, need {smallest}"
    except Exception as error:  # Pillow raises many kinds, struct.error and SyntaxError among them
        return f"cannot be decoded, {error}"


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's 1,797 digits as 32×32 JPEG into `folder`/{train,val}/{0…9}, about 80:20.

    Does nothing where they are; several processes may call it at once. DataError if `folder` holds other images.
    """
    if not _has_digits(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _draw_digits(scratch)
            scratch.chmod(0o755)
            scratch.rename(folder)
        except OSError:
            if not _has_digits(folder):  # nobody else was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _has_digits(folder: Path) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    data = open_dataset(folder)
    if len(data.train) + len(data.val) != DIGITS or len(data.train.classes) != 10:
        raise DataError(f"{folder} holds other images than the {DIGITS} digits: name another folder")
    return True


def _draw_digits(folder: Path) -> None:
    digits = importlib.import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(DIGITS)
    for label in range(10):
        chosen = [i for i in order if digits.target[i] == label]
        for place, i in enumerate(chosen):
            path = folder / ("val" if place < len(chosen) // 5 else "train") / str(label) / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((digits.images[i] * (255 / 16)).round().astype(np.uint8))
            grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(path, quality=95)
