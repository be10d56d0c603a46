"""Each layer for readers: what it costs dense and per rank, and its spectrum. Kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.factorization.bases import Basis
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.plan import Choice
from dist_prune.network.sites import Site, Survey
from dist_prune.utils.files import CheckpointError, to_json, write_text
from dist_prune.utils.text import read_text

LAYERS = "layers.json"
DIGITS = 5  # of a share: beyond what a picture shows


@dataclass(frozen=True)
class Layer:
    """One site as it was found, before anything was decided about it.

    Attributes:
        site: what it is, and what it costs.
        spectrum: each direction's share of its group's sum, (g, k), best first; None where none was computed.
    """

    site: Site
    spectrum: tuple[tuple[float, ...], ...] | None = None

    def costs(self, choice: Choice) -> tuple[int, int]:
        """Multiply-adds of one image, and weights: in the form that is chosen, or of the dense layer."""
        if choice.rank is None:
            return self.site.macs, self.site.dense_weights
        form = FORMS[choice.form]
        return form.macs(self.site, choice.ranks), form.params(self.site, choice.ranks)

    def kept(self, choice: Choice) -> float | None:
        """Share of the outputs' spectrum that is kept; None where it does not say so."""
        if self.spectrum is None or choice.rank is None or choice.form != "output":
            return None
        each = choice.rank // len(self.spectrum)
        return sum(sum(group[:each]) for group in self.spectrum) / len(self.spectrum)


def layers_of(survey: Survey, bases: Mapping[str, Basis]) -> list[Layer]:
    """The sites in execution order, with the spectra of those that have a basis."""
    found = []
    for site in survey.sites:
        basis = bases.get(site.name)
        found.append(Layer(site, None if basis is None else _shares(basis.spectrum)))
    return found


def _shares(spectrum: Tensor) -> tuple[tuple[float, ...], ...]:
    shares = spectrum.cpu() / spectrum.cpu().sum(-1, keepdim=True).clamp(min=1e-300)
    return tuple(tuple(float(f"{share:.{DIGITS}g}") for share in group) for group in shares.tolist())


def save(path: Path, layers: list[Layer]) -> None:
    """Write `layers.json`."""
    write_text(path, to_json([asdict(layer) for layer in layers], indent=None))


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
    spectrum, site = fields["spectrum"], fields["site"]
    pairs = {name: tuple(site[name]) for name in ("kernel", "stride", "maps")}
    return Layer(Site(**{**site, **pairs}), None if spectrum is None else tuple(map(tuple, spectrum)))
