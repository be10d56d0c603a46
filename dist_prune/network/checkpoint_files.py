"""Files that hold weights, whatever wrote them: opened without running any code that is in them."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_prune.network.errors import ModelError

KINDS = {  # how files begin that are often taken for weights
    (b"version https://git-lfs",): "it is a pointer of Git LFS; run git lfs pull where it came from",
    (
        b"<!doctype",
        b"<html",
        b"<?xml",
        b"<head",
    ): "it is a web page that a server sent; download it again",
    (b"{",): "it is JSON; an index of shards names the files that hold the weights",
    (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!"): "it is packed; unpack it, and give what is in it",
    (b"\x89hdf",): "it is HDF5, as Keras writes it; give a file of PyTorch or safetensors",
}
FOREIGN = 100  # classes that a file may name before it is given up
DEPTH = 4  # of mappings in mappings
SAVE_PLAIN = "save its tensors alone, torch.save(model.state_dict(), FILE), where its code is at hand"


@dataclass(frozen=True)
class Candidate:
    """A mapping in a file that may be a state dict.

    Attributes:
        place: keys on the way to it; empty where the file itself is the mapping.
        entries: name → tensor, and whatever else stands among them.
        versions: `_metadata` of a state dict, by name of module; None where it is lost.
    """

    place: tuple[str, ...]
    entries: Mapping[str, Any]
    versions: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What can be weights."""
        return {name: value for name, value in self.entries.items() if isinstance(value, Tensor)}


