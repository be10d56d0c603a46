"""Symmetric matrices on disk: their lower panels, a little more than half of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

PANELS = 16  # of a wide matrix: 0.53 of it


def panels(width: int) -> Iterator[slice]:
    """Columns of each panel; it begins at the diagonal and goes down to the last row."""
    step = max(1, -(-width // PANELS))
    return (slice(start, min(width, start + step)) for start in range(0, width, step))


def lower_panels(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The panels of (g, k, k) by name; copies, as of a view all that it is a view of would be saved."""
    return {f"{name}/{p.start}": matrix[:, p.start :, p].clone() for p in panels(matrix.shape[-1])}


def load_lower_panels_(matrix: Tensor, name: str, state: Mapping[str, Tensor]) -> None:
    """Overwrite the matrix by what `lower_panels` gave under this name, mirrored."""
    for p in panels(matrix.shape[-1]):
        matrix[:, p.start :, p] = state[f"{name}/{p.start}"].to(matrix.device)
    mirror_(matrix)


def mirror_(matrix: Tensor) -> None:
    """Make what is right of each panel the transpose of what lies below its square on the diagonal."""
    for p in panels(matrix.shape[-1]):
        matrix[:, p, p.stop :] = matrix[:, p.stop :, p].mT
