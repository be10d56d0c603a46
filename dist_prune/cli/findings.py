"""What `dist-prune check` finds of one thing, on the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dist_prune.distributed.world import World
from dist_prune.utils.console import hanging

Verdict = Literal["ok", "warn", "fail"]
SEVERITY: tuple[Verdict, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, and what to do about it unless it is ok."""

    subject: str
    verdict: Verdict
    text: str
    advice: str = ""


def agreed(found: Sequence[Finding], world: World) -> list[Finding]:
    """The worst that any rank found of each thing; it is named unless it is the first."""
    worst: dict[str, Finding] = {}
    for rank, findings in enumerate(world.gather(list(found))):
        for finding in findings:
            known = worst.get(finding.subject)
            if known is None or SEVERITY.index(finding.verdict) > SEVERITY.index(known.verdict):
                text = f"rank {rank}: {finding.text}" if rank else finding.text
                worst[finding.subject] = replace(finding, text=text)
    return list(worst.values())


def shown(finding: Finding, width: int) -> str:
    """A finding in lines of at most `width` columns."""
    lines = [hanging(f"{finding.verdict:4}  {finding.subject}", finding.text, 22, width)]
    if finding.advice and finding.verdict != "ok":
        lines.append(hanging("", f"→ {finding.advice}", 22, width))
    return "\n".join(lines)
