"""Losses of distillation: KL of the softmax, beside labels or errors of the blocks' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dist_prune.config.flags import Distillation
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.network.factored import Factored
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating
from dist_prune.statistics.probes import kl
from dist_prune.training.trainer import Loss, cross_entropy

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def distillation_loss(dense: nn.Module, how: Distillation, settings: TrainingConfig) -> Loss:
    """α·T²·KL(dense ‖ trained) at temperature T + (1−α)·cross-entropy."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        soft = softened_kl(answers(dense, batch.images, settings.bf16), logits, how.temperature)
        return how.alpha * soft + (1 - how.alpha) * cross_entropy(logits, batch, settings.label_smoothing)

    return loss


def softened_kl(dense: Tensor, trained: Tensor, temperature: float) -> Tensor:
    """T²·KL(dense ‖ trained) of the softmax at temperature T, mean over images (Hinton et al. 2015), of logits.

    The factor T² keeps the gradient in proportion, whatever T.
    """
    return temperature**2 * kl(dense / temperature, trained / temperature).mean()


def answers(dense: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    """Logits of the dense network, float32, which runs in the same precision as the trained one."""
    with evaluating(dense), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return logits_of(dense(images)).float()


@contextmanager
def towards(
    dense: nn.Module, trained: nn.Module, features: float, temperature: float, bf16: bool = False
) -> Iterator[Loss]:
    """While open, lend the loss for `trained`'s last forward pass.

    T²·KL(dense ‖ trained) at temperature T, plus `features` times the mean over the blocks of ‖f̂ − f‖²/‖f‖², f
    what the dense block gives (FitNets, Romero et al. 2015, no regressors).
    """
    names = matched(dense, trained) if features else ()
    with recorded(dense, names) as wanted, recorded(trained, names) as given:

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            divergence = softened_kl(answers(dense, batch.images, bf16), logits, temperature)
            alike = [n for n in names if n in wanted and given[n].shape == wanted[n].shape]
            errors = [relative_error(given[name], wanted[name]) for name in alike]
            return divergence + features * torch.stack(errors).mean() if errors else divergence

        yield loss


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """‖given − wanted‖²/‖wanted‖² over the whole batch, in float32."""
    given, wanted = given.float(), wanted.float()
    return (given - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def matched(dense: nn.Module, trained: nn.Module) -> tuple[str, ...]:
    """The blocks whose outputs are compared; the factored layers where the network is not made of blocks."""
    pairs = [name for name, module in trained.named_modules() if isinstance(module, Factored)]
    return tuple(blocks(dense)) or tuple(pairs)


def blocks(model: nn.Module) -> Iterator[str]:
    """The outermost elements of `Sequential`s and lists that have parts of their own, parameters among them."""

    def search(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            is_part = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if is_part and type(module) in _CONTAINERS and type(child) not in _CONTAINERS:
                yield prefix + name
            else:
                yield from search(child, f"{prefix}{name}.")

    return search(model, "")


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves the named modules' outputs here, as far as they are tensors."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(record(name)).remove)
        yield outputs
