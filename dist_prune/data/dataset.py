"""Images as files: what a data set on disk is, and scikit-learn's digits.

The layout is ImageNet's: `train/<class>/*.jpg` and `val/<class>/*.jpg`. A flat folder of images without classes
is a split too, with every label −1.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dist_prune.data.extents import Archive, Extent
from dist_prune.data.listing import (
    ENDINGS,
    DataError,
    FolderListing,
    brief,
    left_out_text,
    read_class_list,
)
from dist_prune.data.shards import list_images_of

UNLABELLED = -1
DIGITS = 1797


@dataclass(frozen=True)
class Split:
    """One folder of images; `files` are relative to `root`, `labels` index `classes` (−1 without classes)."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    left_out: str = field(default="", compare=False)  # files that are no images that can be read, in words
    archive: Archive | None = field(default=None, repr=False, compare=False)  # of packed images

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
        return self.take(rng.permutation(rng.integers(edges[:-1], edges[1:])).tolist())

    def take(self, places: Sequence[int]) -> Split:
        """The images at these places, in this order."""
        files, labels = tuple(self.files[i] for i in places), tuple(self.labels[i] for i in places)
        return replace(self, files=files, labels=labels, archive=self.archive and self.archive.take(places))

    def without(self, others: Split) -> Split:
        """The images that `others`, of the same folder, does not have."""
        left_out = {*others.files}
        return self.take([place for place, name in enumerate(self.files) if name not in left_out])

    def extent(self, place: int) -> Extent:
        """Where the bytes of an image are."""
        return self.archive.extent(self.root, place) if self.archive else Extent(self.root / self.files[place])


@dataclass(frozen=True)
class Dataset:
    """The two splits of a data set, with the network's classes; `notes` say what is not as one might think."""

    train: Split
    val: Split
    notes: tuple[str, ...] = ()


def list_images(root: Path, classes: Sequence[str] | None = None) -> Split:
    """List the images below `root`: in class folders, at any depth there, or directly in it, without labels.

    Labels follow the sorted folder names, or `classes` where given (the folders may then be a subset of it).
    Raises DataError for a folder that is absent, empty, mixed, or not in `classes`.
    """
    found = list_images_of(root)
    _require_one_kind(found)
    if found.loose:
        return _unlabelled(found, ())
    names = tuple(found.folders if classes is None else classes)
    if unknown := sorted(found.folders.keys() - set(names)):
        raise DataError(f"{root} has class folders that are not in the class list: {brief(unknown)}")
    return _labelled(found, names)


