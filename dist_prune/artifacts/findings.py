"""Everything in a run's directory, whether the run is finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune.artifacts.metrics import METRICS, points_of
from dist_prune.artifacts.reader import read_json, require_run, stages_of
from dist_prune.artifacts.run_directory import CONFIG
from dist_prune.factorization import layers
from dist_prune.factorization.layers import Layer
from dist_prune.factorization.plan import Plan, PlanError
from dist_prune.training import sensitivity
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.files import CheckpointError
from dist_prune.utils.text import read_damaged

SPEED = "speed.json"  # of `dist-prune speed`


@dataclass(frozen=True)
class Findings:
    """A run as its files show it; what was not written yet is None or empty.

    Attributes:
        folder: of the run.
        settings: of config.json.
        environment: of config.json.
        result: of result.json; None while the run is not finished.
        stages: figures of the stages that are done, in order.
        plan: rank of each layer.
        layers: their costs and spectra.
        sites: of sites.json: what was predicted of each layer alone, and what was measured.
        unit: of what was predicted.
        points: of the curves.
        last: line of the log.
        speed: of speed.json, if latencies were measured.
    """

    folder: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    result: Mapping[str, Any] | None
    stages: Mapping[str, Metrics]
    plan: Plan | None
    layers: Sequence[Layer]
    sites: Mapping[str, Mapping[str, Any]]
    unit: str
    points: Sequence[Mapping[str, Any]]
    last: str
    speed: Mapping[str, Any] | None = None

    def curve(self, group: str, name: str) -> list[tuple[float, float]]:
        """The points of one curve; what was no number is left out."""
        of = [p for p in self.points if p["group"] == group and p.get(name) is not None]
        return [(p["step"], p[name]) for p in of]

    @property
    def groups(self) -> list[str]:
        """Of the curves, in the order in which they began."""
        return list(dict.fromkeys(p["group"] for p in self.points))


def read(folder: Path, result: Mapping[str, Any] | None = None) -> Findings:
    """Everything in the directory.

    Args:
        folder: of the run.
        result: what result.json will hold, of a run that is about to write it.

    Raises:
        CheckpointError: it is not the directory of a run, or a file is damaged; names it.
    """
    require_run(folder)
    config = read_json(folder / CONFIG)
    if result is None and (folder / "result.json").is_file():
        result = read_json(folder / "result.json")
    points = _points(folder / METRICS)
    try:
        return Findings(
            folder,
            config["run"],
            config["environment"],
            result,
            stages_of(result) if result else _reached(points),
            _plan(folder / "plan.json"),
            _layers(folder / layers.LAYERS),
            *_sites(folder / sensitivity.SITES),
            points,
            _last(folder / "log.txt"),
            read_json(folder / SPEED) if (folder / SPEED).is_file() else None,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged, or of another version of this program ({error!r})") from error


def _points(path: Path) -> list[dict[str, Any]]:
    return points_of(path.read_bytes()) if path.is_file() else []


def _reached(points: Sequence[Mapping[str, Any]]) -> dict[str, Metrics]:
    """The stages of a run under way, from its curves; of how many images these do not say."""
    names = {
        p["step"]: next((n for n in p if n not in ("group", "step", "time", "dense")), "dense")
        for p in points
        if p["group"] == "top1"
    }
    found = {p["step"]: p for p in points if p["group"] == "val"}
    return {
        name: Metrics(found[step]["top1"], found[step]["top5"], found[step]["loss"], 0, found[step].get("kl"))
        for step, name in names.items()
        if step in found
    }


def _plan(path: Path) -> Plan | None:
    if not path.is_file():
        return None
    try:
        return Plan.from_json(read_json(path)["choices"])
    except (KeyError, PlanError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def _layers(path: Path) -> list[Layer]:
    return layers.load(path) if path.is_file() else []


def _sites(path: Path) -> tuple[dict[str, Mapping[str, Any]], str]:
    if not path.is_file():
        return {}, ""
    content = sensitivity.load(path)
    return {site["site"]: site for site in content["sites"]}, content["unit"]


def _last(path: Path) -> str:
    lines = read_damaged(path).splitlines() if path.is_file() else []
    return lines[-1] if lines else ""
