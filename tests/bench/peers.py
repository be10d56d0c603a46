"""Methods of others: pruning by Torch-Pruning 1.6 (Fang et al. 2023), Tucker-2 by tensorly (Kim et al. 2016).

Of pruning, only the inner channels of each residual block go, those between its two convolutions: the others are
added to shortcuts. One share for the whole network, found by bisection: as many MACs as the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import tensorly
import torch
import torch.nn.functional as F
import torch_pruning
from tensorly.decomposition import partial_tucker
from torch import nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.correction.calibration import decode
from dist_prune.correction.correct import correct
from dist_prune.data.views import Views
from dist_prune.network.channels import Group, KeptChannels
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating, survey
from dist_prune.width.choose import predictions, removable_groups
from dist_prune.width.moments import collect_channel_moments
from dist_prune.width.narrowing import narrowed
from tests.bench.ground import SPEC, Ground, macs_of

IMPORTANCE = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn-scale": torch_pruning.importance.BNScaleImportance,
}
HALVINGS = 10  # of the interval in which the share lies

tensorly.set_backend("pytorch")


def prune(ground: Ground, importance: str, share: float, images: int, seed: int, repair: str) -> nn.Module:
    """The dense network with as few channels removed as the share of its MACs allows, and one of `REPAIRS`.

    `images` training images give the gradients of `taylor`, with their labels, and what the repair needs.
    """
    pruned = within(ground, share, lambda kept: without_channels(ground, importance, 1 - kept, images, seed))
    return REPAIRS[repair](pruned, ground, images, seed)


def tucker(ground: Ground, share: float, images: int, seed: int) -> nn.Module:
    """Every k×k convolution as 1×1 → k×k → 1×1, the same share of both its channels; batch norm re-estimated."""
    return reestimated(within(ground, share, lambda kept: with_tucker(ground.dense, kept)), ground, images, seed)


def within(ground: Ground, share: float, made: Callable[[float], nn.Module]) -> nn.Module:
    """Of the networks that are made by keeping a share of something, the largest within this share of the MACs."""
    budget, low, high, best = share * macs_of(ground.dense), 0.0, 1.0, None
    for _ in range(HALVINGS):
        candidate = made(kept := (low + high) / 2)
        if macs_of(candidate) <= budget:
            low, best = kept, candidate
        else:
            high = kept
    assert best is not None, f"nothing reaches {share} of the MACs"
    return best


def with_tucker(dense: nn.Module, kept: float) -> nn.Module:
    """A copy whose k×k convolutions are chains at this share of their channels, in and out."""
    network = copy.deepcopy(dense)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            network.set_submodule(name, tucker_of(module, kept))
    return network.eval()


def tucker_of(conv: nn.Conv2d, kept: float) -> nn.Sequential:
    """Of an ungrouped convolution, by tensorly's higher-order orthogonal iteration from its SVD initialisation."""
    ranks = [max(1, round(kept * width)) for width in (conv.out_channels, conv.in_channels)]
    (core, (outer, inner)), _ = partial_tucker(conv.weight.detach().double(), ranks, modes=[0, 1], init="svd")
    first = nn.Conv2d(conv.in_channels, ranks[1], 1, bias=False)
    middle = nn.Conv2d(ranks[1], ranks[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
    last = nn.Conv2d(ranks[0], conv.out_channels, 1, bias=conv.bias is not None)
    with torch.no_grad():
        first.weight.copy_(inner.mT[:, :, None, None])
        middle.weight.copy_(core)
        last.weight.copy_(outer[:, :, None, None])
        if conv.bias is not None and last.bias is not None:
            last.bias.copy_(conv.bias)
    return nn.Sequential(first, middle, last)


def without_channels(ground: Ground, importance: str, ratio: float, images: int, seed: int) -> nn.Module:
    """A copy with this share of all inner channels removed, those that matter least by the criterion."""
    network = copy.deepcopy(ground.dense)
    if importance == "taylor":
        leave_gradients(network, ground, images, seed)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    kept = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_inner(name)
    ]
    pruner = torch_pruning.pruner.MetaPruner(
        network,
        torch.zeros(1, 3, SPEC.crop, SPEC.crop),
        IMPORTANCE[importance](),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,  # of one layer: none is to vanish
        ignored_layers=kept,
    )
    pruner.step()
    network.zero_grad(set_to_none=True)
    return network.eval()


def is_inner(name: str) -> bool:
    """Whether a convolution's outputs stay within a residual block of two."""
    return name.startswith("layer") and name.endswith("conv1")


def leave_gradients(network: nn.Module, ground: Ground, images: int, seed: int) -> None:
    """Gradients of the task loss, summed over training images, in the parameters."""
    with evaluating(network), torch.enable_grad():
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        for batch in ground.stream(ground.training(images, seed)):
            F.cross_entropy(logits_of(network(batch.images)), batch.labels, reduction="sum").backward()


@torch.no_grad()
def reestimated(network: nn.Module, ground: Ground, images: int, seed: int) -> nn.Module:
    """Batch norm's statistics again: the mean over batches of training images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for batch in ground.stream(ground.training(images, seed)):
        network(batch.images)
    return network.eval()


def solved_again(network: nn.Module, ground: Ground, images: int, seed: int) -> nn.Module:
    """The same channels removed as this project does it: consumers take up what they lose, layers are solved."""
    dense, world = ground.dense, ground.world
    pair = torch.zeros(2, 3, SPEC.crop, SPEC.crop)
    groups = removable_groups(dense, survey(dense, pair[:1]).sites, pair).groups
    all_kept = [KeptChannels(group, surviving(dense, network, group)) for group in groups]
    kept = [each for each in all_kept if len(each.channels) < each.group.width]
    seen = decode(ground.stream(ground.training(images, seed)), Views(mirrored=True))
    consumers = [consumer for group in groups for consumer in group.consumers]
    moments = collect_channel_moments(dense, consumers, (batch.images for batch in seen.prepared()), world)
    narrow = narrowed(dense, kept, predictions(kept, moments)).eval()
    solved = copy.deepcopy(narrow)
    settings = CorrectionConfig(calibrate_images=images, mirrored=True)
    correct(dense, solved, survey(narrow, pair[:1]), seen, settings, seed, world, source=narrow, kept=kept)
    return solved


def surviving(dense: nn.Module, pruned: nn.Module, group: Group) -> tuple[int, ...]:
    """Which of the group's channels are still there: the rows of the first layer are what they were."""
    before, after = (
        network.get_submodule(group.producers[0]).get_parameter("weight") for network in (dense, pruned)
    )
    same = (before[:, None] == after[None]).flatten(2).all(2)
    return tuple(same.any(1).nonzero()[:, 0].tolist())


REPAIRS = {"batch norm re-estimated": reestimated, "solved again": solved_again}
