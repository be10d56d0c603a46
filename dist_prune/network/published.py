"""Weights that torchvision publishes: which, where they lie, and what their networks are built with.

A file that is named as torchvision's own counts as that weight: it is how they come to machines without network.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import WeightsEnum

from dist_prune.network.errors import ModelError


def is_torchvisions(arch: str) -> bool:
    """Whether torchvision has a classification network of that name."""
    return arch in torchvision.models.list_models(module=torchvision.models)


def entry_of(arch: str, weights: str) -> WeightsEnum | None:
    """The entry of torchvision that `--weights` names, by its name or by its file's; None for all others."""
    if not is_torchvisions(arch):
        return None
    known = torchvision.models.get_model_weights(arch)
    name = weights.removeprefix(f"{known.__name__}.")
    if name in known.__members__:
        return known[name]
    return next((entry for entry in known if Path(entry.url).name == Path(weights).name), None)


def options_of(arch: str, weights: str) -> dict[str, Any]:
    """What torchvision builds the network with for these weights, besides its classes.

    `transform_input`: the networks that came from TensorFlow shift images from torchvision's mean and deviation
    to theirs. `image_size`: of transformers whose positions are for larger images than usual.
    """
    entry = entry_of(arch, weights)
    if entry is None:
        return {}
    if arch in ("googlenet", "inception_v3"):
        return {"transform_input": True}
    if arch.startswith("vit_") and (side := entry.meta["min_size"][0]) != 224:
        return {"image_size": side}
    return {}


def file_of(entry: WeightsEnum) -> Path:
    """Where torch.hub keeps the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name


def fetched(arch: str, classes: int, weights: str) -> Path:
    """The file of these weights, downloaded if it is not there yet.

    Raises:
        ModelError: torchvision has no such weights, they are of other classes, or cannot be downloaded.
    """
    entry = entry_of(arch, weights)
    if entry is None:
        members = ", ".join(torchvision.models.get_model_weights(arch).__members__)
        raise ModelError(f"--weights {weights}: {arch} has {members}; or give a file, or 'none'")
    if classes != len(entry.meta["categories"]):
        raise ModelError(
            f"--weights {weights} has {len(entry.meta['categories'])} classes, --classes is {classes}: "
            f"leave --classes out or give weights trained on these classes"
        )
    path = file_of(entry)
    if not path.is_file():
        _download(entry, path, weights)
    return path


def _download(entry: WeightsEnum, path: Path, weights: str) -> None:
    try:
        entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM):
            raise ModelError(
                f"--weights {weights}: {path.parent} could not be written ({error.strerror}): name a folder that "
                f"can with TORCH_HOME, or fetch {entry.url} and give the file: --weights FILE"
            ) from error
        raise ModelError(
            f"--weights {weights}: the download failed ({error}). On a machine without network, fetch "
            f"{entry.url} elsewhere and give the file: --weights FILE"
        ) from error
