"""Images from folders: what a data set is, whether its files are sound, and DALI streams of batches.

The layout is ImageNet's: `train/<class>/*.jpg` and `val/<class>/*.jpg`. A flat folder of images is a split too,
with every label −1.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline

    from dist_prune.world import World

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"P3", b"P6", b"P2", b"P5")
JPEG, SCAN_START, IMAGE_END = SIGNATURES[0], b"\xff\xda", b"\xff\xd9"
UNLABELLED = -1
DIGITS = 1797


class DataError(ValueError):
    """The images on disk, or what was asked of them, cannot be used as they are."""


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes a tensor: `resize` the shorter side, cut `crop`×`crop`, normalise RGB/255.

    `resize` and `crop` are pixels; `resize=0` keeps the size, and no image may then be smaller than `crop`.
    Resizing is bilinear with antialiasing, as torchvision does it on PIL images.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.crop < 1 or (self.resize != 0 and self.resize < self.crop):
            got = f"resize={self.resize}, crop={self.crop}"
            raise DataError(f"{got}: expected crop ≥ 1, and resize ≥ crop or resize=0 to keep sizes")


@dataclass(frozen=True)
class Augment:
    """Random changes while training; `flip` mirrors half of the pictures left to right.

    Where the spec resizes, the crop has an `area` (share of the picture) and a `ratio` (width/height) between
    two bounds. Where it does not, the picture gets a black border of `pad` pixels and a crop anywhere in it.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    flip: bool = True


AUGMENT = Augment()


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


@dataclass(frozen=True)
class Batch:
    """N images: (N, 3, H, W), their labels (N,) and their positions in the split's files (N,), both int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


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


def open_dataset(folder: Path, class_list: Path | None = None) -> Dataset:
    """List `folder`/train and `folder`/val, which must have the same class folders.

    `class_list` is a text file with one class folder a line, in the order of the labels. Raises DataError.
    """
    for part in (folder, folder / "train", folder / "val"):
        if not part.is_dir():
            raise DataError(f"{part} is not a folder: expected {folder}/{{train,val}}/<class>/*.jpg")
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
        raise DataError(f"class list {path} is not a file: expected text with one class folder a line")
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
    mine = list(_faults(split, range(world.rank, len(split), world.size), _file_fault, threads))
    faults = [fault for part in world.gather(mine) for fault in part]
    if faults:
        raise _damaged(split, sorted(faults))


def _damaged(split: Split, faults: list[str]) -> DataError:
    return DataError(f"{len(faults)} damaged in {split.root}: {_brief(faults)}; replace or remove them")


def _faults(
    split: Split, positions: range, check: Callable[[Path], str | None], threads: int = 16
) -> Iterator[str]:
    """Yield `name (reason)` for the files in which `check` finds a reason."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(positions), 4096):  # in pieces: a million pending futures are a gigabyte
            files = [split.files[i] for i in positions[start : start + 4096]]
            reasons = pool.map(check, [split.root / file for file in files])
            yield from (f"{file} ({reason})" for file, reason in zip(files, reasons, strict=True) if reason)


