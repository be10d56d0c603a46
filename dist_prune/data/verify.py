"""Verify a data set: every file opened and decoded, a slice of the classes at a time; the last slice sums up.

`python -m dist_prune.data.verify DATA --slice 3/100 --report DIR`, as `slurm/imagenet_check.sh` starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_prune.data.damage import decode_fault, file_fault, images_of_any_size, size_fault
from dist_prune.data.extents import Extent
from dist_prune.data.listing import ENDINGS, DataError
from dist_prune.data.shards import is_packed
from dist_prune.utils.console import adapt_output
from dist_prune.utils.files import write_text
from dist_prune.utils.text import read_text

PARTS = ("train", "val")
IMAGENET = {"train": 1_281_167, "val": 50_000}  # ILSVRC 2012
CLASSES = 1000
WORDNET = re.compile(r"n\d{8}")
NAMES = {"train": r"{label}_\d+\.JPEG", "val": r"ILSVRC2012_val_\d{{8}}\.JPEG"}
SHOWN = 20


@dataclass(frozen=True)
class Fault:
    """One file, relative to the data set, and what is wrong with it."""

    file: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Slice:
    """What one slice of the classes holds: files per part, and faults."""

    classes: tuple[str, ...]
    files: dict[str, int]
    faults: tuple[Fault, ...]


def class_folders(data: Path) -> list[str]:
    """Names of all class folders below train/ and val/, sorted.

    Raises:
        DataError: a part is not there, or there are none.
    """
    found: set[str] = set()
    for part in PARTS:
        if not (data / part).is_dir():
            raise DataError(f"{data / part} is not a folder: expected {data}/{{train,val}}/<class>/*.JPEG")
        if is_packed(data / part):
            raise DataError(
                f"{data / part} is packed: its images were looked at then; dist-prune check looks again"
            )
        found |= {path.name for path in (data / part).iterdir() if path.is_dir()}
    if not found:
        raise DataError(f"{data}: no class folders below train/ and val/")
    return sorted(found)


def check_slice(data: Path, classes: Sequence[str], smallest: int, threads: int) -> Slice:
    """Open and decode every file of these classes; images below `smallest` pixels on a side are wrong-sized."""
    files, faults = dict.fromkeys(PARTS, 0), []
    with ThreadPoolExecutor(threads) as pool, images_of_any_size():
        for label in classes:
            for part in PARTS:
                folder = data / part / label
                if not folder.is_dir():
                    faults.append(Fault(f"{part}/{label}", "missing", "there is no such class folder"))
                    continue
                paths = sorted(folder.iterdir())
                files[part] += len(paths)
                for path, wrong in zip(
                    paths, pool.map(lambda p: list(faults_of(p, smallest)), paths), strict=True
                ):
                    faults += [Fault(str(path.relative_to(data)), kind, reason) for kind, reason in wrong]
    return Slice(tuple(classes), files, tuple(faults))


def faults_of(path: Path, smallest: int) -> Iterator[tuple[str, str]]:
    """All that is wrong with `part/class/file`, each as a kind and a reason."""
    if misnamed := name_fault(path):
        yield "wrong name", misnamed
    if path.is_dir() or path.suffix.lower() not in ENDINGS:
        return
    image = Extent(path)
    if damage := file_fault(image):
        yield ("truncated" if damage == "empty" or damage.startswith("truncated") else "unreadable"), damage
    elif damage := decode_fault(image):
        yield "unreadable", damage
    elif damage := size_fault(image, smallest):
        yield "wrong size", damage


def name_fault(path: Path) -> str:
    """Why a file of this name does not belong here; folders named as WordNet's ids hold ImageNet's names."""
    if path.is_dir():
        return "a folder in a class folder"
    if path.suffix.lower() not in ENDINGS:
        return "not an image's ending"
    label, part = path.parent.name, path.parent.parent.name
    due = NAMES[part].format(label=label)
    if WORDNET.fullmatch(label) and not re.fullmatch(due, path.name):
        return f"expected {due}"
    return ""


# ── reports ────────────────────────────────────────────────────────────────────────────────────────────────


def read_report(folder: Path, count: int) -> list[Slice] | None:
    """All slices, once all are there."""
    paths = [folder / f"{index}of{count}.json" for index in range(count)]
    if not all(path.is_file() for path in paths):
        return None
    found = [json.loads(read_text(path)) for path in paths]
    return [Slice(tuple(s["classes"]), s["files"], tuple(Fault(**f) for f in s["faults"])) for s in found]


def summary(slices: Sequence[Slice]) -> str:
    """Counts, next to ImageNet's where there are a thousand classes; faults by kind, the first of them by name."""
    classes = sum(len(s.classes) for s in slices)
    lines = []
    for part in PARTS:
        files = sum(s.files[part] for s in slices)
        due = f" of {IMAGENET[part]:,} expected ({files - IMAGENET[part]:+,})" if classes == CLASSES else ""
        lines.append(f"{part}: {files:,} files{due}, {classes} classes")
    faults = [fault for s in slices for fault in s.faults]
    lines += [f"{kind}: {times}" for kind, times in sorted(Counter(f.kind for f in faults).items())]
    lines += [f"  {fault.file} ({fault.kind}: {fault.reason})" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return "\n".join([*lines, "no faults" if not faults else f"{len(faults)} faults"])


def is_complete(slices: Sequence[Slice]) -> bool:
    """No faults, and with a thousand classes ImageNet's numbers of files."""
    files = {part: sum(s.files[part] for s in slices) for part in PARTS}
    counts = sum(len(s.classes) for s in slices) != CLASSES or files == IMAGENET
    return counts and not any(s.faults for s in slices)


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected INDEX/COUNT, such as 0/100 to 99/100")
    return int(index), int(count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one slice; the exit code: 0 sound, 1 faults found, 2 could not start."""
    adapt_output(os.environ)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--slice", type=_share, default=(0, 1), help="INDEX/COUNT: every COUNT-th class")
    parser.add_argument("--report", type=Path, required=True, help="folder that all slices report to")
    parser.add_argument("--smallest", type=int, default=16, help="pixels that each side must have")
    parser.add_argument("--threads", type=int, default=8)
    asked = parser.parse_args(arguments)
    index, count = asked.slice
    try:
        classes = class_folders(asked.data)[index::count]
        found = check_slice(asked.data, classes, asked.smallest, asked.threads)
        write_text(asked.report / f"{index}of{count}.json", json.dumps(asdict(found), indent=1) + "\n")
        print(f"slice {index} of {count}:\n{summary([found])}", flush=True)
        if (slices := read_report(asked.report, count)) is None:
            return int(bool(found.faults))
        write_text(asked.report / "summary.txt", summary(slices) + "\n")
        print(f"all {count} slices, in {asked.report / 'summary.txt'}:\n{summary(slices)}", flush=True)
        return int(not is_complete(slices))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
