"""A finished run, read back from its directory; and how far its accuracies can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune.artifacts.answers import ANSWERS, Answers
from dist_prune.artifacts.answers import load as load_answers
from dist_prune.artifacts.run_directory import CONFIG, is_known
from dist_prune.config.flags import budgets_of
from dist_prune.factorization.plan import Plan, PlanError
from dist_prune.training.evaluate import Metrics
from dist_prune.utils.files import CheckpointError
from dist_prune.utils.text import read_text

Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Record:
    """The settings of a finished run, and its results.

    `settings` and `environment` are config.json's, `result` is result.json, `stages` its figures by stage,
    `answers` None for a run of an earlier version, which kept none.
    """

    folder: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    result: Mapping[str, Any]
    stages: Mapping[str, Metrics]
    plan: Plan
    answers: Answers | None


def read_run(folder: Path) -> Record:
    """The run in that directory.

    Raises:
        CheckpointError: it is not a run's, or of a run that is not finished, or damaged; says which.
    """
    require_run(folder)
    if not (folder / "result.json").is_file():
        raise CheckpointError(
            f"{folder}: its run is not finished (no result.json); resume it by --run-dir {folder} --resume"
        )
    config, result, plan = (read_json(folder / name) for name in (CONFIG, "result.json", "plan.json"))
    answers = load_answers(folder / ANSWERS) if (folder / ANSWERS).exists() else None
    try:
        choices, stages = Plan.from_json(plan["choices"]), stages_of(result)
        return Record(folder, config["run"], config["environment"], result, stages, choices, answers)
    except (KeyError, TypeError, PlanError) as error:
        raise CheckpointError(f"{folder}: damaged, or of another version of this program ({error!r})") from error


def member_folder(family: Path, rule: str) -> Path:
    """Of the run for one of a family's budgets: `macs=0.5`."""
    return family / rule.partition(":")[2]


def runs_in(folder: Path) -> list[Path]:
    """The runs of a family, from the least budget up; of any other directory that itself."""
    if not is_known(folder):
        return [folder]
    rules = budgets_of(str(read_json(folder / CONFIG).get("run", {}).get("compression", {}).get("ranks", "")))
    return [member_folder(folder, rule) for rule in rules] or [folder]


def require_run(folder: Path) -> None:
    """Refuse what is not the directory of a run.

    Raises:
        CheckpointError: says what it is.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected the directory of a run")
    if not is_known(folder):
        raise CheckpointError(f"{folder} is not the directory of a run: it has no {CONFIG}")


def stages_of(result: Mapping[str, Any]) -> dict[str, Metrics]:
    """The figures of result.json, by stage."""
    return {name: Metrics(**v) for name, v in result.items() if isinstance(v, dict) and "top1" in v}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: absent or damaged; names the file.
    """
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or absent ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged, holds a {type(found).__name__}")
    return found


def accuracy_interval(per_cent: float, images: int) -> tuple[float, float]:
    """The 95 % interval, in per cent, of an accuracy found on so many images (Wilson 1927, binomial score)."""
    share, z2 = per_cent / 100, Z95**2
    middle = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = Z95 * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def paired_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """The 95 % interval, in points, of a difference of accuracies on the same images.

    From the numbers of images that only the second network gets right and that only the first does; Wald's
    interval with half an image added to each cell of the table (Agresti and Min 2005).
    """
    n, plus, minus = images + 2, gained + 0.5, lost + 0.5
    middle = (plus - minus) / n
    half = Z95 * math.sqrt((plus + minus) / n - middle**2) / math.sqrt(n)
    return 100 * (middle - half), 100 * (middle + half)


def difference_interval(before: Metrics, after: Metrics) -> tuple[float, float]:
    """The 95 % interval, in points, of `after.top1 − before.top1`, as if found on different images.

    From both Wilson intervals (Newcombe 1998, method 10). On the same images the difference is known better than
    that: see `paired_interval`.
    """
    p, q = before.top1, after.top1
    (p_low, p_high), (q_low, q_high) = (accuracy_interval(m.top1, m.images) for m in (before, after))
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)
