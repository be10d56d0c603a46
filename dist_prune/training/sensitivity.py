"""Each site compressed alone: the divergence that was predicted, and the one that is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Plan
from dist_prune.network.replacing import replaced
from dist_prune.statistics.probes import kl
from dist_prune.training.evaluate import Predictions, predict
from dist_prune.utils.files import CheckpointError, to_json, write_text
from dist_prune.utils.tables import table
from dist_prune.utils.text import read_text

SITES = "sites.json"


@dataclass(frozen=True)
class SiteLoss:
    """What one site costs: `predicted` in the unit of its spectrum (or unknown), `measured` KL, nats per image."""

    site: str
    rank: int
    predicted: float | None
    measured: float
    label: str = ""  # form and ranks


def measure_sites(
    dense: nn.Module,
    compressed: nn.Module,
    plan: Plan,
    batches: Callable[[], Iterable[Batch]],
    world: World,
    along: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> list[SiteLoss]:
    """Sensitivity: KL(dense ‖ dense with one site factored), for each factored site. The ranks share the sites.

    Args:
        dense: the network; a site at a time is replaced in it, and put back.
        compressed: the same network with its factored layers, taken one by one.
        plan: which sites are factored, and what was predicted of them.
        batches: opens the images; every rank must get all of them, in the same order.
        world: the ranks.
        along: hands on the names of this rank's sites, one by one.

    Returns:
        in the plan's order, equal on all ranks.
    """
    predicted = {choice.site: choice.loss for choice in plan.choices}
    reference = predict(dense, batches())
    measured = {}
    for name in along(list(plan.ranks)[world.rank :: world.size]):
        with replaced(dense, {name: compressed.get_submodule(name)}):
            measured[name] = divergence(reference, predict(dense, batches()))
    everywhere = {name: kl for part in world.gather(measured) for name, kl in part.items()}
    return [
        SiteLoss(name, min(choice.ranks), predicted[name], everywhere[name], choice.label)
        for name, choice in plan.factored.items()
    ]


def divergence(reference: Predictions, found: Predictions) -> float:
    """Mean KL(reference ‖ found), nats per image."""
    return float(kl(reference.logits.double(), found.logits.double()).mean())


def format_summary(losses: Sequence[SiteLoss], unit: str) -> str:
    """The table, and the sums."""
    rows = [
        [s.site, s.label or str(s.rank), "" if s.predicted is None else f"{s.predicted:.3g}", f"{s.measured:.3g}"]
        for s in losses
    ]
    known = [s.predicted for s in losses if s.predicted is not None]
    total = ["sum", "", f"{sum(known):.3g}" if known else "", f"{sum(s.measured for s in losses):.3g}"]
    return table(["site alone", "form", f"predicted {unit}".strip(), "measured KL"], [*rows, total])


def save(path: Path, losses: Sequence[SiteLoss], unit: str, images: int) -> None:
    """Write `sites.json`."""
    content = {"images": images, "predicted": unit, "measured": "KL", "sites": [asdict(s) for s in losses]}
    write_text(path, to_json(content))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, as far as pictures need it: `sites`, and the `unit` of what was predicted.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    try:
        content = json.loads(read_text(path))
        return {"sites": content["sites"], "unit": content["predicted"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or absent ({error!r})") from error
