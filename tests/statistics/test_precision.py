"""TF32, emulated: where torch's settings allow it, and what it leaves of the statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dist_prune
from dist_prune.network.sites import describe
from dist_prune.statistics import symmetric
from dist_prune.statistics.moments import Accumulator
from dist_prune.statistics.patches import PatchAccumulator
from dist_prune.statistics.precision import full_float32, full_float32_convolutions, products
from tests.networks import seeded
from tests.ranks import run_alone
from tests.tf32 import TensorCores, in_tf32


def restored_float32() -> None:
    """What a user set is put back, whichever of torch's two settings it was."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def state() -> tuple[str, str]:
        try:
            return matmul.fp32_precision, torch.get_float32_matmul_precision()
        except RuntimeError:
            return matmul.fp32_precision, "refused"

    for choose, expected in (
        (lambda: None, ("none", "highest")),
        (lambda: torch.set_float32_matmul_precision("high"), ("tf32", "high")),
        (lambda: setattr(matmul, "fp32_precision", "ieee"), ("ieee", "high")),
        (lambda: torch.set_float32_matmul_precision("highest"), ("ieee", "highest")),
        (lambda: setattr(matmul, "fp32_precision", "tf32"), ("tf32", "refused")),
    ):
        choose()
        assert state() == expected
        with full_float32():
            assert state() == ("ieee", "highest")
        assert state() == expected
    for given in ("tf32", "ieee"):
        convolution.fp32_precision = given
        with full_float32_convolutions():
            assert convolution.fp32_precision == "ieee"
        assert convolution.fp32_precision == given


def test_products_are_true_float32_and_the_users_setting_is_put_back() -> None:
    run_alone(restored_float32)


def test_emulated_tf32_has_ten_bits_and_is_where_the_settings_allow_it() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3.0])
    assert torch.equal(in_tf32(x), torch.tensor([1 + 2**-10, 1 + 2**-10, 1.0, -3.0]))
    one, convolved = torch.eye(4), x.view(1, 1, 2, 2)
    with TensorCores():
        assert torch.equal(one @ x[:, None], x[:, None])
        assert torch.equal(torch.conv2d(convolved, torch.ones(1, 1, 1, 1)).flatten(), in_tf32(x))
        with full_float32_convolutions():
            assert torch.equal(torch.conv2d(convolved, torch.ones(1, 1, 1, 1)), convolved)
        with products(tf32=True):
            assert torch.equal(one @ x[:, None], in_tf32(x)[:, None])


# ── float32: nothing is rounded ────────────────────────────────────────────────────────────────────────────

SETTINGS: dict[str, dict[str, object]] = {
    "fisher": {"method": "fisher", "search": 2},
    "refit": {"method": "fisher", "correct": "refit"},
    "hessian-local": {"method": "hessian-local"},
    "hessian-global": {"method": "hessian-global", "probes": 32},
}
MULTIPLY = {  # modules that must be seen to multiply in float32
    "fisher": {"statistics/patches.py", "statistics/symmetric.py", "statistics/terms.py", "width/moments.py"},
    "refit": {"statistics/symmetric.py"},
    "hessian-local": {"statistics/symmetric.py", "statistics/curvature.py"},
    "hessian-global": {"statistics/symmetric.py", "statistics/probes.py"},
}


def compressed(kind: str) -> tuple[set[str], set[str]]:
    """The modules whose products were rounded, and those whose were not, where the user allows TF32 everywhere."""
    generator = torch.Generator().manual_seed(0)
    images = 1 + torch.randn(3, 8, 3, 10, 10, generator=generator)
    labels = torch.randint(5, (3, 8), generator=generator)
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5),
        )
    )  # fmt: skip
    torch.set_float32_matmul_precision("high")
    with TensorCores() as cores:
        dist_prune.compress(
            model, list(zip(images, labels, strict=True)), ranks="budget:macs=0.5", **SETTINGS[kind]
        )
    return {*cores.rounded}, {*cores.exact}


def all_compressed() -> dict[str, tuple[set[str], set[str]]]:
    return {kind: compressed(kind) for kind in SETTINGS}


