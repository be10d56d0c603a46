"""A solver that gives up is asked once more on the CPU, and the answer is right."""

import re
from collections.abc import Callable

import pytest
import torch

from dist_prune.utils.decompositions import eigh, eigvalsh, pinv, svd
from tests.commands import ROOT

GAVE_UP = [
    torch.linalg.LinAlgError("linalg.eigh: (Batch element 0): The algorithm failed to converge"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd(…)`"),
]


def failing_first(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> list[str]:
    """`torch.linalg.name` raises on its first call; the devices it was called on."""
    solve, calls = getattr(torch.linalg, name), list[str]()

    def once(matrix: torch.Tensor, **more: object) -> object:
        calls.append(matrix.device.type)
        if len(calls) == 1:
            raise error
        return solve(matrix, **more)

    monkeypatch.setattr(torch.linalg, name, once)
    return calls


def by_eigh(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = eigh(matrix)
    return vectors @ values.diag_embed() @ vectors.mT


def by_svd(matrix: torch.Tensor) -> torch.Tensor:
    u, s, v = svd(matrix)
    return u @ s.diag_embed() @ v


@pytest.mark.parametrize("error", GAVE_UP)
@pytest.mark.parametrize(
    ("name", "rebuilt"),
    [
        ("eigh", by_eigh),
        ("svd", by_svd),
        ("eigvalsh", lambda matrix: eigvalsh(matrix).diag_embed()),
        ("pinv", lambda matrix: pinv(matrix).inverse()),
    ],
)
def test_a_solver_that_gives_up_is_asked_once_more_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, rebuilt: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    half = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = half @ half.mT
    if name == "eigvalsh":
        matrix = matrix.diagonal(dim1=-2, dim2=-1).sort().values.diag_embed()
    calls = failing_first(monkeypatch, name, error)
    torch.testing.assert_close(rebuilt(matrix), matrix)
    assert calls[-1] == "cpu" and len(calls) == 2


def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing_first(monkeypatch, "eigh", RuntimeError("expected a square matrix"))
    with pytest.raises(RuntimeError, match="square"):
        eigh(torch.zeros(2, 3))
    assert len(calls) == 1


def test_what_the_cpu_gives_up_on_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: torch.Tensor) -> object:
        raise GAVE_UP[0]

    monkeypatch.setattr(torch.linalg, "eigh", never)
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(torch.eye(2))


def test_no_other_module_asks_a_solver_that_may_give_up() -> None:
    asks = re.compile(r"linalg\.(eig|svd|pinv|lstsq|matrix_rank|cond|norm\(.*nuc)|torch\.(svd|pinverse|symeig)")
    package = ROOT / "dist_prune"
    asking = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(asks.search(line) and "np.linalg" not in line for line in path.read_text().splitlines())
    }
    assert asking == {"utils/decompositions.py"}
