"""How wide each group is to be within a budget that is for widths and forms together.

At a price of cost, every group takes the width of least loss + price · cost, where each layer that it changes
costs what its best form does at that width and price; the others' widths given, a few turns of that settle. The
price is bisected until the network fits, and what is then left of the budget is spent channel by channel where it
saves most. Layers between two groups cost the product of both widths, so that costs are taken as they are at each
turn, never as they were in the dense network.

A form's loss is taken as it is in the dense network: of a narrower layer it is no larger. The forms themselves are
chosen afterwards, from statistics of the network that is left.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np

from dist_prune.factorization.knapsack import Floats, Ints
from dist_prune.factorization.plan import PlanError
from dist_prune.width.costs import Total, WidthCosts

TURNS = 20  # of all groups, at one price
BISECTIONS = 24
PRICES = -60.0, 10.0  # logarithms, of nats for each multiply-add or parameter
MOST = 128  # widths of a group that are compared at a price


class WidthError(PlanError):
    """A budget that widths cannot meet."""


def allocate(costs: WidthCosts, losses: Sequence[Floats], budget: float, round_to: int = 1) -> tuple[int, ...]:
    """The widths of least loss found within the budget.

    Args:
        costs: of the network.
        losses: of each group, entry w at width w, (c + 1,).
        budget: a fraction of what the dense network costs.
        round_to: widths are multiples of this, or full.

    Raises:
        WidthError: out of reach; the least is named.
    """
    allowed = [_allowed(full, round_to) for full in costs.full]
    limit = math.floor(budget * costs.total)
    if costs.total <= limit:
        return costs.full
    few = [_thinned(widths) for widths in allowed]
    low, high = PRICES
    found = _at_price(costs, losses, few, math.exp(high))
    if _cost(costs, found, math.exp(high)) > limit:
        _refuse(costs, allowed, budget)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        widths = _at_price(costs, losses, few, math.exp(middle))
        if _cost(costs, widths, math.exp(middle)) <= limit:
            found, high = widths, middle
        else:
            low = middle
    return _spent(costs, losses, allowed, found, math.exp(high), limit)


def _refuse(costs: WidthCosts, allowed: Sequence[Ints], budget: float) -> None:
    narrowest = [int(widths[0]) for widths in allowed]
    least = math.ceil(1e4 * _cost(costs, narrowest, math.exp(PRICES[1])) / costs.total) / 1e4
    raise WidthError(
        f"a budget of {budget:g} is out of reach, the least is {least:g}, with every width and rank at its "
        "smallest; raise the budget"
    )


def _allowed(full: int, round_to: int) -> Ints:
    return np.unique(np.append(np.arange(min(round_to, full), full + 1, round_to, dtype=np.int64), full))


def _thinned(widths: Ints) -> Ints:
    return np.unique(np.append(widths[:: -(-len(widths) // MOST)], widths[-1]))


def _cost(costs: WidthCosts, widths: Sequence[int], price: float) -> int:
    return costs.at(widths, [layer.best(widths, price) for layer in costs.layers])


def _at_price(
    costs: WidthCosts, losses: Sequence[Floats], allowed: Sequence[Ints], price: float
) -> tuple[int, ...]:
    widths: list[int] = list(costs.full)
    for _ in range(TURNS):
        before = list(widths)
        for place, (options, layers) in enumerate(zip(allowed, costs.of_group, strict=True)):
            tried: list[Total] = [*widths[:place], options, *widths[place + 1 :]]
            values = losses[place][options] + sum(layer.values(tried, price).min(-1) for layer in layers)
            widths[place] = int(options[np.argmin(values)])
        if widths == before:
            break
    return tuple(widths)


def _spent(
    costs: WidthCosts,
    losses: Sequence[Floats],
    allowed: Sequence[Ints],
    widths: tuple[int, ...],
    price: float,
    limit: int,
) -> tuple[int, ...]:
    """Spend what is left, each time on the next width that saves most loss per cost, until none fits.

    Layers keep the forms that they have at this price.
    """
    now, options = list(widths), [layer.best(widths, price) for layer in costs.layers]
    left = limit - costs.at(now, options)
    while True:
        steps = []
        for place, known in enumerate(allowed):
            for width in known[known > now[place]][:1].tolist():
                more = costs.more(now, place, width, options)
                if more <= left:
                    saved = float(losses[place][now[place]] - losses[place][width]) / max(more, 1)
                    steps.append((saved, place, width, more))
        if not steps:
            return tuple(now)
        _, place, width, more = max(steps, key=operator.itemgetter(0))
        now[place], left = width, left - more
