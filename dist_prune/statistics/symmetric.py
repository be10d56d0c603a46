"""Symmetric matrices on disk, and made in halves: their lower panels, a little more than half of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

PANELS = 16  # of a wide matrix: 0.53 of it


def panels(width: int, step: int = 0) -> Iterator[slice]:
    """Columns of each panel, `step` of them (0: as `PANELS` has it); it goes from the diagonal to the last row."""
    step = step or max(1, -(-width // PANELS))
    return (slice(start, min(width, start + step)) for start in range(0, width, step))


def lower_panels(name: str, matrix: Tensor, step: int = 0) -> dict[str, Tensor]:
    """The panels of (g, k, k) by name; copies, as of a view all that it is a view of would be saved."""
    return {f"{name}/{p.start}": matrix[:, p.start :, p].clone() for p in panels(matrix.shape[-1], step)}


def load_lower_panels_(matrix: Tensor, name: str, state: Mapping[str, Tensor]) -> None:
    """Overwrite the matrix by what `lower_panels` gave under this name, of any width, mirrored."""
    for key, panel in state.items():
        if key.startswith(f"{name}/"):
            start = int(key.removeprefix(f"{name}/"))
            end = start + panel.shape[-1]
            matrix[:, start:, start:end] = panel.to(matrix.device)
            matrix[:, start:end, end:] = matrix[:, end:, start:end].mT


def mirror_(matrix: Tensor, step: int = 0) -> None:
    """Make what is right of each panel the transpose of what lies below its square on the diagonal."""
    for p in panels(matrix.shape[-1], step):
        matrix[:, p, p.stop :] = matrix[:, p.stop :, p].mT