def test_no_product_that_statistics_or_correction_are_made_of_is_in_tf32_whatever_the_user_allows() -> None:
    for kind, (rounded, exact) in run_alone(all_compressed).items():
        assert not rounded, kind
        assert MULTIPLY[kind] <= exact, kind


# ── bfloat16: products of centred rows may be ──────────────────────────────────────────────────────────────


def correlated(width: int, count: int, mean: float = 10.0) -> Tensor:
    """Rows (width, count) whose eigenvalues span five decades, means ten times the largest deviation: as after a
    batch norm and a ReLU."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scale = torch.logspace(0, -2.5, width, dtype=torch.float64)
    return (turn * scale) @ torch.randn(width, count, generator=generator, dtype=torch.float64) + mean


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of the eigenvalues above 1e-4 of the top."""
    expected = torch.linalg.eigvalsh(exact)
    large = expected > 1e-4 * expected[-1]
    return float((torch.linalg.eigvalsh(found) / expected - 1).abs()[large].max())


@pytest.mark.parametrize("kind", ["float32 rows", "bfloat16 rows"])
def test_spectra_of_centred_tf32_products_are_those_of_float64_down_to_small_eigenvalues(kind: str) -> None:
    rows = correlated(48, 20_000)
    rows = rows.bfloat16() if kind == "bfloat16 rows" else rows.float()

    def error(centred: bool) -> float:
        accumulator = Accumulator(1, 48, torch.device("cpu"))
        if not centred:
            accumulator.shift = torch.zeros(1, 48)
        with TensorCores(), products(tf32=True):
            for part in rows.view(48, 20, -1).split(4, dim=1):
                accumulator.add(part)
        return error_of(accumulator.moments().covariance[0], torch.cov(rows.double(), correction=0))

    assert error(centred=True) < 1e-3
    assert kind == "bfloat16 rows" or error(centred=False) > 10 * error(centred=True)


@pytest.mark.parametrize("mean", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_centred_in_bfloat16_as_on_a_gpu_lose_no_more_than_they_had_lost(
    monkeypatch: pytest.MonkeyPatch, mean: float, channels_last: bool
) -> None:
    monkeypatch.setattr(symmetric, "CPU_TILES", symmetric.GPU_TILES._replace(panel=16))
    rows = correlated(48, 20_000, mean)
    given = rows.bfloat16().view(48, 20, -1)
    if channels_last:
        given = given.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    accumulator = Accumulator(1, 48, torch.device("cpu"))
    multiplied: list[torch.dtype] = []
    add_square = symmetric.SymmetricSum.add_square
    monkeypatch.setattr(
        symmetric.SymmetricSum, "add_square", lambda own, x: (multiplied.append(x.dtype), add_square(own, x))
    )
    for part in given.split(4, 1):
        accumulator.add(part)
    assert {*multiplied} == {torch.bfloat16}
    found, exact, rounded = (
        accumulator.moments(), torch.cov(rows, correction=0), torch.cov(given.flatten(1).double(), correction=0)
    )  # fmt: skip
    torch.testing.assert_close(found.mean[0], given.flatten(1).double().mean(1), rtol=0, atol=2e-5)
    lost = error_of(rounded, exact)
    assert lost > 0
    assert error_of(found.covariance[0], exact) < 2 * lost + 1e-6


@pytest.mark.parametrize("kind", ["float32 inputs", "bfloat16 inputs"])
@pytest.mark.parametrize("padding", [0, 1])
def test_so_are_the_spectra_of_channels_and_of_places_of_patches(kind: str, padding: int) -> None:
    x = correlated(24, 12 * 20 * 20).view(24, 12, 20, 20).transpose(0, 1)
    x = x.bfloat16() if kind == "bfloat16 inputs" else x.float()
    conv = nn.Conv2d(24, 4, 3, padding=padding)

    def moments(x: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
        accumulator = PatchAccumulator(describe("conv", conv), torch.device("cpu"))
        with TensorCores(), products(tf32=tf32):
            for part in x.split(4):
                accumulator.add(conv, part)
        found = accumulator.moments()
        return found.channels[0], found.places[0]

    for found, exact in zip(moments(x, tf32=True), moments(x.double(), tf32=False), strict=True):
        assert error_of(found, exact) < 1e-3
