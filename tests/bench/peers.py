"""Methods of others: pruning by Torch-Pruning 1.6 (Fang et al. 2023), Tucker-2 by tensorly (Kim et al. 2016), and
forms that are chosen by the error of weights (SVD-NAS, Yu and Bouganis 2023, without its search).

Of pruning, only the inner channels of blocks go, as this project's widths have it: the others are added to
shortcuts. One share for the whole network, found by bisection: as many MACs as the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import tensorly
import torch
import torch.nn.functional as F
import torch_pruning
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.config.flags import Rule
from dist_prune.correction.calibration import Calibration, decode
from dist_prune.correction.correct import correct
from dist_prune.data.views import Views
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import make_plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import spectra_of
from dist_prune.network.channels import Group, KeptChannels
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import evaluating, survey
from dist_prune.statistics.collect import Statistics
from dist_prune.width.choose import predictions, removable_groups
from dist_prune.width.moments import collect_channel_moments
from dist_prune.width.narrowing import narrowed
from tests.bench.ground import SPEC, Ground

IMPORTANCE = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "bn-scale": torch_pruning.importance.BNScaleImportance,
}
HALVINGS = 10  # of the interval in which the share lies
PAIR = torch.zeros(2, 3, SPEC.crop, SPEC.crop)  # of the ground's images

tensorly.set_backend("pytorch")


def prune(ground: Ground, importance: str, share: float, images: int, seed: int, repair: str) -> nn.Module:
    """The dense network with as few channels removed as the share of its MACs allows, and one of `REPAIRS`.

    `images` training images give the gradients of `taylor`, with their labels, and what the repair needs.
    """
    dense = copy.deepcopy(ground.dense)
    if importance == "taylor":
        leave_gradients(dense, ground, images, seed)
    return REPAIRS[repair](pruned_to(dense, PAIR, importance, share), ground, images, seed)


def pruned_to(dense: nn.Module, pair: Tensor, importance: str, share: float) -> nn.Module:
    """With as few channels removed as the share of the MACs allows; not repaired."""
    groups = groups_of(dense, pair)
    return within(dense, pair, share, lambda kept: without_channels(dense, pair, groups, importance, 1 - kept))


def tucker(ground: Ground, share: float, images: int, seed: int) -> nn.Module:
    """Every k×k convolution as 1×1 → k×k → 1×1, the same share of both its channels; batch norm re-estimated."""
    chains = within(ground.dense, PAIR, share, lambda kept: with_tucker(ground.dense, kept))
    return reestimated(chains, ground, images, seed)


def forms_by_weight(ground: Ground, share: float, images: int, seed: int) -> nn.Module:
    """Every layer in the form and at the ranks whose weights err least in sum; batch norm re-estimated."""
    chains = with_forms(ground.dense, PAIR, share, tuple(FORMS), ground.world)
    return reestimated(chains, ground, images, seed)


def with_forms(dense: nn.Module, pair: Tensor, share: float, forms: Sequence[str], world: World) -> nn.Module:
    """A copy within this share of the MACs, of chains for which all inputs and all outputs count alike."""
    found, method, nothing = survey(dense, pair[:1]), MethodConfig("weight-svd"), Statistics()
    bases = solve(dense, found.sites, nothing, method, 0, world)
    nested = nested_of(dense, found.sites, forms, bases, nothing, 0.0, world)
    budget, allowed = Rule("budget", share, of="macs"), tuple(FORMS[name] for name in forms)
    plan = make_plan(budget, found, 1, spectra=spectra_of(bases, method, nested), forms=allowed)
    return project(dense, found.sites, bases, plan, nested=nested).eval()


def within(dense: nn.Module, pair: Tensor, share: float, made: Callable[[float], nn.Module]) -> nn.Module:
    """Of the networks that are made by keeping a share of something, the largest within this share of the MACs."""
    budget, low, high, best = share * survey(dense, pair[:1]).macs, 0.0, 1.0, None
    for _ in range(HALVINGS):
        candidate = made(kept := (low + high) / 2)
        if survey(candidate, pair[:1]).macs <= budget:
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


def without_channels(
    dense: nn.Module, pair: Tensor, groups: Sequence[Group], importance: str, ratio: float
) -> nn.Module:
    """A copy with this share of all channels of the groups removed, those that matter least by the criterion.

    Batch norm's running means are the numbers that its channels had: no criterion looks at them, all are repaired.
    """
    network = copy.deepcopy(dense)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean = torch.arange(norm.num_features, dtype=torch.float32)
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name]
    inner = {name for group in groups for name in (*group.producers, *group.between)}
    kept = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in inner
    ]
    pruner = torch_pruning.pruner.MetaPruner(
        network,
        pair[:1],
        IMPORTANCE[importance](),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,  # of one layer: none is to vanish
        ignored_layers=kept,
    )
    pruner.step()
    network.zero_grad(set_to_none=True)
    return network.eval()


def groups_of(dense: nn.Module, pair: Tensor) -> tuple[Group, ...]:
    """The groups of channels that can go."""
    return removable_groups(dense, survey(dense, pair[:1]).sites, pair).groups


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
    """The same channels removed as this project does it, from training images and their mirror images."""
    seen = decode(ground.stream(ground.training(images, seed)), Views(mirrored=True))
    return solved(
        ground.dense,
        network,
        PAIR,
        seen,
        CorrectionConfig(calibrate_images=images, mirrored=True),
        seed,
        ground.world,
    )


def solved(
    dense: nn.Module,
    pruned: nn.Module,
    pair: Tensor,
    seen: Calibration,
    settings: CorrectionConfig,
    seed: int,
    world: World,
) -> nn.Module:
    """The dense network without the channels that are gone: consumers take up their loss, layers are solved."""
    groups = groups_of(dense, pair)
    all_kept = [KeptChannels(group, surviving(dense, pruned, group)) for group in groups]
    kept = [each for each in all_kept if len(each.channels) < each.group.width]
    consumers = [consumer for group in groups for consumer in group.consumers]
    moments = collect_channel_moments(dense, consumers, (batch.images for batch in seen.prepared()), world)
    narrow = narrowed(dense, kept, predictions(kept, moments)).eval()
    found = copy.deepcopy(narrow)
    correct(dense, found, survey(narrow, pair[:1]), seen, settings, seed, world, source=narrow, kept=kept)
    return found


def surviving(dense: nn.Module, pruned: nn.Module, group: Group) -> tuple[int, ...]:
    """Which of the group's channels are still there, by the mark that `without_channels` left."""
    name = next(name for name in group.between if isinstance(dense.get_submodule(name), nn.BatchNorm2d))
    return tuple(pruned.get_submodule(name).get_buffer("running_mean").long().tolist())


REPAIRS = {"batch norm re-estimated": reestimated, "solved again": solved_again}
