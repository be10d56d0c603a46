"""Each layer for readers: what it costs dense and per rank, and its spectrum. Kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.factorization.bases import Basis
from dist_prune.network.sites import Site, Survey
from dist_prune.utils.files import CheckpointError, write_text
from dist_prune.utils.text import read_text

LAYERS = "layers.json"
DIGITS = 5  # of a share: beyond what a picture shows


@dataclass(frozen=True)
class Layer:
    """One site as it was found, before anything was decided about it.

    Attributes:
        name: of the site.
        shape: in short, such as `128×64·3×3/2`.
        outputs: channels, all groups together.
        groups: of the convolution.
        macs: multiply-adds of the dense layer, one image.
        weights: of the dense layer.
        rank_macs: multiply-adds of a pair, per rank.
        rank_weights: weights of a pair, per rank.
        spectrum: each direction's share of its group's sum, (g, k), best first; None where none was computed.
    """

    name: str
    shape: str
    outputs: int
    groups: int
    macs: int
    weights: int
    rank_macs: int
    rank_weights: int
    spectrum: tuple[tuple[float, ...], ...] | None = None

    def costs(self, rank: int | None) -> tuple[int, int]:
        """Multiply-adds of one image, and weights: of a pair of this rank, or of the dense layer."""
        return (self.macs, self.weights) if rank is None else (rank * self.rank_macs, rank * self.rank_weights)

    def kept(self, rank: int) -> float:
        """Share of the spectrum that so many directions, all groups together, keep."""
        spectrum = self.spectrum or ()
        return sum(sum(group[: rank // len(spectrum)]) for group in spectrum) / max(1, len(spectrum))


def layers_of(survey: Survey, bases: Mapping[str, Basis]) -> list[Layer]:
    """The sites in execution order, with the spectra of those that have a basis."""
    return [_layer(site, bases.get(site.name)) for site in survey.sites]


def _layer(site: Site, basis: Basis | None) -> Layer:
    spectrum = None if basis is None else _shares(basis.spectrum)
    return Layer(
        site.name,
        site.shape,
        site.outputs,
        site.groups,
        site.macs,
        site.dense_weights,
        site.factored_macs(1),
        site.factored_weights(1),
        spectrum,
    )


def _shares(spectrum: Tensor) -> tuple[tuple[float, ...], ...]:
    shares = spectrum.cpu() / spectrum.cpu().sum(-1, keepdim=True).clamp(min=1e-300)
    return tuple(tuple(float(f"{share:.{DIGITS}g}") for share in group) for group in shares.tolist())


def save(path: Path, layers: list[Layer]) -> None:
    """Write `layers.json`."""
    write_text(path, json.dumps([asdict(layer) for layer in layers], ensure_ascii=False) + "\n")


def load(path: Path) -> list[Layer]:
    """The layers that `save` wrote.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    try:
        return [_restored(fields) for fields in json.loads(read_text(path))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or absent ({error!r})") from error


def _restored(fields: dict[str, Any]) -> Layer:
    spectrum = fields["spectrum"]
    return Layer(**{**fields, "spectrum": None if spectrum is None else tuple(map(tuple, spectrum))})
