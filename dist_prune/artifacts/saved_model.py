"""A compressed network on disk: weights in `model.safetensors`, its shape in `plan.json`; and back again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_model, save_model
from torch import nn

from dist_prune.config.run import ImageSpec, NetworkConfig, to_dict
from dist_prune.factorization.plan import Plan
from dist_prune.factorization.project import rebuild
from dist_prune.network.models import build
from dist_prune.network.sites import SiteError
from dist_prune.utils.files import CheckpointError, replacing, require_intact, seal, write_text
from dist_prune.utils.text import read_text

FORMAT = 1
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Description:
    """All that is needed to build a compressed network again, and to preprocess its images."""

    arch: str
    classes: int
    image: ImageSpec
    labels: tuple[str, ...]
    plan: Plan


def save_compressed(folder: Path, model: nn.Module, description: Description) -> None:
    """Write `plan.json` and `model.safetensors` (with its checksum); each whole or not at all.

    The source of an architecture given as `file.py:function` is copied into the same folder.
    """
    arch = description.arch
    source, _, function = arch.partition(":")
    if source.endswith(".py"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / "network.py")
        arch = f"network.py:{function}"
    content = {
        "format": FORMAT,
        "network": to_dict(NetworkConfig(arch, WEIGHTS, description.classes)),
        "image": to_dict(description.image),
        "labels": list(description.labels),
        "choices": description.plan.to_json(),
    }
    write_text(folder / "plan.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    path = folder / WEIGHTS
    with replacing(path) as aside:
        save_model(model, str(aside))
    seal(path)


def load_compressed(run_dir: str | Path) -> nn.Module:
    """The compressed network of a run, in evaluation mode on the CPU; needs neither data nor training code.

    Args:
        run_dir: a folder with `plan.json` and `model.safetensors`.

    Raises:
        CheckpointError: files absent, damaged, or of a newer format.
        ModelError: the architecture is not known here.
    """
    folder = Path(run_dir)
    found = read_description(folder)
    require_intact(folder / WEIGHTS)
    try:
        model = rebuild(build(found.arch, found.classes), found.plan)
        load_model(model, str(folder / WEIGHTS))
    except (safetensors.SafetensorError, RuntimeError, AttributeError, SiteError) as error:
        raise CheckpointError(f"{folder}: {WEIGHTS} does not fit plan.json ({error})") from error
    return model.eval()


def read_description(folder: Path) -> Description:
    """What `plan.json` says; the path of an architecture saved with it is of the folder.

    Raises:
        CheckpointError: absent, damaged, or of a newer format.
    """
    content = _read_plan(folder)
    try:
        network, image = content["network"], content["image"]
        plan = Plan.from_json(content["choices"])
        spec = ImageSpec(**image | {"mean": tuple(image["mean"]), "std": tuple(image["std"])})
        arch, classes, labels = str(network["arch"]), int(network["classes"]), tuple(content["labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'plan.json'}: incomplete or edited wrongly ({error!r})") from error
    if arch.startswith("network.py:"):
        arch = str(folder / arch)
    return Description(arch, classes, spec, labels, plan)


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
