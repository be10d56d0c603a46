"""Structured pruning with Torch-Pruning 1.6 (Fang et al. 2023): whole channels are removed, nothing is factored.

Only the inner channels of each residual block are removed, those between its two convolutions: the others are
added to shortcuts. One threshold for the whole network, found by bisection: as many MACs as the others.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn

from dist_prune.config.correction import CorrectionConfig
from dist_prune.correction.calibration import decode
from dist_prune.correction.correct import correct
from dist_prune.correction.views import Views
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
HALVINGS = 10  # of the interval in which the threshold lies


def prune(ground: Ground, importance: str, share: float, images: int, seed: int, repair: str) -> nn.Module:
    """The dense network with as few channels removed as the share of its MACs allows, and one of `REPAIRS`.

    `images` training images give the gradients of `taylor`, with their labels, and what the repair needs.
    """
    budget, low, high, best = share * macs_of(ground.dense), 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        candidate = without_channels(ground, importance, ratio, images, seed)
        if macs_of(candidate) <= budget:
            high, best = ratio, candidate
        else:
            low = ratio
    assert best is not None, f"no ratio of channels reaches {share} of the MACs"
    return REPAIRS[repair](best, ground, images, seed)


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
