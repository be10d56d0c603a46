"""What lies in a folder of images: which files DALI decodes, which are left out, and lists of class folders."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_prune.data.extents import Archive
from dist_prune.utils.text import read_text

ENDINGS = frozenset(
    # whatever DALI decodes; it looks at the content, not at the ending
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc"),
    ]
)


class DataError(ValueError):
    """The images on disk, or what was asked of them, cannot be used as they are."""


@dataclass(frozen=True)
class FolderListing:
    """What a folder holds: `loose` images directly in it, `folders` and the images at any depth below each.

    Names of images are relative to `root`, sorted; `left_out` counts other files by their ending.
    """

    root: Path
    loose: tuple[str, ...]
    folders: Mapping[str, tuple[str, ...]] = field(repr=False)
    left_out: Mapping[str, int]

    @property
    def images(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(sorted([*self.loose, *(name for below in self.folders.values() for name in below)]))

    def archive_of(self, _files: Sequence[str]) -> Archive | None:
        """Where these images lie, if not in files of their own."""
        return None


def list_folder(root: Path) -> FolderListing:
    """Find all images below `root`; links to folders are followed, hidden files and folders skipped.

    Raises:
        DataError: `root` is not a folder; a name is not UTF-8, which DALI opens files by.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one with images")
    left_out: Counter[str] = Counter()
    names = list(_walk(str(root), "", (os.path.realpath(root),), left_out))
    _require_openable(root, [str(root), *names])
    return FolderListing(root, *by_folder(names), dict(sorted(left_out.items())))


def by_folder(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Images in no folder, and those of each folder, all sorted; a name with a slash behind is a folder's own."""
    folders: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, separator, _ = name.partition("/")
        if separator:
            folders.setdefault(folder, []).append(name)
    found = {name: tuple(file for file in files if file[-1] != "/") for name, files in sorted(folders.items())}
    return tuple(sorted(name for name in names if "/" not in name)), found


def _walk(path: str, prefix: str, around: tuple[str, ...], left_out: Counter[str]) -> Iterator[str]:
    """Names of images, and of folders with a slash behind them; `around` are the real folders on the way here."""
    with os.scandir(path) as entries:
        for entry in entries:
            name, ending = entry.name, os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  a million of them
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else f"{around[-1]}/{name}"
                if not name.startswith(".") and real not in around:
                    yield f"{prefix}{name}/"
                    yield from _walk(entry.path, f"{prefix}{name}/", (*around, real), left_out)
            elif ending in ENDINGS and not name.startswith("."):
                yield prefix + name
            elif not name.startswith("."):
                left_out[ending or "without an ending"] += 1
            elif ending in ENDINGS:
                left_out["hidden"] += 1


def left_out_text(root: Path, left_out: Mapping[str, int]) -> str:
    """How many files are no images that are read; empty where there are none."""
    if not left_out:
        return ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    return f"{sum(left_out.values()):,} files in {root} left out, not of a kind that DALI decodes: {kinds}"


def _require_openable(root: Path, names: Sequence[str]) -> None:
    """DALI opens files by names in UTF-8: what the locale makes of a name must be the same.

    Raises:
        DataError: names up to ten.
    """
    if all(map(str.isascii, names)):
        return
    utf8 = sys.getfilesystemencoding() == "utf-8"
    strange = [os.fsencode(name) for name in names if not name.isascii() and not (utf8 and _is_utf8(name))]
    if not strange:
        return
    shown = brief([name.decode("ascii", "backslashreplace") for name in strange])
    if not utf8:
        raise DataError(
            f"{root}: names beyond ASCII ({shown}) cannot be opened in this locale, whose files are named in "
            f"{sys.getfilesystemencoding()}: set LC_ALL=C.UTF-8"
        )
    raise DataError(
        f"{root}: {len(strange):,} names are not UTF-8, and DALI cannot open them: {shown}; rename them"
    )


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def brief(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and how many more."""
    rest = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest


# ── lists of classes ───────────────────────────────────────────────────────────────────────────────────────


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names of class folders in label order, from a text file with one per line, or from JSON.

    A line may be a path (its last part counts), quoted, or end in a comma; one line may hold all, with commas.
    JSON is a list of names, or says which label a name has, either way round.

    Raises:
        DataError: not a file, not text, a name twice, labels that are not 0 to n−1.
    """
    if not path.is_file():
        raise DataError(f"class list {path} is not a file: expected text with one class folder per line")
    try:
        text = read_text(path).strip()
    except ValueError as error:
        raise DataError(f"class list {error}") from error
    names = list(map(_folder_name, _names_in_json(text, path) or _names_in_lines(text)))
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"class list {path} has lines twice: {brief(twice)}; a line number is a label")
    if not names:
        raise DataError(f"class list {path} is empty: expected one class folder per line, in label order")
    return tuple(names)


def _names_in_lines(text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    return lines[0].split(",") if len(lines) == 1 else lines


def _folder_name(line: str) -> str:
    """The folder that a line means: `"train/n01440764/",` is n01440764."""
    return line.strip().rstrip(",").strip().strip("\"'").rstrip("/\\").rpartition("/")[2]


def _names_in_json(text: str, path: Path) -> list[str] | None:
    """None if the text is not JSON."""
    try:
        content = json.loads(text) if text[:1] in ("[", "{") else None
    except ValueError:
        return None
    if isinstance(content, dict):
        content = _in_label_order(content, path)
    if content is not None and not all(isinstance(name, str) for name in content):
        raise DataError(f"class list {path}: expected a JSON list of folders' names, or each one's label")
    return content


def _in_label_order(content: Mapping[str, Any], path: Path) -> list[Any]:
    """The names of `{name: label}`, or of `{label: name}` and `{label: [name, …]}`, by label."""
    if all(isinstance(label, int) for label in content.values()):
        labelled = [(label, name) for name, label in content.items()]
    elif all(label.isdecimal() for label in content):
        labelled = [(int(k), v[0] if isinstance(v, list) and v else v) for k, v in content.items()]
    else:
        raise DataError(f"class list {path}: expected a JSON list of folders' names, or each one's label")
    labelled.sort(key=lambda pair: pair[0])
    if [label for label, _ in labelled] != list(range(len(labelled))):
        raise DataError(f"class list {path}: its labels are not 0 to {len(labelled) - 1}, each once")
    return [name for _, name in labelled]
