"""Tensors packed into few large ones, so that they travel together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20


def buckets_of(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of one dtype and device, each of bounded size unless a single tensor is larger."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        bucket: list[Tensor] = []
        for tensor in group:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def pack(bucket: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all values; of a single contiguous tensor, a view."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].detach().view(-1)  # large tensors travel without a copy
    return torch.cat([tensor.detach().reshape(-1) for tensor in bucket])


def unpack(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Copy the values of what `pack` gave back into the tensors."""
    if flat.data_ptr() == bucket[0].data_ptr():
        return
    for tensor, values in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view(tensor.shape))
