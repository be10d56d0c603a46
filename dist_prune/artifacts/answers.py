"""Which validation images a run's networks get right, one by one: what makes two runs comparable in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_prune.distributed.world import World
from dist_prune.training.evaluate import Predictions
from dist_prune.utils.files import replacing, require_intact, seal

ANSWERS = "answers.safetensors"


@dataclass(frozen=True)
class Answers:
    """`right` says for each stage which images were got right, (images,) bool; `images` identifies their list."""

    images: str
    right: Mapping[str, Tensor]

    def changed(self, later: Answers, stage: str) -> tuple[int, int] | None:
        """How many images only the later network of that stage gets right, and how many only this one.

        None where they are of other images, or one of them has no such stage.
        """
        before, after = self.right.get(stage), later.right.get(stage)
        if before is None or after is None or self.images != later.images:
            return None
        return int((after & ~before).sum()), int((before & ~after).sum())


def right(found: Predictions, images: int, world: World) -> Tensor:
    """Which of all images were got right, (images,) bool, on the CPU of every rank; one reduction."""
    seen = torch.zeros(images, dtype=torch.uint8, device=world.device)
    seen[found.indices] = (found.logits.argmax(1) == found.labels).to(seen.dtype)
    world.sum_(seen)
    return seen.bool().cpu()


def save(path: Path, answers: Answers) -> None:
    """Write them, and a checksum file."""
    with replacing(path) as aside:
        save_file(dict(answers.right), aside, {"images": answers.images})
    seal(path)


def load(path: Path) -> Answers:
    """Read what `save` wrote.

    Raises:
        CheckpointError: absent or damaged.
    """
    require_intact(path)
    with safe_open(path, "pt") as file:
        return Answers(file.metadata()["images"], {stage: file.get_tensor(stage) for stage in file.keys()})  # noqa: SIM118  not a dict
