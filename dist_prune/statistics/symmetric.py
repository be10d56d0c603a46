"""Symmetric matrices made, kept and saved in halves: their lower panels, a little more than half of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PANELS = 16  # of a wide matrix: 0.53 of it


class Tiles(NamedTuple):
    """How a device's products are cut.

    Attributes:
        bytes: of columns multiplied at once.
        panel: least width of a panel of their symmetric product.
        batches: whose float32 products are summed before they are added to the sums in float64.
        keeps_bf16: whether rows in bfloat16 are multiplied as they are, into float32: by tensor cores, from half
            the memory.
    """

    bytes: int
    panel: int
    batches: int
    keeps_bf16: bool


CPU_TILES = Tiles(2 << 20, 48, 1, False)  # what stays in a core's cache, the width at which MKL is fastest
GPU_TILES = Tiles(1 << 27, 256, 16, True)  # few large kernels


def tiles_of(tensor: Tensor) -> Tiles:
    """Of the tensor's device."""
    return GPU_TILES if tensor.is_cuda else CPU_TILES


class SymmetricSum:
    """Sums the symmetric parts of products, (g, k, k): float32 products of some batches, their sums in float64.

    What is right of the diagonal may be rounded otherwise, or absent, until `matrix` fills it.
    """

    def __init__(self, groups: int, width: int, device: torch.device) -> None:
        self.total = torch.zeros(groups, width, width, dtype=torch.float64, device=device)
        self._product: Tensor | None = None
        self._is_whole = False  # else its lower panels alone
        self._batches = 0  # in it

    def add_square(self, columns: Tensor) -> None:
        """Add columns·columnsᵀ, of (g, k, n), of bfloat16 exact but for the sums' rounding in float32."""
        wide = torch.promote_types(columns.dtype, torch.float32)
        add_lower_product(self._product_in(wide, whole=False), columns, self._panel)

    def add_product(self, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Add scale·(left·rightᵀ + right·leftᵀ)/2, of (g, k, n) each."""
        self._product_in(left.dtype, whole=True).baddbmm_(left, right.mT, alpha=scale)

    def close_batch(self) -> None:
        """A batch is complete; after as many as the device wants they go to float64."""
        self._batches += 1
        if self._batches >= tiles_of(self.total).batches:
            self._flush()

    @property
    def unflushed(self) -> Tensor:
        """What is not in float64 yet; a zero where that is nothing. It is not finite where a product was not."""
        return self.total.new_zeros((), dtype=torch.float32) if self._product is None else self._product

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The lower panels by name."""
        self._flush()
        return lower_panels(name, self.total)

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._product, self._batches = None, 0
        load_lower_panels_(self.total, name, state)

    def matrix(self) -> Tensor:
        """The sum so far, (g, k, k) float64: this object's own memory."""
        self._flush()
        mirror_(self.total)
        return self.total

    @property
    def _panel(self) -> int:
        return max(tiles_of(self.total).panel, self.total.shape[-1] // 4)

    def _product_in(self, dtype: torch.dtype, whole: bool) -> Tensor:
        if self._product is None or (self._product.dtype, self._is_whole) != (dtype, whole):
            self._flush()
            self._product, self._is_whole = self.total.new_zeros(self.total.shape, dtype=dtype), whole
        return self._product

    def _flush(self) -> None:
        if self._product is not None:
            half = (self._product + self._product.mT) / 2 if self._is_whole else self._product
            for p in panels(half.shape[-1], self._panel):
                self.total[:, p.start :, p] += half[:, p.start :, p]
        self._product, self._batches = None, 0


def add_lower_product(product: Tensor, columns: Tensor, step: int) -> None:
    """Add columns·columnsᵀ, (g, k, k), in panels of columns that begin at the diagonal: about half of it."""
    for p in panels(product.shape[-1], step):
        panel, left, right = product[:, p.start :, p], columns[:, p.start :], columns[:, p].mT
        if columns.dtype == product.dtype:
            panel.baddbmm_(left, right)
        else:
            panel += _product(left, right, product.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right, (g, k, n) and (g, n, m), in a wider type than theirs; a CPU has no kernel for that."""
    if left.device.type == "cpu":
        return torch.bmm(left.to(dtype), right.to(dtype))
    return torch.bmm(left, right, out_dtype=dtype)


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


def mirror_(matrix: Tensor) -> None:
    """Make what is right of the diagonal the transpose of what is left of it."""
    for p in panels(matrix.shape[-1]):
        square = matrix[:, p, p]
        square.copy_(square.tril() + square.tril(-1).mT)
        matrix[:, p, p.stop :] = matrix[:, p.stop :, p].mT
