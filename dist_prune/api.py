"""The shortcuts: a network compressed by one call, and a plan's shapes made on another network."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from dist_prune.compression import Compression, Ranks
from dist_prune.compressor import Compressor


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Ranks = "budget:macs=0.5",
    **options: Any,  # noqa: ANN401  those of Compressor
) -> Compression:
    """Replace layers of a network by low-rank ones; the given network stays as it is.

    In a process that is in a process group, every rank calls this with the same network and arguments and with its
    own share of the images: statistics are summed over the ranks, and all end with the same result.

    Args:
        model: as of `Compressor.fit`.
        batches: as of `Compressor.fit`.
        ranks: a share of the multiply-adds, `0.5`; ranks by site, `{"layer1.0.conv1": 8}`, or forms and ranks,
            `"vertical:8"`, `"tucker:8x16"`; a Plan; or as `--ranks`: `uniform:0.5`, `energy:0.95`,
            `budget:macs|params|latency=0.5`, `sites:NAME=RANK,…`, or a plan's file.
        options: the arguments of `Compressor`.

    Raises:
        ValueError, RuntimeError: as listed at `Compressor.fit` and `Compressor.compress`.
    """
    return Compressor(**options).fit(model, batches, ranks).compress(ranks)


def _with_options() -> inspect.Signature:
    """Of `compress`, for help and editors: with the arguments of `Compressor` spelled out."""
    own, options = inspect.signature(compress), inspect.signature(Compressor)
    given = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=[*given, *options.parameters.values()])


vars(compress)["__signature__"] = _with_options()