class Foreign:
    """Stands in for an object of a class that is not torch's: what was stored of it, and none of its code."""

    def __init__(self, *args: object, **options: object) -> None:
        del args, options

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class ForeignMapping:
    """Stands in for a class of mappings, such as `defaultdict`: makes a plain one of it."""

    def __new__(cls, *args: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # what is made is another type
        """An empty mapping; its items follow."""
        del args
        return OrderedDict()


class ForeignList:
    """Stands in for a class of lists, such as `deque`."""

    def __new__(cls, *args: object) -> list[Any]:  # type: ignore[misc]
        """An empty list; its items follow."""
        del args
        return []


def read_candidates(path: Path) -> list[Candidate]:
    """All mappings of a file that have tensors, outermost first.

    Args:
        path: of a state dict, or of anything that holds one, as torch.save or safetensors write it. What the file
            is says its content, not its name.

    Raises:
        ModelError: in one line, what it is instead, and what to do.
    """
    try:
        head = _head(path)
        if _is_safetensors(head):
            return [_safetensors(path)]
        _require_weights(path, head)
        loaded = _unpickled(path, zipped=head.startswith(b"PK"))
    except OSError as error:
        raise ModelError(f"{path}: could not be read ({error.strerror or error})") from error
    found = [candidate for candidate in _search(loaded, ()) if candidate.tensors]
    if not found:
        raise ModelError(f"{path}: expected a state dict (name → tensor), got {type(loaded).__name__}")
    return found


# ── what the file is ───────────────────────────────────────────────────────────────────────────────────────


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _require_weights(path: Path, head: bytes) -> None:
    """Refuse what is known to be something else.

    Raises:
        ModelError: says what it is.
    """
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise _refusal(path, "it is empty; copy or download it again")
    for beginnings, what in KINDS.items():
        if start.startswith(beginnings):
            raise _refusal(path, what)
    if head.startswith(b"PK"):
        _require_torchs(path)


def _refusal(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}: not readable as weights: {why}")


def _require_torchs(path: Path) -> None:
    """Refuse archives that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _refusal(path, _damaged(error)) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise _refusal(
            path,
            f"it is TorchScript, a program and not only weights; "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt') makes a file to give",
        )
    if "data.pkl" not in inner:
        kind = "NumPy's arrays" if all(name.endswith(".npy") for name in names) else "an archive"
        kind = "an exported program (torch.export)" if "archive_format" in inner else kind
        raise _refusal(path, f"it is {kind} ({', '.join(names[:2])}, …); give what torch.save wrote")


def _damaged(error: Exception) -> str:
    return f"damaged, cut off, or of another kind ({_brief(error)}); copy it again"


def _brief(error: Exception) -> str:
    """The first line of an error without the colours of a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


# ── its content ────────────────────────────────────────────────────────────────────────────────────────────


def _safetensors(path: Path) -> Candidate:
    from safetensors import SafetensorError  # noqa: PLC0415  one of two formats
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return Candidate((), load_file(path))
    except (SafetensorError, json.JSONDecodeError, ValueError) as error:
        raise _refusal(path, _damaged(error)) from error


def _unpickled(path: Path, zipped: bool) -> Any:  # noqa: ANN401  whatever somebody saved
    """The file's objects; those of classes that are not torch's are `Foreign`, and none of their code runs."""
    foreign: dict[str, type] = {}
    while True:
        try:
            allowed = torch.serialization.safe_globals([(kind, name) for name, kind in foreign.items()])
            with allowed, warnings.catch_warnings(action="ignore"):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except OSError:
            raise
        except Exception as error:
            if not _stood_in_for(str(error), foreign):
                raise _refusal(path, _explained(error)) from error


def _stood_in_for(message: str, foreign: dict[str, type]) -> bool:
    """Add the class that reading stopped at; False where there is none that a stand-in would help."""
    name = re.search(r"GLOBAL (\S+) was not an allowed global", message)
    if name is not None and len(foreign) < FOREIGN:
        full = name[1] if "." in name[1] else f"builtins.{name[1]}"
        kinds = {"dict": ForeignMapping, "list": ForeignList, "deque": ForeignList}
        foreign[full] = next((kind for end, kind in kinds.items() if full.lower().endswith(end)), Foreign)
        return True
    if "Can only SETITEM" in message and Foreign in foreign.values():
        foreign.update(dict.fromkeys(foreign, ForeignMapping))
        return True
    return False


def _explained(error: Exception) -> str:
    """Why reading plain data failed, and what to do."""
    text = str(error)
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module", text):
        return f"it would call {blocked[1]}; do not use this file"
    reason = text.partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    if reason.startswith("Unsupported operand"):
        return (
            "damaged, of another kind, or pickled otherwise than torch.save does by default; copy or save it again"
        )
    if reason:
        return f"it holds more than plain data ({reason[:120]}); {SAVE_PLAIN}"
    if "legacy .tar format" in text:
        return f"it is of PyTorch before 0.2, or damaged; {SAVE_PLAIN}"
    return _damaged(error)


def _search(found: Any, place: tuple[str, ...]) -> Iterator[Candidate]:  # noqa: ANN401  any object
    """The object itself, and what is in it."""
    if isinstance(found, Foreign):
        if "_parameters" in vars(found):
            yield Candidate(place, dict(_saved_network(found, "")))
            return
        found = vars(found)
    if isinstance(found, list | tuple):
        found = {str(index): value for index, value in enumerate(found[:DEPTH])}
    if isinstance(found, Mapping):
        named = {name: value for name, value in found.items() if isinstance(name, str)}
        yield Candidate(place, named, getattr(found, "_metadata", None))
        if len(place) < DEPTH:
            for name, value in named.items():
                if not isinstance(value, Tensor):
                    yield from _search(value, (*place, name))


def _saved_network(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401  a Foreign
    """The state dict of a network that was saved whole, without building it."""
    state = vars(module) if isinstance(module, Foreign) else {}
    fleeting = state.get("_non_persistent_buffers_set") or ()
    for name, tensor in {**state.get("_parameters", {}), **state.get("_buffers", {})}.items():
        if isinstance(tensor, Tensor) and name not in fleeting:
            yield prefix + name, tensor
    for name, child in state.get("_modules", {}).items():
        yield from _saved_network(child, f"{prefix}{name}.")
