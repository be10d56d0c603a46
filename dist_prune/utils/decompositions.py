"""Eigenvalues, singular values and what is made of them, once more on the CPU where a GPU's solver gives up.

cuSOLVER fails to converge, or with an error of its own, on matrices that LAPACK solves (pytorch#94772, #105359,
#107082).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, n), ascending, and eigenvectors (…, n, n) of symmetric matrices, on their device.

    Raises:
        LinAlgError: the CPU gives up, too.
    """
    values, vectors = _or_on_cpu(torch.linalg.eigh, matrix)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (…, n), ascending, of symmetric matrices; raises as `eigh`."""
    (values,) = _or_on_cpu(lambda tensor: (torch.linalg.eigvalsh(tensor),), matrix)
    return values


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, m, k), S (…, k) descending and Vᵀ (…, k, n) of matrices (…, m, n), k the smaller; raises as `eigh`."""
    u, s, v = _or_on_cpu(lambda tensor: torch.linalg.svd(tensor, full_matrices=False), matrix)
    return u, s, v


def pinv(matrix: Tensor) -> Tensor:
    """Pseudo-inverse (…, n, n) of symmetric matrices; raises as `eigh`."""
    (inverse,) = _or_on_cpu(lambda tensor: (torch.linalg.pinv(tensor, hermitian=True),), matrix)
    return inverse


def _or_on_cpu(solve: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple[Tensor, ...]:
    try:
        return solve(matrix)
    except RuntimeError as error:
        gave_up = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
        if not gave_up and "cusolver" not in str(error).lower():
            raise
    return tuple(part.to(matrix.device) for part in solve(matrix.cpu()))
