"""How a GPU multiplies float32: in TF32, where torch's settings allow it, which keeps 10 bits of a mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32: TF32 keeps 10 bits, too few for small eigenvalues.

    torch has two settings for this. Where the newer one was used alone, asking for the older one is an error.
    """
    newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for setting, precision in zip(newer, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """`full_float32`, or TF32 on a GPU: enough for products of centred rows that have no more bits themselves."""
    with full_float32():
        if tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield


@contextmanager
def full_float32_convolutions() -> Iterator[None]:
    """As `full_float32`, of convolutions, which torch lets cuDNN make in TF32 by default.

    For those that statistics are made by; a network's own are left as its user has them.
    """
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
