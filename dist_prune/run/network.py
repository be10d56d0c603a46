"""The dense network of a run: loaded on every rank, tried, and opened where its attention may lose dimensions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dist_prune.config.flags import ConfigError, parse_arch
from dist_prune.config.run import Run
from dist_prune.distributed.world import World
from dist_prune.network import models
from dist_prune.network.attention import opened, opened_as
from dist_prune.network.errors import ModelError
from dist_prune.network.inputs import required_inputs
from dist_prune.network.memory_format import lay_out
from dist_prune.network.padding import note_on, own_paddings, with_paddings
from dist_prune.network.published import options_of
from dist_prune.network.replacing import CopyError
from dist_prune.network.sites import SiteError, Survey, survey
from dist_prune.network.user_code import fault_of
from dist_prune.run.job import probe
from dist_prune.width.groups import Groups
from dist_prune.width.listing import note_on_staying


def load_network(
    config: Run, world: World, say: Callable[[str], None], read: bool = True
) -> tuple[nn.Module, Survey]:
    """The dense network on this rank's device, with weights unless not `read`, and all its sites.

    Args:
        config: names the network, its weights and images.
        world: one rank reads, or downloads, the weights; the others get them from it.
        say: given what was taken of a file of weights, where that needs saying.
        read: whether the network gets its weights.

    Raises:
        ModelError: no such network or weights, or they do not fit.
        ConfigError: the network does not take these images, or has other outputs than classes.
    """
    torch.manual_seed(config.seed)
    network = config.network
    options = options_of(network.arch, network.weights)
    dense = models.build(network.arch, network.classes, options).eval()
    if len(wanted := required_inputs(dense)) > 1:
        raise ConfigError(
            f"--arch {network.arch} takes several inputs ({', '.join(wanted)}), runs give it images; in Python, "
            f"dist_prune.compress takes such networks: batches that are mappings, or `inputs`"
        )
    if read:
        taken = world.from_first(lambda: models.fill(dense, network.arch, network.classes, network.weights))
        if taken:
            say(taken)
    dense = dense.to(world.device)
    world.broadcast_(*dense.state_dict().values())
    if config.channels_last:
        lay_out(dense, torch.channels_last)
    image = probe(config, world, 1)
    try:
        own_padding = own_paddings(dense, image)
        paddings = world.from_first(lambda: own_padding)
        dense = with_paddings(dense, paddings)
        own = survey(dense, image)
    except (ModelError, SiteError, CopyError):
        raise
    except Exception as error:  # whatever the network's own code raises
        size = " × ".join(map(str, image.shape[1:]))
        see = "--crop and --channels-last" if config.channels_last else "--crop"
        reason = error if isinstance(error, RuntimeError) else fault_of(error, Path(parse_arch(network.arch)[0]))
        raise ConfigError(f"--arch {network.arch} does not take images of {size}, see {see} ({reason})") from error
    if paddings:
        say(note_on(paddings))
    found = world.from_first(lambda: own)
    found.require_classes()
    if found.positions > 1:
        raise ConfigError(
            f"--arch {network.arch} has {found.classes} outputs at each of {found.positions} positions of an "
            f"image, expected one set of logits per image; dist_prune.compress takes such networks in Python"
        )
    if found.classes != network.classes:
        raise ConfigError(f"--arch {network.arch} has {found.classes} outputs, --classes is {network.classes}")
    return dense, found


def open_attention(
    config: Run, network: nn.Module, sites: Survey, world: World, say: Callable[[str], None]
) -> tuple[nn.Module, Survey]:
    """The network with its attention taken apart, if its heads may lose dimensions, and all sites of that.

    Args:
        config: says so.
        network: left as it is; the other one shares its parameters.
        sites: of the network.
        world: the ranks, which all take the same apart.
        say: given what stays as it is, and why.
    """
    if not config.compression.removes_channels:
        return network, sites
    image = probe(config, world, 1)
    names, closed = world.from_first(lambda: _attention(network, image, config.compression.sites))
    if closed:
        say(note_on_staying(Groups(), closed))
    if not names:
        return network, sites
    dense = opened_as(network, names)
    return dense, world.from_first(lambda: survey(dense, image))


def _attention(network: nn.Module, image: torch.Tensor, patterns: str) -> tuple[tuple[str, ...], dict[str, str]]:
    found = opened(network, image, patterns)
    return found.names, dict(found.closed)