def list_unlabelled(root: Path) -> Split:
    """List the images below `root`, at any depth, without labels; hidden files and folders are skipped.

    Raises DataError for a folder that is absent or has no images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one with images, at any depth")
    found = _unlabelled(list_images_of(root), ())
    if not found.files:
        raise DataError(
            f"no images in {root}, at any depth: expected names ending in {brief(sorted(ENDINGS), len(ENDINGS))}"
            f"{f'; {found.left_out}' * bool(found.left_out)}"
        )
    return found


def open_dataset(
    folder: Path, class_list: Path | None = None, outputs: int = 0, labelled: bool = True, train: bool = True
) -> Dataset:
    """List `folder`/train and `folder`/val. Classes come from one list, and either may lack images of some.

    The list is `class_list`; without it train's folders, or those of both if only these are as many as the network
    has outputs; where training images need no labels, val's folders before either, if they are as many.

    Args:
        folder: of the data set.
        class_list: see `listing.read_class_list`.
        outputs: of the network; 0: not known.
        labelled: whether training images are used with their labels. Otherwise their folders may have any names.
        train: whether training images are used at all; otherwise train/ may be absent.

    Raises:
        DataError: a folder or images are absent, or folders are not among the classes.
    """
    for part in (folder, *([folder / "train"] if train else []), folder / "val"):
        if not part.is_dir():
            layout = f"{folder}/{{train,val}}/<class>/*.jpg"
            raise DataError(f"{part} is not a folder: expected {layout}, or MNIST's idx files in {folder}")
    here = FolderListing(folder / "train", (), {}, {})
    found, validation = list_images_of(folder / "train") if train else here, list_images_of(folder / "val")
    for listing in (found, validation) if labelled else (validation,):
        _require_class_folders(listing)
    if train and not found.images:
        raise DataError(_no_images(found))
    classes = read_class_list(class_list) if class_list else _choose_classes(found, validation, outputs, labelled)
    strangers = {part.root.name: _strangers(part, classes) for part in (found, validation)}
    if class_list:
        for listing in (found, validation) if labelled else (validation,):
            _require_listed(listing, strangers[listing.root.name], classes, class_list)
    anonymous = not labelled and (found.loose or strangers["train"])
    splits = (
        _unlabelled(found, classes) if anonymous else _labelled(found, classes),
        _labelled(validation, classes),
    )
    if not splits[1].files:
        raise DataError(f"{_no_images(validation)}, in a class of train/ or of --class-list")
    return Dataset(*splits, tuple(_notes(splits, strangers, bool(anonymous))))


def _require_one_kind(found: FolderListing) -> None:
    if found.loose and found.folders:
        first = next(iter(found.folders))
        raise DataError(f"{found.root} has images ({found.loose[0]}) and folders ({first}): keep one kind")


def _require_class_folders(found: FolderListing) -> None:
    _require_one_kind(found)
    if found.loose:
        raise DataError(f"{found.root} has images but no class folders: expected {found.root}/<class>/")
    if not found.images:
        raise DataError(_no_images(found))


def _no_images(found: FolderListing) -> str:
    left = left_out_text(found.root, found.left_out)
    endings = brief(sorted(ENDINGS), len(ENDINGS))
    return f"no images in {found.root}: expected <class>/*, ending in {endings}{f'; {left}' * bool(left)}"


def _choose_classes(train: FolderListing, val: FolderListing, outputs: int, labelled: bool) -> tuple[str, ...]:
    own = tuple(train.folders) or tuple(val.folders)
    every = tuple(sorted({*map(_spelling, own), *map(_spelling, val.folders)}))
    measured = [] if labelled else [tuple(val.folders)]  # whose labels alone are used
    for names in (*measured, own, every):
        if len(names) == outputs:
            return names
    return own


def _spelling(name: str) -> str:
    """One spelling of letters with accents, of which file systems and editors know two."""
    return unicodedata.normalize("NFC", name)


def _strangers(found: FolderListing, classes: Sequence[str]) -> list[str]:
    """Folders with images that are no class."""
    known = set(map(_spelling, classes))
    return [name for name, images in found.folders.items() if images and _spelling(name) not in known]


def _require_listed(
    found: FolderListing, strangers: Sequence[str], classes: Sequence[str], class_list: Path
) -> None:
    if strangers:
        raise DataError(
            f"{found.root} has class folders that are not in the class list: {brief(strangers)}; {class_list} "
            f"begins with {brief(list(map(repr, classes)), 3)}: expected one folder's name per line, in the "
            f"order of the network's outputs"
        )


def _labelled(found: FolderListing, classes: Sequence[str]) -> Split:
    """The images of the folders that are classes, in the order of the classes."""
    order = {_spelling(name): label for label, name in enumerate(classes)}
    folders = sorted((order[_spelling(n)], images) for n, images in found.folders.items() if _spelling(n) in order)
    files = tuple(image for _, images in folders for image in images)
    labels = tuple(label for label, images in folders for _ in images)
    return _split(found, classes, files, labels)


def _unlabelled(found: FolderListing, classes: Sequence[str]) -> Split:
    return _split(found, classes, found.images, (UNLABELLED,) * len(found.images))


def _split(found: FolderListing, classes: Sequence[str], files: tuple[str, ...], labels: tuple[int, ...]) -> Split:
    left_out = left_out_text(found.root, found.left_out)
    return Split(found.root, tuple(classes), files, labels, left_out, found.archive_of(files))


def _notes(splits: Sequence[Split], strangers: Mapping[str, Sequence[str]], anonymous: bool) -> Iterator[str]:
    """What is not as one might think."""
    train, val = splits
    yield from filter(None, (split.left_out for split in splits))
    for split in (val,) if anonymous or not train.files else splits:
        seen = set(split.labels)
        if lacking := [name for label, name in enumerate(split.classes) if label not in seen]:
            count = f"{len(lacking):,} of {len(split.classes):,}"
            yield f"{split.root} has no images of {count} classes: {brief(lacking)}"
    if anonymous:
        yield f"{train.root}: its images are used without labels, as its folders are not the network's classes"
    if strangers["val"]:
        names = brief(strangers["val"])
        yield f"{val.root}: folders that are no classes of {train.root} are left out: {names}"


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
