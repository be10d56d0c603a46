"""What every network passes on its way out: finite, balanced, and described by figures that are its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_prune.factorization.plan import Cost
from dist_prune.factorization.project import balance, is_balanced
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating


class UnsoundError(ValueError):
    """A network that must not leave; the message says what is wrong with it."""


def release(network: nn.Module, image: Tensor) -> Cost:
    """Balance the network where training or an older version left it unbalanced, prove it sound, and measure it.

    Args:
        network: changed in place, if at all; it computes what it did.
        image: (1, …) on its device.

    Returns:
        Multiply-adds of one forward pass as they are executed, and its parameters as they are: no formula.

    Raises:
        UnsoundError: a parameter, a buffer or the answer is NaN or infinite.
    """
    require_finite(network)
    if not is_balanced(network):
        balance(network)
    with evaluating(network), MultiplyAdds() as counter:
        answer = logits_of(network(image.clone()))
    if not torch.isfinite(answer).all():
        raise UnsoundError("the compressed network answers an image with NaN or infinity; keep more ranks")
    params = sum(parameter.numel() for parameter in network.parameters())
    return Cost(counter.total, params)


def require_finite(network: nn.Module) -> None:
    """Look at every parameter and buffer.

    Raises:
        UnsoundError: one holds NaN or infinity; up to three are named.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    not_finite = [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    if not_finite:
        named = ", ".join(not_finite[:3]) + (", …" if len(not_finite) > 3 else "")
        raise UnsoundError(
            f"{len(not_finite)} of {len(tensors)} tensors of the compressed network hold NaN or infinity: "
            f"{named}; leave these layers out with --sites, or keep more ranks"
        )
