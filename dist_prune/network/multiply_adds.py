"""Multiply-adds as they are executed: PyTorch's counter, made to see attention on CPUs, too."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class MultiplyAdds(FlopCounterMode):
    """While open, counts what is executed, on every device alike.

    The counter itself knows neither the fused attention of CPUs nor the fast path of nn.MultiheadAttention and
    nn.TransformerEncoderLayer, which runs their linear layers in one operation; meanwhile there is no fast path.
    """

    def __init__(self) -> None:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={fused: _fused_attention})

    def __enter__(self) -> Self:
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self.fast_path)

    @property
    def total(self) -> int:
        """Multiply-adds until now; the counter counts two for each."""
        flops: int = self.get_total_flops()
        return flops // 2


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:  # noqa: ANN401  shapes, and more
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops
