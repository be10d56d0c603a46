"""Channel groups for readers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from textwrap import indent

from dist_prune.network.channels import KeptChannels
from dist_prune.utils.tables import table
from dist_prune.width.groups import Groups

NAMED = 3  # members that a cell names


def format_groups(found: Groups) -> str:
    """Which channels can be removed, with which layers, and why the others stay."""
    total = len(found.groups) + len(found.staying)
    lines = [f"channels that can be removed: {len(found.groups)} of {total} groups"]
    if found.groups:
        rows = [
            [g.name, str(g.width), _named([*g.producers[1:], *g.between]), _named([c.name for c in g.consumers])]
            for g in found.groups
        ]
        lines.append(indent(table(["made by", "channels", "pass through", "taken by"], rows), "   "))
    if found.staying:
        rows = [[_named(each.producers), each.reason] for each in found.staying]
        lines.append(indent(table(["channels made by", "stay, because"], rows), "   "))
    return "\n".join(lines)


def note_on_staying(found: Groups, attention: Mapping[str, str] | None = None) -> str:
    """Why heads of attention stay, name → reason, or some of their dimensions, and all channels of a network that
    cannot be traced, if so.
    """
    heads = [f"{name} ({why})" for name, why in (attention or {}).items()]
    parts = defaultdict[tuple[str, str], list[str]](list)
    for each in found.staying:
        if each.part:
            parts[each.part, each.reason] += each.producers
    lines = [f"heads of attention stay: {', '.join(heads)}"] if heads else []
    lines += [f"{part} stay as they are in {', '.join(names)}: {why}" for (part, why), names in parts.items()]
    return "\n".join([*lines, *([f"channels stay: {found.unknown}"] if found.unknown else [])])


def format_widths(kept: Sequence[KeptChannels], macs: float, loss: float) -> str:
    """What became narrower, the multiply-adds left as a share of the dense network's, and the loss predicted."""
    rows = [[each.group.name, f"{len(each.channels)}/{each.group.width}"] for each in kept]
    return (
        f"{table(['made by', 'channels'], rows)}\n"
        f"channels removed in {len(kept)} groups: MACs ×{macs:.3f}, predicted KL, summed over groups: {loss:.4g}"
    )


def _named(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
