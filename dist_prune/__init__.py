"""Compress pre-trained networks by rank-reducing their convolutions and linear layers, on any number of ranks.

Names are imported when they are first used: loading a compressed network needs little of the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_prune.api import apply, compress
    from dist_prune.artifacts.saved_model import load_compressed
    from dist_prune.compression import Compression
    from dist_prune.compressor import Compressor
    from dist_prune.config.flags import ConfigError
    from dist_prune.correction.correct import CorrectionError
    from dist_prune.data.batches import BatchesError
    from dist_prune.distributed.world import RankError
    from dist_prune.factorization.plan import Choice, Cost, Plan, PlanError
    from dist_prune.factorization.release import UnsoundError
    from dist_prune.network.errors import ModelError
    from dist_prune.network.replacing import CopyError
    from dist_prune.network.sites import SiteError
    from dist_prune.statistics.moments import StatisticsError
    from dist_prune.utils.files import CheckpointError

    __version__: str

__all__ = [
    "BatchesError",
    "CheckpointError",
    "Choice",
    "Compression",
    "Compressor",
    "ConfigError",
    "CopyError",
    "CorrectionError",
    "Cost",
    "ModelError",
    "Plan",
    "PlanError",
    "RankError",
    "SiteError",
    "StatisticsError",
    "UnsoundError",
    "__version__",
    "apply",
    "compress",
    "load_compressed",
]

_HOMES = {
    "api": ("apply", "compress"),
    "artifacts.saved_model": ("load_compressed",),
    "compression": ("Compression",),
    "compressor": ("Compressor",),
    "config.flags": ("ConfigError",),
    "correction.correct": ("CorrectionError",),
    "data.batches": ("BatchesError",),
    "distributed.world": ("RankError",),
    "factorization.plan": ("Choice", "Cost", "Plan", "PlanError"),
    "factorization.release": ("UnsoundError",),
    "network.errors": ("ModelError",),
    "network.replacing": ("CopyError",),
    "network.sites": ("SiteError",),
    "statistics.moments": ("StatisticsError",),
    "utils.files": ("CheckpointError",),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  any of the names above
    if name == "__version__":
        return importlib.metadata.version("dist-prune")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dist_prune.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
