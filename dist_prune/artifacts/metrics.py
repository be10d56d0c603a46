"""The points of all curves, one JSON object per line."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

METRICS = "metrics.jsonl"


def points_of(lines: bytes) -> list[dict[str, Any]]:
    """The points in the lines of metrics.jsonl; what a run that was killed left of its last line is left out."""
    found = []
    for line in lines.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