def _file_fault(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(max(0, path.stat().st_size - 4096))
            if not head:
                return "empty"
            if not head.startswith(SIGNATURES):
                return f"not an image, starts with {head[:4]!r}"
            whole = not head.startswith(JPEG) or _jpeg_ends(file.read()) or _jpeg_ends(path.read_bytes())
            return None if whole else "truncated JPEG"
    except OSError as error:
        return f"unreadable, {error.strerror}"


def _jpeg_ends(data: bytes) -> bool:
    # an embedded thumbnail has an end marker too, but the picture's scan starts after it
    return data.rfind(IMAGE_END) > data.rfind(SCAN_START)


def _decode_fault(path: Path, smallest: int) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
            return None if min(image.size) >= smallest else f"{width}×{height} pixels, need {smallest}"
    except Exception as error:  # Pillow raises many kinds, struct.error and SyntaxError among them
        return f"cannot be decoded, {error}"


# Streams


def normalise(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """(N, 3, H, W) uint8 → (N, 3, H, W) float32: (pixels/255 − mean)/std, on the device of `pixels`."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std


@dataclass(eq=False)
class Stream:
    """One rank's share of a split; iterating gives one epoch of normalised batches, `raw` the same as uint8.

    An evaluation epoch (`augment` is None) always starts from the beginning. A training epoch that was left
    early goes on where it was left, as a restored one does. A damaged file raises a DataError that names it.
    """

    split: Split
    spec: ImageSpec
    world: World
    batch_size: int
    threads: int
    seed: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if min(self.batch_size, self.threads) < 1:
            raise DataError(f"batch size {self.batch_size}, {self.threads} threads: expected 1 or more")
        count, ranks = len(self.split), self.world.size
        if count < ranks:
            raise DataError(f"{count} images in {self.split.root} for {ranks} ranks: use at most {count} ranks")
        self._labels = torch.tensor(self.split.labels)
        self._position = 0  # batches of this epoch already delivered
        self._checkpoint: str | None = None
        self._iterator: Any = None

    def __len__(self) -> int:
        """Count the batches of an epoch: the same on every rank."""
        return math.ceil(math.ceil(len(self.split) / self.world.size) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.raw():
            yield replace(batch, images=normalise(batch.images, self.spec))

    def raw(self) -> Iterator[Batch]:
        """Iterate over an epoch of batches whose images are uint8."""
        self._begin()
        while self._position < len(self):
            batch = self._next()
            self._position += 1  # before the yield, so that a state taken inside the loop counts this batch
            yield batch

    def state(self) -> dict[str, Any]:
        """Describe where this rank of a training stream stands, after the last batch, in plain types."""
        if self._iterator is None:
            self._open()
        return self._identity | {"position": self._position, "dali": self._iterator.checkpoints()[0]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from this rank's `state`; DataError if it is of other images, ranks, seed or batch size."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(f"cannot resume: {name} was {state.get(name)} and is {value}; keep it")
        self._position, self._checkpoint, self._iterator = state["position"], state["dali"], None

    @cached_property
    def _identity(self) -> dict[str, Any]:  # from another one DALI would read wrong images, without a word
        shard = {"ranks": self.world.size, "rank": self.world.rank, "batch_size": self.batch_size}
        return shard | {"images": self.split.digest(), "seed": self.seed}

    def _begin(self) -> None:
        if self.augment is None and self._position < len(self):
            self._iterator, self._position = None, 0  # DALI cannot rewind within an epoch
        if self._iterator is None:
            self._open()
        if self._position == len(self):
            self._iterator.reset()
            self._position = 0

    def _open(self) -> None:
        dali, plugin = _dali()
        policy = plugin.LastBatchPolicy.FILL if self.augment else plugin.LastBatchPolicy.PARTIAL
        self._iterator = plugin.DALIGenericIterator(
            self._pipeline(dali),
            ["pixels", "indices"],
            reader_name="reader",
            last_batch_policy=policy,
            prepare_first_batch=False,  # or a damaged file would raise here
        )

    def _pipeline(self, dali: ModuleType) -> Pipeline:
        device, on_cpu = self.world.device, self.world.device.type == "cpu"
        own = np.random.SeedSequence([self.seed, self.world.rank]).generate_state(1)
        pipeline = dali.Pipeline(
            self.batch_size,
            self.threads,
            None if on_cpu else self.world.local_rank if device.index is None else device.index,
            seed=int(own[0]),
            enable_checkpointing=self.augment is not None,
            checkpoint=self._checkpoint,
        )
        with pipeline:
            encoded, indices = self._read(dali)
            decoder = _Decoder(dali, self.spec, "cpu" if on_cpu else "mixed")
            pixels = decoder.augmented(encoded, self.augment) if self.augment else decoder.centred(encoded)
            pipeline.set_outputs(pixels, indices)
        return cast("Pipeline", pipeline)

    def _read(self, dali: ModuleType) -> tuple[DataNode, DataNode]:
        """Read encoded files and their positions; these options are what brings each image exactly once."""
        training = self.augment is not None
        # despite its name the option shuffles the first epoch too; ranks agree on the order by its seed
        shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": self.seed} if training else {}
        encoded, indices = dali.fn.readers.file(
            name="reader",
            file_root=str(self.split.root),
            files=list(self.split.files),
            labels=list(range(len(self.split))),
            shard_id=self.world.rank,
            num_shards=self.world.size,
            stick_to_shard=not training,
            pad_last_batch=True,
            dont_use_mmap=True,  # a mapped file kills the process when a network file system hiccups
            **shuffle,
        )
        return encoded, indices

    def _next(self) -> Batch:
        try:
            parts = next(self._iterator)[0]
        except RuntimeError as error:
            raise self._explain(error) from error
        indices, device = parts["indices"].flatten().long(), self.world.device
        images = parts["pixels"].permute(0, 3, 1, 2).contiguous()
        return Batch(images, self._labels[indices].to(device), indices.to(device))

    def _explain(self, error: RuntimeError) -> Exception:
        """Find the file that DALI stumbled over, as its message may not name it; else return `error`."""
        count, size, rank = len(self.split), self.world.size, self.world.rank
        shard = range(count * rank // size, count * (rank + 1) // size)
        seen = range(count) if self.augment else shard  # training shards move with every epoch
        decode = partial(_decode_fault, smallest=0 if self.spec.resize else self.spec.crop)
        faults = list(_faults(self.split, seen, _file_fault))
        if not faults:  # the first is enough: decoding everything takes too long
            faults = list(islice(_faults(self.split, seen, decode), 1))
        return _damaged(self.split, faults) if faults else error


def training_stream(
    split: Split,
    spec: ImageSpec,
    world: World,
    batch_size: int,
    threads: int,
    seed: int,
    augment: Augment = AUGMENT,
) -> Stream:
    """Stream shuffled, augmented batches, all of `batch_size`: the last of an epoch repeats its last image.

    Equal seeds give equal batches; the order is new in every epoch, the random crops differ between ranks.
    """
    return Stream(split, spec, world, batch_size, threads, seed, augment)


def evaluation_stream(split: Split, spec: ImageSpec, world: World, batch_size: int, threads: int) -> Stream:
    """Stream every image exactly once over all ranks, the same ones to a rank in each epoch.

    Every rank gets equally many batches, so that collectives match; the last ones may be short, or of size 0.
    """
    return Stream(split, spec, world, batch_size, threads)


def _dali() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.plugin.pytorch")
    except ImportError as error:
        raise ImportError("reading images needs NVIDIA DALI: install nvidia-dali-cuda120") from error


@dataclass(frozen=True)
class _Decoder:
    """Encoded files → HWC uint8, as nodes of a DALI graph."""

    dali: ModuleType
    spec: ImageSpec
    place: str

    def centred(self, encoded: DataNode) -> DataNode:
        """Resize and cut as torchvision's Resize + CenterCrop: sizes floored, corners rounded to even."""
        sides, pixels = self._sides(encoded), self._decode(self.dali.fn.decoders.image, encoded)
        if self.spec.resize:
            sides = sides * self.spec.resize // self.dali.fn.reductions.min(sides)
            pixels = self._resized(pixels, self.dali.fn.cast(sides, dtype=self.dali.types.FLOAT))
        spare = sides - self.spec.crop
        half = spare // 2
        return self._cut(pixels, half + (spare - 2 * half) * (half - half // 2 * 2))

    def augmented(self, encoded: DataNode, augment: Augment) -> DataNode:
        """Cut at random: an area of any size where the spec resizes, else a shift over a black border."""
        fn, crop = self.dali.fn, self.spec.crop
        if self.spec.resize:
            area, ratio = list(augment.area), list(augment.ratio)
            cut = partial(fn.decoders.image_random_crop, random_area=area, random_aspect_ratio=ratio)
            pixels = self._resized(self._decode(cut, encoded), [crop, crop])
        else:
            places = self._sides(encoded) + (2 * augment.pad - crop + 1)
            place = self.dali.math.floor(fn.random.uniform(range=[0.0, 1.0], shape=[2]) * places)
            pixels = self._cut(
                self._decode(fn.decoders.image, encoded), place - augment.pad, out_of_bounds_policy="pad"
            )
        return fn.flip(pixels, horizontal=fn.random.coin_flip()) if augment.flip else pixels

    def _sides(self, encoded: DataNode) -> DataNode:
        fn = self.dali.fn
        return cast("DataNode", fn.slice(fn.peek_image_shape(encoded, adjust_orientation=False), 0, 2, axes=[0]))

    def _decode(self, decoder: Callable[..., DataNode], encoded: DataNode) -> DataNode:
        # as Pillow does: not turned by EXIF, chroma smoothed
        like_pillow = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
        return decoder(encoded, device=self.place, output_type=self.dali.types.RGB, **like_pillow)

    def _resized(self, pixels: DataNode, size: DataNode | list[int]) -> DataNode:
        how = {"interp_type": self.dali.types.INTERP_LINEAR, "antialias": True, "subpixel_scale": False}
        return cast("DataNode", self.dali.fn.resize(pixels, size=size, **how))

    def _cut(self, pixels: DataNode, corner: DataNode, **policy: str) -> DataNode:
        start, side = self.dali.fn.cast(corner, dtype=self.dali.types.INT32), self.spec.crop
        cut = self.dali.fn.slice(pixels, start=start, shape=[side, side], axes=[0, 1], **policy)
        return cast("DataNode", cut)


# Digits


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
