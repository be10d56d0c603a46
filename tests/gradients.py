"""Gradients of single images by a layer's weight, by torch.func: what second-order losses are checked against."""

import gc

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dist_prune.data.loader import Batch
from dist_prune.network.sites import Site
from dist_prune.statistics.second_order import signed


def per_image(model: nn.Module, site: Site, batch: Batch, mean: Tensor, seed: int, purpose: str) -> Tensor:
    """Σ_p g_p(x_p − x̄)ᵀ of each image, g = ∂l/∂y of the signed loss l, (N, g, c, d); `mean` (g, d) is x̄."""
    name, params = f"{site.name}.weight", dict(model.named_parameters())

    def loss(weight: Tensor, image: Tensor, index: Tensor) -> Tensor:
        logits = functional_call(model, {**params, name: weight}, (image[None],))
        return signed(logits, index[None], "kl", seed, purpose)

    weights = vmap(grad(loss), (None, 0, 0))(params[name].detach(), batch.images, batch.indices)
    shape = len(batch.images), site.groups, site.width
    sums = output_gradients(model, site, batch, seed, purpose).reshape(*shape, 1)
    return weights.reshape(*shape, site.inputs) - sums * mean[:, None]


def output_gradients(model: nn.Module, site: Site, batch: Batch, seed: int, purpose: str) -> Tensor:
    """Σ_p g_p of each image, (N, C): the gradient by something added to all its outputs."""
    shift = torch.zeros(len(batch.images), site.outputs, dtype=torch.float64, requires_grad=True)

    def add(_module: nn.Module, _inputs: object, y: Tensor) -> Tensor:
        middle = [1] * (y.dim() - 2)
        return (
            y + shift.reshape(len(y), *middle, -1)
            if site.kind == "linear"
            else y + shift.reshape(len(y), -1, *middle)
        )

    handle = model.get_submodule(site.name).register_forward_hook(add)
    (sums,) = torch.autograd.grad(signed(model(batch.images), batch.indices, "kl", seed, purpose), shift)
    handle.remove()
    return sums


def tensors_alive() -> int:
    """Tensors of this process."""
    gc.collect()
    return sum(type(thing) is Tensor for thing in gc.get_objects())
