"""How much memory an object holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn


def held_bytes(thing: object, without: Iterable[object] = ()) -> int:
    """Bytes of all tensors and arrays that can be reached from an object of this package, each counted once.

    Args:
        thing: an object, a module, a mapping or a sequence.
        without: what is not looked into.
    """
    seen = {id(each): each for each in without}  # kept, so that no other object gets their numbers
    storages: dict[int, int] = {}
    left: list[Any] = [thing]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, str | bytes | type):
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, np.ndarray):
            storages[each.ctypes.data] = each.nbytes
        elif isinstance(each, nn.Module):
            left += [*each.parameters(), *each.buffers()]
        elif isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
        elif type(each).__module__.startswith("dist_prune."):
            left += vars(each).values()
    return sum(storages.values())
