"""MNIST's idx files, unpacked once into the layout that is read: `train/<label>/*.png` and `val/<label>/*.png`.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, the type (8: uint8), the number of dimensions, each
dimension as a big-endian 32-bit number, then the values. The values are kept exactly: PNG is lossless.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_prune.data.listing import DataError

PARTS = {"train": "train", "val": "t10k"}  # our name → the files'
KINDS = {"images-idx3": 3, "labels-idx1": 1}  # name → dimensions
LABELS = 10

Bytes = npt.NDArray[np.uint8]


def has_idx(folder: Path) -> bool:
    """Whether one of MNIST's files is there, packed by gzip or not."""
    return any(_found(folder, part, kind) for part in PARTS for kind in KINDS)


def unpack(folder: Path, cache: Path) -> Path:
    """The folder below `cache` with the images of the four files in `folder`; written if it is not there.

    Raises:
        DataError: a file is missing or damaged, or images and labels do not go together.
    """
    sources = {(part, kind): _source(folder, part, kind) for part in PARTS for kind in KINDS}
    content = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in sources.values()))
    target = cache / f"mnist-{content.hexdigest()[:16]}"
    if target.is_dir():  # it came here whole, under this name
        return target
    arrays = {key: read_idx(path, KINDS[key[1]]) for key, path in sources.items()}
    for part in PARTS:
        _require_pairs(*((sources[part, kind], arrays[part, kind]) for kind in KINDS))
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    try:
        for part in PARTS:
            _write(scratch / part, *(arrays[part, kind] for kind in KINDS))
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # nobody else was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def read_idx(path: Path, dimensions: int) -> Bytes:
    """The values of an idx file of uint8, in its shape.

    Raises:
        DataError: another magic number, or more or fewer values than its header promises.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); fetch it again") from error
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise DataError(f"{path}: begins with {content[:4].hex()}, expected {magic.hex()} and {dimensions} sizes")
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if (values := len(content) - start) != math.prod(shape):
        text = "×".join(map(str, shape))
        raise DataError(f"{path}: its header promises {text} values, it has {values}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _found(folder: Path, part: str, kind: str) -> Path | None:
    plain = folder / f"{PARTS[part]}-{kind}-ubyte"
    return next((path for path in (plain, plain.with_name(plain.name + ".gz")) if path.is_file()), None)


def _source(folder: Path, part: str, kind: str) -> Path:
    path = _found(folder, part, kind)
    if path is None:
        names = ", ".join(f"{prefix}-{kind}-ubyte" for prefix in PARTS.values() for kind in KINDS)
        raise DataError(f"{folder} has no {PARTS[part]}-{kind}-ubyte: expected {names}, each possibly with .gz")
    return path


def _require_pairs(images: tuple[Path, Bytes], labels: tuple[Path, Bytes]) -> None:
    (path, pixels), (other, numbers) = images, labels
    if len(pixels) != len(numbers):
        raise DataError(f"{path} has {len(pixels)} images, {other} {len(numbers)} labels: expected as many")
    if len(numbers) and numbers.max() >= LABELS:
        raise DataError(f"{other} has the label {numbers.max()}: expected 0 to {LABELS - 1}")


def _write(folder: Path, pixels: Bytes, labels: Bytes) -> None:
    """Grey PNGs in folders by label, named by their place in the file."""
    for label in np.unique(labels).tolist():
        (folder / str(label)).mkdir(parents=True)
    for place, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{place:05d}.png", compress_level=1)
