"""Compress pre-trained networks by rank-reducing their convolutions and linear layers, on any number of ranks.

Names are imported when they are first used: loading a compressed network needs little of the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_prune.api import BatchesError, Compression, compress
    from dist_prune.artifacts.saved_model import load_compressed
    from dist_prune.factorization.plan import Choice, Cost, Plan

__all__ = ["BatchesError", "Choice", "Compression", "Cost", "Plan", "compress", "load_compressed"]

_HOMES = {
    "api": ("BatchesError", "Compression", "compress"),
    "artifacts.saved_model": ("load_compressed",),
    "factorization.plan": ("Choice", "Cost", "Plan"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  any of the names above
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dist_prune.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
