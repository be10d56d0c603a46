"""How wide each group is to be within a budget.

At a price of cost, every group takes the width of least loss + price · cost, the others' widths given; a few
turns of that settle. The price is bisected until the network fits, and what is then left of the budget is spent
channel by channel where it saves most. Layers between two groups cost the product of both widths, so that costs
are taken as they are at each turn, never as they were in the dense network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dist_prune.factorization.knapsack import Floats, Ints
from dist_prune.width.costs import WidthCosts

TURNS = 20  # of all groups, at one price
BISECTIONS = 50


class WidthError(ValueError):
    """A budget that widths cannot meet."""


def allocate(costs: WidthCosts, losses: Sequence[Floats], budget: float, round_to: int = 1) -> tuple[int, ...]:
    """The widths of least loss found within the budget.

    Args:
        costs: of the network.
        losses: of each group, entry w at width w, (c + 1,).
        budget: a fraction of the dense network's multiply-adds.
        round_to: widths are multiples of this, or full.

    Raises:
        WidthError: out of reach; the least is named.
    """
    allowed = [_allowed(full, round_to) for full in costs.full]
    limit = math.floor(budget * costs.total)
    if costs.macs(costs.full) <= limit:
        return costs.full
    least = tuple(int(widths[0]) for widths in allowed)
    if costs.macs(least) > limit:
        reached = math.ceil(1e4 * costs.macs(least) / costs.total) / 1e4
        raise WidthError(
            f"{budget:g} of the multiply-adds is out of reach by width alone, the least is {reached:g}; raise the "
            "budget, or let width take less of it"
        )
    low, high = -60.0, 0.0  # the price is eᵖ
    found = least
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        widths = _at_price(costs, losses, allowed, math.exp(middle))
        if costs.macs(widths) <= limit:
            found, high = widths, middle
        else:
            low = middle
    return _spent(costs, losses, allowed, found, limit)


def _allowed(full: int, round_to: int) -> Ints:
    return np.unique(np.append(np.arange(min(round_to, full), full + 1, round_to, dtype=np.int64), full))


def _at_price(
    costs: WidthCosts, losses: Sequence[Floats], allowed: Sequence[Ints], price: float
) -> tuple[int, ...]:
    widths = list(costs.full)
    for _ in range(TURNS):
        before = list(widths)
        for place, options in enumerate(allowed):
            slope = price * costs.per_channel(widths)[place]
            widths[place] = int(options[np.argmin(losses[place][options] + slope * options)])
        if widths == before:
            break
    return tuple(widths)


def _spent(
    costs: WidthCosts, losses: Sequence[Floats], allowed: Sequence[Ints], widths: tuple[int, ...], limit: int
) -> tuple[int, ...]:
    """Spend what is left, each time on the next width that saves most loss per cost, until none fits."""
    now, left = list(widths), limit - costs.macs(widths)
    while True:
        slopes, steps = costs.per_channel(now), []
        for place, options in enumerate(allowed):
            wider = options[options > now[place]]
            if len(wider) and slopes[place] * (int(wider[0]) - now[place]) <= left:
                cost = slopes[place] * (int(wider[0]) - now[place])
                saved = float(losses[place][now[place]] - losses[place][wider[0]])
                steps.append((saved / cost, place, int(wider[0]), cost))
        if not steps:
            return tuple(now)
        _, place, width, cost = max(steps)
        now[place], left = width, left - cost
