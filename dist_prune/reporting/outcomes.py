"""What finished runs came to, and which of them are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAGES = ("tuned", "distilled", "corrected", "projected")  # the last that ran is the result


@dataclass(frozen=True)
class Outcome:
    """What one run came to: its shares of the dense network's cost, and the figures of the last stage.

    `values` are the settings by which it differs from others.
    """

    name: str
    values: Mapping[str, str]
    macs: float
    params: float
    dense: float
    stage: str
    top1: float
    kl: float
    seconds: float


def outcome_of(name: str, values: Mapping[str, str], result: Mapping[str, Any]) -> Outcome:
    """What a run came to, by its result.json."""
    stage = next(each for each in STAGES if result[each] is not None)
    macs, params = (result[kind]["compressed"] / result[kind]["dense"] for kind in ("macs", "params"))
    final, dense = result[stage], result["dense"]["top1"]
    seconds = sum(result["seconds"].values())
    return Outcome(name, values, macs, params, dense, stage, final["top1"], final["kl"], seconds)


def front(found: Sequence[Outcome], cost: str = "macs", worth: str = "top1") -> list[Outcome]:
    """The Pareto front, by cost: nothing else is as cheap and as good, and better in one of them.

    Args:
        found: outcomes.
        cost: `macs` or `params`.
        worth: `top1`, or `kl`, of which less is better.
    """
    sign = -1 if worth == "kl" else 1

    def value(o: Outcome) -> float:
        return sign * float(getattr(o, worth))

    best: list[Outcome] = []
    for o in sorted(found, key=lambda o: (getattr(o, cost), -value(o))):
        if not best or value(o) > value(best[-1]):
            best.append(o)
    return best
