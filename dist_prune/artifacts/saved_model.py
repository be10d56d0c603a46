"""A compressed network on disk: weights in `model.safetensors`, its shape in `plan.json`; and back again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_model
from torch import nn

from dist_prune.config.flags import is_from_file, parse_arch
from dist_prune.config.images import ImageSpec
from dist_prune.config.run import NetworkConfig, to_dict
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.project import rebuild
from dist_prune.factorization.release import UnsoundError, require_finite
from dist_prune.network import user_code
from dist_prune.network.attention import opened_as, opened_in
from dist_prune.network.channels import KeptChannels
from dist_prune.network.errors import ModelError
from dist_prune.network.models import build
from dist_prune.network.sites import SiteError
from dist_prune.network.weights import load_state
from dist_prune.utils.files import CheckpointError, replacing, require_intact, seal, to_json, write_text
from dist_prune.utils.text import read_text
from dist_prune.width.narrowing import narrowed

FORMAT = 1
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Description:
    """All that is needed to build a compressed network again and preprocess images; an unknown `arch` is empty.

    `inputs` are the names of a network's several inputs, none where it takes images alone.
    """

    arch: str
    classes: int
    image: ImageSpec
    labels: tuple[str, ...]
    plan: Plan
    options: Mapping[str, Any] = field(default_factory=dict)  # that torchvision built it with
    kept: tuple[KeptChannels, ...] = ()
    inputs: tuple[str, ...] = ()


def save_compressed(folder: Path, model: nn.Module, description: Description) -> None:
    """Write `plan.json` and `model.safetensors` (with its checksum); each whole or not at all.

    The source of an architecture given as `file.py:function`, and what it imports, is copied into the same folder.

    Raises:
        UnsoundError: NaN or infinity among the weights; nothing is written then.
    """
    require_finite(model)
    arch = _with_sources(folder, description.arch) if is_from_file(description.arch) else description.arch
    network = to_dict(NetworkConfig(arch, WEIGHTS, description.classes))
    content = {
        "format": FORMAT,
        "network": network | ({"options": dict(description.options)} if description.options else {}),
        "image": to_dict(description.image),
        "labels": list(description.labels),
        "choices": description.plan.to_json(),
        "widths": [each.to_json() for each in description.kept],
        "attention": list(opened_in(model)),
    } | ({"inputs": list(description.inputs)} if description.inputs else {})
    write_text(folder / "plan.json", to_json(content))
    path = folder / WEIGHTS
    with replacing(path) as aside:
        save_model(model, str(aside))
    seal(path)


def _with_sources(folder: Path, arch: str) -> str:
    """Copy the file as `network.py`, or into `network/` with what it imports from beside it; its new name."""
    function, files = parse_arch(arch)[1], user_code.sources(arch)
    main, home = next(iter(files)), folder if len(files) == 1 else folder / "network"
    for name, source in files.items():
        copied = home / ("network.py" if len(files) == 1 else name)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copied)
    return f"network.py:{function}" if len(files) == 1 else f"network/{main}:{function}"


def save_new(folder: Path, model: nn.Module, description: Description) -> None:
    """As `save_compressed`, where there is no network yet.

    Raises:
        CheckpointError: there is one, which nothing else may hold.
        UnsoundError: see `save_compressed`.
    """
    found = [name for name in ("plan.json", WEIGHTS) if (folder / name).exists()]
    if found:
        raise CheckpointError(f"{folder} holds a network already ({', '.join(found)}): choose another folder")
    save_compressed(folder, model, description)


def load_compressed(run_dir: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compressed network of a run, in evaluation mode on the CPU; needs neither data nor training code.

    Args:
        run_dir: a folder with `plan.json` and `model.safetensors`.
        model: a dense network of the architecture that was compressed, where `Compression.save` was not told which
            that is; left as it is, its weights are not used.

    Raises:
        CheckpointError: files absent, damaged, or of a newer format; no `model` where one is needed.
        ModelError: the architecture is not known here.
    """
    folder = Path(run_dir)
    found = read_description(folder)
    require_intact(folder / WEIGHTS)
    if model is None and not found.arch:
        raise CheckpointError(
            f"{folder}: made of a network at hand; pass one of the same class: load_compressed(folder, model)"
        )
    dense = build(found.arch, found.classes, found.options) if model is None else model
    try:
        compressed = rebuild(narrowed(opened_as(dense, found.plan.attention), found.kept), found.plan)
        load_state(compressed, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
        require_finite(compressed)
    except UnsoundError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (safetensors.SafetensorError, RuntimeError, AttributeError, SiteError, ModelError) as error:
        raise CheckpointError(f"{folder}: {WEIGHTS} does not fit plan.json ({error})") from error
    return compressed.eval()


def read_description(folder: Path) -> Description:
    """What `plan.json` says; the path of an architecture saved with it is of the folder.

    Raises:
        CheckpointError: absent, damaged, or of a newer format.
    """
    content = _read_plan(folder)
    try:
        network, image = content["network"], content["image"]
        attention = tuple(map(str, content.get("attention", ())))
        plan = replace(Plan.from_json(content["choices"]), attention=attention)
        kept = tuple(map(KeptChannels.from_json, content.get("widths", ())))
        spec = ImageSpec(**image | {"mean": tuple(image["mean"]), "std": tuple(image["std"])})
        arch, classes, labels = str(network["arch"]), int(network["classes"]), tuple(content["labels"])
        options, inputs = dict(network.get("options", {})), tuple(content.get("inputs", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'plan.json'}: incomplete or edited wrongly ({error!r})") from error
    if arch.startswith(("network.py:", "network/")):
        arch = str(folder / arch)
    return Description(arch, classes, spec, labels, plan, options, kept, inputs)


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / "plan.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no plan.json; expected the directory of a finished run")
    try:
        content: Any = json.loads(read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    return content
